"""The only place with an optimizer: one loop, several tasks, and what makes a run resumable."""
