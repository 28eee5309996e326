"""Recipes: YAML files with all settings of a training run."""

from branchtree.recipe.load import find_recipe, load_recipe, recipe_names, validate_options
from branchtree.recipe.schema import Recipe

__all__ = ["Recipe", "find_recipe", "load_recipe", "recipe_names", "validate_options"]
