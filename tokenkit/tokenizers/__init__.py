"""Text to ids with byte spans, and back."""
