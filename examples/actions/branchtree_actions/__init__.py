"""Policies that make chunks of actions, trained by branchtree: a kind of sample that is neither image nor video."""
