"""What a sample of a PreDiff pipeline costs, and what fewer steps cost in skill; all ratios are of one run.

    python benchmarks/prediff.py                          # 12 test windows, 4 members: half an hour on two cores
    python benchmarks/prediff.py --windows 2 --reference_steps 0 --full_size

Schedulers run with the same weights and the same initial noise. Seconds are those of a whole call, decoding included.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import yaml
from diffusers import AutoencoderKL
from transformers.utils import logging

from earthformer_hf import EarthformerUNetModel, PreDiffPipeline
from earthformer_hf.evaluation import evaluate, pipeline_forecaster, protocol_windows
from earthformer_hf.evaluation.protocols import PROTOCOLS


ROOT = Path(__file__).parents[1]


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


def members(pipeline, title: str, steps: int, counts: tuple[int, int] = (1, 8)):
    """Seconds of a call with few and with many members, and how often each network was called."""
    config, vae = pipeline.unet.config, pipeline.vae
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    size = [factor * n for n in config.sample_size]
    past_values = torch.rand(1, config.context_length, *size, vae.config.in_channels)
    calls = {"encode": 0}
    handle = vae.encoder.register_forward_hook(lambda *_: calls.update(encode=calls["encode"] + 1))
    seconds = {}
    for count in (counts[0], *counts):  # the first call warms up
        calls["encode"] = 0
        start = time.perf_counter()
        pipeline(past_values, ensemble_size=count, num_inference_steps=steps)
        seconds[count] = time.perf_counter() - start
    handle.remove()
    few, many = counts
    print(
        f"{title}, {steps} steps: {few} member {seconds[few]:.2f} s, {many} members {seconds[many]:.2f} s, ratio "
        f"{seconds[many] / seconds[few]:.2f}; context encoded {calls['encode']} time(s) for {many} members"
    )


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
    parser.add_argument("--full_size", action="store_true", help="also the published size, with random weights")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    pipeline = PreDiffPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    members(pipeline, arguments.model, 20)
    if arguments.full_size:
        recipe = yaml.safe_load((ROOT / "examples/configs/prediff_sevir_lr.yaml").read_text())
        options = dict(recipe["scheduler"])
        unet = EarthformerUNetModel(in_channels=recipe["vae"]["latent_channels"], **recipe["unet"])
        scheduler = getattr(diffusers, options.pop("class"))(**options)
        published = PreDiffPipeline(AutoencoderKL(**recipe["vae"]), unet, scheduler)
        published.set_progress_bar_config(disable=True)
        members(published, "published size, random weights", 1)
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
