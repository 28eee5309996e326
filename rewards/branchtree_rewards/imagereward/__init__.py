"""ImageReward."""
