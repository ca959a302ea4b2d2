"""What a run shows of itself: a figure of forecasts at each evaluation, and a card at its end."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import sharing
from ..data import Windows
from ..data.measures import DataFacts
from ..evaluation.reports import LEAD_UNITS
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..plotting import plot_events
from ..plotting.canvas import quantity_label
from ..sharing.cards import write_card
from .arguments import PublishedArguments
from .run import Run


if TYPE_CHECKING:
    from matplotlib.figure import Figure


MODEL_INPUTS = ("past_values", "past_observed_mask", "past_covariates", "future_covariates", "past_time_features")


def forecast_figure(
    forecast_of: Callable[[dict], torch.Tensor], windows: Windows, extractor: EarthformerFeatureExtractor
) -> "Figure":
    """Context, observed and forecast frames of the window that varies most among 16 of them, in stored units.

    Args:
        forecast_of: a window's inputs as a batch of one -> (T_out, H, W, C) in the model's range.
        windows: of the validation split.
        extractor: of the model.
    """
    items = [windows[n] for n in np.linspace(0, len(windows) - 1, min(16, len(windows))).astype(int)]
    item = max(items, key=lambda item: item["future_values"].std().item())
    forecast = forecast_of({name: item[name][None] for name in MODEL_INPUTS if name in item})
    observed = torch.where(item["future_observed_mask"], item["future_values"], torch.nan)
    frames = {"context": item["past_values"], "observed": observed, "forecast": forecast.float().cpu()}
    rows: dict[str, np.ndarray] = {}
    times: dict[str, Sequence[str]] = {}
    for name, values in frames.items():
        shown = np.unique(np.linspace(0, len(values) - 1, 6).astype(int))
        rows[name] = extractor.decode(values[shown, ..., 0])
        times[name] = _leads(extractor, shown + 1 - (len(values) if name == "context" else 0))
    label = quantity_label(extractor.variable or "value", extractor.units or "units not stated")
    return plot_events(rows, times, label, "validation: the window of 16 that varies most")


def _leads(extractor: EarthformerFeatureExtractor, frames: np.ndarray) -> list[str]:
    """Frames after the last of the context as leads, such as "+20 min"."""
    step = DataFacts(time_step=extractor.time_step).step
    if step is None:
        return [f"frame {frame:+d}" for frame in frames]
    amount, unit = int(step.astype(int)), LEAD_UNITS[np.datetime_data(step)[0]]
    return [f"{amount * frame:+d} {unit}".replace("+0", "0") for frame in frames]


def publish(run: Run, arguments: PublishedArguments, recipe: dict, data: str):
    """Write the card of what a run has trained, and push both if that was asked for.

    Args:
        run: at its end.
        recipe: as read from its file.
        data: what the model was trained on, in words.
    """
    progress = run.progress
    if not run.accelerator.is_main_process or not progress["best_step"]:
        return
    write_card(
        arguments.output_dir,
        recipe,
        data,
        steps=run.step,
        batch_size=run.samples_per_step,
        num_processes=run.accelerator.num_processes,
        skipped_steps=progress["skipped"],
        best_step=progress["best_step"],
        best_loss=progress["best"],
        extensions=progress["extensions"],
    )
    if arguments.push_to_hub:
        folder, model, extractor = sharing.load(arguments.output_dir)
        sharing.push(model, arguments.push_to_hub, extractor, folder / "README.md")


__all__ = ["MODEL_INPUTS", "forecast_figure", "publish"]
