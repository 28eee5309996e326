"""The method: trees, transitions, fusion, advantages, pruning and losses. It imports torch and nothing of a model."""
