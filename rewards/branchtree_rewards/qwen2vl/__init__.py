"""What the rewards on Qwen2-VL share: patches, questions with tokens to read scores at, and the backbone."""
