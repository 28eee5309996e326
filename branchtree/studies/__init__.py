"""What is done with models and runs: score, evaluate, compare, and measure diversity."""
