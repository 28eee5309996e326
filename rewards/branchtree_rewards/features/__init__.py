"""Feature spaces in which the diversity of samples is measured."""
