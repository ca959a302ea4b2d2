"""Whether knowledge alignment does what it is asked for, and whether it helps where nobody knows the future.

    python benchmarks/guidance.py --model model_cards/prediff-radar-small     # 12 test windows, a quarter of an hour

First table: of the usual change of the mean intensity plus n deviations, what the ensemble's mean got, in deviations
from what was asked for, over the windows in which the target is not clipped at 0; by the alignment network, and by the
decoded frames. Second: fair CRPS with a target that is regressed from the context, beside that of the same noise
without guidance. The regression is fitted on windows of the training split.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from transformers.utils import logging

from earthformer_hf import KnowledgeAlignmentCallback, PreDiffPipeline
from earthformer_hf.data import Windows
from earthformer_hf.evaluation import protocol_windows
from earthformer_hf.evaluation.metrics import EnsembleScores
from earthformer_hf.evaluation.protocols import PROTOCOLS
from earthformer_hf.guidance import frame_mean, intensity_change


DEVIATIONS = (-2, -1, 0, 1, 2)


def spread_out(windows: Windows, count: int) -> list[dict[str, torch.Tensor]]:
    """So many windows, evenly spread."""
    return [windows[index] for index in np.linspace(0, len(windows) - 1, count).round().astype(int).tolist()]


def members(pipeline, item: dict, arguments, seed: int, guide: KnowledgeAlignmentCallback | None) -> torch.Tensor:
    """(E, T, H, W, C) in the model's range, of the same noise whatever the guide."""
    options = {"ensemble_size": arguments.ensemble_size, "num_inference_steps": arguments.num_inference_steps}
    generator = torch.Generator().manual_seed(seed)
    past = item["past_values"][None]
    found = pipeline(past, generator=generator, output_type="pt", callback_on_step_end=guide, **options)
    return found.predictions[0]


def controls(pipeline, items: list[dict], arguments) -> None:
    """How far the mean of the ensemble is from what it was asked for."""
    usual = pipeline.alignment.config.statistics
    sigma = usual["change_deviation"]
    print(f"usual change {usual['change_mean']:+.5f}, deviation {sigma:.5f}; {len(items)} windows")
    print("    got less asked, deviations: mean (root mean square); windows that rise with n")
    for name, quantity in (("network", None), ("frames", frame_mean)):
        got = np.full((len(items), len(DEVIATIONS)), np.nan)
        asked = np.full_like(got, np.nan)
        for row, item in enumerate(items):
            for column, n in enumerate(DEVIATIONS):
                target = intensity_change(usual["change_mean"], sigma, n)
                guide = KnowledgeAlignmentCallback(target, quantity)
                asked[row, column] = target(item["past_values"][None]).item()
                got[row, column] = members(pipeline, item, arguments, row, guide).mean().item()
        missed = np.where(asked > 0, (got - asked) / sigma, np.nan)
        mean, square = np.nanmean(missed, 0), np.sqrt(np.nanmean(np.square(missed), 0))
        rising = int((np.diff(got, axis=1) > 0).all(1).sum())
        row = "  ".join(f"{n:+d}: {m:+.2f} ({s:.2f})" for n, m, s in zip(DEVIATIONS, mean, square))
        print(f"{name:8s} {row}   {rising} of {len(items)}", flush=True)


def regression(pipeline, items: list[dict]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A target: the future's mean intensity by least squares from the context's, its trend, and the forecaster's."""

    def features(past: torch.Tensor) -> torch.Tensor:
        means = past.flatten(2).mean(2)  # (B, T_in)
        columns = [means[:, -1], means[:, -1] - means[:, -3], means.mean(1), torch.ones(len(past))]
        if pipeline.forecaster is not None:
            columns.append(pipeline.forecaster(past).predictions.flatten(1).mean(1))
        return torch.stack(columns, dim=1).double()

    with torch.no_grad():
        design = torch.cat([features(item["past_values"][None]) for item in items])
    observed = torch.stack([item["future_values"][item["future_observed_mask"]].mean() for item in items]).double()
    weights = torch.linalg.lstsq(design, observed[:, None]).solution
    errors = ((forecast - observed).square().mean().sqrt() for forecast in ((design @ weights)[:, 0], design[:, 0]))
    print("mean intensity, error of the regression {:.5f}, of persistence {:.5f}".format(*errors))
    return lambda past: (features(past) @ weights)[:, 0].clamp(min=0).float()


def without_an_oracle(pipeline, items: list[dict], target: Callable, arguments) -> None:
    """Fair CRPS with and without the regressed target, of the same noise."""
    lengths = len(items[0]["future_values"])
    scores = {name: EnsembleScores(lengths) for name in ("not guided", "guided")}
    for row, item in enumerate(items):
        for name, metric in scores.items():
            guide = KnowledgeAlignmentCallback(target, frame_mean) if name == "guided" else None
            ensemble = members(pipeline, item, arguments, row, guide)[..., 0].numpy()
            truth, mask = (item[f"future_{part}"][..., 0].numpy() for part in ("values", "observed_mask"))
            metric.update(ensemble, truth, mask)
    found = {name: float(np.mean(metric.compute()["fair_crps"])) for name, metric in scores.items()}
    ratio = found["guided"] / found["not guided"]
    print("fair CRPS: " + ", ".join(f"{name} {value:.5f}" for name, value in found.items()) + f", ratio {ratio:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/prediff-radar-small")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--training_windows", type=int, default=200, help="that the regression is fitted on")
    parser.add_argument("--ensemble_size", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--split", default="test")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    pipeline = PreDiffPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    protocol = PROTOCOLS[pipeline.feature_extractor.protocol]
    items = spread_out(protocol_windows(protocol, split=arguments.split), arguments.windows)
    training = protocol_windows(replace(protocol, window_stride=1), split=protocol.training_split)
    target = regression(pipeline, spread_out(training, arguments.training_windows))
    without_an_oracle(pipeline, items, target, arguments)
    controls(pipeline, items, arguments)


if __name__ == "__main__":
    main()
