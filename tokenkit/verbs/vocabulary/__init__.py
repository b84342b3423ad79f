"""One file per verb of `tokenkit vocabulary`."""
