"""Recipes: YAML files that compose a model, rewards, a tree and an optimiser into one training run."""

from branchtree.recipe.load import find_recipe, load_recipe, recipe_names, validate_options
from branchtree.recipe.schema import Recipe

__all__ = ["Recipe", "find_recipe", "load_recipe", "recipe_names", "validate_options"]
