"""The same model in another container; what was written is reloaded with the consumer's loader and compared."""
