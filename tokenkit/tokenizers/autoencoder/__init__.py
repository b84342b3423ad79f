"""A learned tokenizer: a table of byte strings, codes of an auto-encoder for what it lacks, bytes for the rest."""
