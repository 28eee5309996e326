"""What the rewards share."""
