"""Recipes out of other trainers' configurations, which are read and never run."""
