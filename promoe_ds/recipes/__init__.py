"""Recipes, how one becomes a configuration, and what must hold of it."""
