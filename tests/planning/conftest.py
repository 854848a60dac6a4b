"""Small data and recipes."""

from small import digits_store, recipe, recipe_of, small_store

__all__ = ["digits_store", "recipe", "recipe_of", "small_store"]
