"""Rows of text, of conversations or of a recorded teacher → batches of aligned, padded, shifted tensors."""
