"""Published systems as short compositions of the library, each with its evidence: ``polytask run NAME``, ``polytask verify``.

A recipe is one file ``recipes/DOMAIN/NAME.py`` with one class under one decorator, :func:`recipe`; docs/recipes.md shows how.
"""

from polytask.recipes.contract import Arm, Check, Measure, Recipe, Trial
from polytask.recipes.evidence import Evidence
from polytask.recipes.registration import find_recipe, recipe, recipes
from polytask.recipes.results import Results
from polytask.recipes.verify import claims_page, run_recipe, verify

__all__ = [
    "Arm",
    "Check",
    "Evidence",
    "Measure",
    "Recipe",
    "Results",
    "Trial",
    "claims_page",
    "find_recipe",
    "recipe",
    "recipes",
    "run_recipe",
    "verify",
]
