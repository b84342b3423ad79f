"""The verbs of `tokenkit tokenizer`, one file each."""
