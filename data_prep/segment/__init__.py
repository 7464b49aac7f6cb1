"""A box -> the object's pixels."""
