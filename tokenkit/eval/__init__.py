"""Measuring: bits per byte, tasks of lm-evaluation-harness, ensembles, tokenizers. Nothing here imports train."""
