"""Work, memory and time of a run, computed before it begins."""
