"""A question and its answer -> the name of the object that has to be seen."""
