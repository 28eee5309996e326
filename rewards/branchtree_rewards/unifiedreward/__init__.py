"""UnifiedReward: a language model that is asked for scores."""
