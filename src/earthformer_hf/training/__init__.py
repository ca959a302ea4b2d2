"""Training: one loop for all recipes, and what the training scripts share.

| module | what it holds |
|---|---|
| `arguments.py`, `recipe.py` | what a recipe and the command line may choose, and how both are read |
| `loading.py` | the windows and latents that are trained on |
| `run.py` | the loop; `batches.py`, `checkpoint.py`, `seeds.py`, `distributed.py`: its parts |
| `losses.py`, `optimization.py`, `discriminator.py` | what learning follows |
| `publishing.py` | figures and the card of a run |
"""

from ..errors import ends_in_one_line
from .arguments import DataArguments, LatentArguments, PublishedArguments, TrainingArguments
from .distributed import mean_over
from .loading import load_latents, load_windows, run_settings
from .publishing import MODEL_INPUTS, forecast_figure, publish
from .recipe import build, parse_recipe
from .run import Run, train
from .seeds import validation_generator


__all__ = [
    "MODEL_INPUTS",
    "DataArguments",
    "LatentArguments",
    "PublishedArguments",
    "Run",
    "TrainingArguments",
    "build",
    "ends_in_one_line",
    "forecast_figure",
    "load_latents",
    "load_windows",
    "mean_over",
    "parse_recipe",
    "publish",
    "run_settings",
    "train",
    "validation_generator",
]
