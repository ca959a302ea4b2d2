"""Training: one loop for all recipes, and what recipes may choose."""

from .arguments import TrainingArguments, parse_recipe
from .run import Run, mean_over, train


__all__ = ["Run", "TrainingArguments", "mean_over", "parse_recipe", "train"]
