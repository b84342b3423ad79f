"""A vocabulary changed in place: tokens added, tokens taken away, and those found that no text ever becomes."""
