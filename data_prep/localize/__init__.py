"""A keyword -> boxes in the picture."""
