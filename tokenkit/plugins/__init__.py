"""A user's own losses: a Python file that a run file names, and what every loss is held to."""
