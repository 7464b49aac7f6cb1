"""Data sets as rows: one class for each layout, all behind `Source`."""
