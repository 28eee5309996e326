"""Reward adapters shipped with branchtree, one module per reward."""
