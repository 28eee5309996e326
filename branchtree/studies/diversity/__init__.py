"""How different the samples of branched and plain rollouts are, and how different those of one prompt."""
