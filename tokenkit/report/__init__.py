"""Model cards, tables, plots and self-contained pages, from what a run folder holds."""
