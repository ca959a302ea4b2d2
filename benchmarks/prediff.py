"""What fewer steps of a PreDiff pipeline cost in skill, and what they save in seconds; all ratios are of one run.

    python benchmarks/prediff.py                          # 12 test windows, 4 members: half an hour on two cores
    python benchmarks/prediff.py --windows 2 --reference_steps 0

Schedulers run with the same weights and the same initial noise. Seconds are those of a whole call, decoding included.
"""

import argparse
import time
from dataclasses import replace

import diffusers
from transformers.utils import logging

from earthformer_hf import PreDiffPipeline
from earthformer_hf.evaluation import evaluate, pipeline_forecaster, protocol_windows
from earthformer_hf.evaluation.protocols import PROTOCOLS


def curve(pipeline, max_windows: int, ensemble_size: int, reference_steps: int, steps: list[int], names: list[str]):
    """Fair CRPS, CSI-M and seconds over schedulers and steps, beside a long chain of DDPM."""
    protocol = PROTOCOLS[pipeline.feature_extractor.protocol]
    protocol = replace(protocol, max_windows=max_windows, scores=("contingency", "ensemble"))
    windows = protocol_windows(protocol)
    cases = [("DDPMScheduler", reference_steps)] if reference_steps else []
    cases += [(name, count) for name in names for count in steps]
    print(f"{max_windows} test windows, {ensemble_size} members; seconds of all of them")
    columns = f"{'steps':>6s}{'fair CRPS':>11s}{'CSI-M':>8s}{'seconds':>9s}{'CRPS ratio':>12s}{'time ratio':>12s}"
    print(f"{'scheduler':30s}{columns}")
    first = None
    for name, count in cases:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
        start = time.perf_counter()
        results = evaluate({name: pipeline_forecaster(pipeline, ensemble_size, count)}, windows, protocol)
        seconds = time.perf_counter() - start
        summary = results["scores"][name]["summary"]
        crps, csi = summary["fair_crps"], summary["csi_m"]
        first = first or (crps, seconds)
        ratios = f"{crps / first[0]:12.3f}{seconds / first[1]:12.3f}"
        print(f"{name:30s}{count:6d}{crps:11.6f}{csi:8.4f}{seconds:9.1f}{ratios}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/prediff-radar-small")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--ensemble_size", type=int, default=4)
    parser.add_argument("--reference_steps", type=int, default=250, help="of DDPM; 0 leaves it out")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument(
        "--schedulers",
        nargs="+",
        default=["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler"],
    )
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    pipeline = PreDiffPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    curve(
        pipeline,
        arguments.windows,
        arguments.ensemble_size,
        arguments.reference_steps,
        arguments.steps,
        arguments.schedulers,
    )


if __name__ == "__main__":
    main()
