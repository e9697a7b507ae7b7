"""Recipes: one YAML file describes a whole run and is checked before anything is loaded.

Every section is a pydantic model in a module of its own: its fields, with their types and ranges,
are the schema, and the text under each field is its documentation.
"""

from finetune.recipe.schema.base import Base
from finetune.recipe.schema.data import Data
from finetune.recipe.schema.evaluation import Evaluation, Expected
from finetune.recipe.schema.fields import NonNegative, Positive, Section
from finetune.recipe.schema.optimizer import Optimizer
from finetune.recipe.schema.prior import OutputPrior, PicturePrior, Prior
from finetune.recipe.schema.recipe import Recipe
from finetune.recipe.schema.text import Text
from finetune.recipe.schema.timesteps import Timesteps
from finetune.recipe.schema.training import Training
from finetune.recipe.schema.validation import Best, Validation

__all__ = [
    "Base",
    "Best",
    "Data",
    "Evaluation",
    "Expected",
    "NonNegative",
    "Optimizer",
    "OutputPrior",
    "PicturePrior",
    "Positive",
    "Prior",
    "Recipe",
    "Section",
    "Text",
    "Timesteps",
    "Training",
    "Validation",
]
