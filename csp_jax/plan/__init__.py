"""Planning a training for machines that are not there: does it fit, what does it send, how fast can it be."""
