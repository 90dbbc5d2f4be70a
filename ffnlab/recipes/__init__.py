"""Recipes: TOML files that say which transforms are applied to a model, in order, and how.

The format and its checks belong here, and the table of transforms that a recipe may name; applying
one to a model and measuring what it cost is `ffnlab.compress`.
"""

from ffnlab.options import Option
from ffnlab.recipes.recipe import (
    Calibration,
    Evaluation,
    Recipe,
    Stage,
    default,
    parse_recipe,
    read_recipe,
)
from ffnlab.recipes.table import METHODS, TRANSFORMS, factory, options_of

__all__ = [
    "METHODS",
    "TRANSFORMS",
    "Calibration",
    "Evaluation",
    "Option",
    "Recipe",
    "Stage",
    "default",
    "factory",
    "options_of",
    "parse_recipe",
    "read_recipe",
]
