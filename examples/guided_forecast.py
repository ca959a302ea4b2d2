"""Ask the forecast for more rain, or less: knowledge alignment of one storm.

    python examples/guided_forecast.py                        # real radar if there is any, else simulated rain
    python examples/guided_forecast.py --input mine.npy       # as for forecast_prediff.py

Each row of outputs/guided_forecast.png is one member, from the same noise, whose mean intensity is asked to change by
the usual change plus n standard deviations (sigma); the last rows are how it differs from n = 0. The gradient goes
through the decoder; with `--network` the alignment network reads the latents instead, which is faster and less exact.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from earthformer_hf import KnowledgeAlignmentCallback, PreDiffPipeline
from earthformer_hf.data.inputs import last_time, rain_input, wettest_window
from earthformer_hf.errors import ends_in_one_line
from earthformer_hf.guidance import frame_mean, intensity_change
from earthformer_hf.plotting import lead_labels, plot_sequence


CLOSE = 0.25  # sigma, within which a target counts as reached


@ends_in_one_line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="rain rates in mm/h (.npy, .npz), or open radar data (.h5)")
    parser.add_argument("--model", default="model_cards/prediff-radar-small", help="a pipeline's folder, or a hub id")
    parser.add_argument("--guidance_scale", type=float, help="of a step; as much as it takes if omitted")
    parser.add_argument("--num_inference_steps", type=int, default=10, help="fewer are faster")
    parser.add_argument("--network", action="store_true", help="read the noisy latents, not the decoded frames")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--output", type=Path, default=Path("outputs/guided_forecast.png"), help="the figure")
    arguments = parser.parse_args()
    try:
        pipeline = PreDiffPipeline.from_pretrained(arguments.model)
    except (ValueError, OSError) as reason:
        raise ValueError(f"--model: {reason}") from reason
    if pipeline.alignment is None or pipeline.feature_extractor is None:
        raise ValueError(f"--model: {arguments.model} must have an alignment network and a feature extractor.")
    extractor, usual = pipeline.feature_extractor, pipeline.alignment.config.statistics
    config = pipeline.unet.config
    past, pixels_per_latent = config.context_length, 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    image_size = [pixels_per_latent * n for n in config.sample_size]
    try:
        label, events = rain_input(arguments.input, extractor)
        lengths, latest = (past, config.prediction_length), label.startswith("input")
        event, codes, minutes = wettest_window(events, extractor, *lengths, image_size, latest)
    except (ValueError, OSError) as reason:
        raise ValueError(f"--input: {reason}") from reason
    print(f"rain: {label}, guided forecast by {arguments.model}", flush=True)
    inputs = extractor(codes[:past])

    known = extractor.to_physical(codes)
    rows = {"observed": known[past:]} if np.isfinite(codes[past:]).any() else {}
    quantity = None if arguments.network else frame_mean
    members, sigma = {}, usual["change_deviation"]
    for n in (-4, -2, 0, 2, 4):
        target = intensity_change(usual["change_mean"], sigma, n)
        guide = KnowledgeAlignmentCallback(target, quantity, arguments.guidance_scale)
        generator = torch.Generator().manual_seed(arguments.seed)
        steps = {"num_inference_steps": arguments.num_inference_steps, "generator": generator}
        member = pipeline(**inputs, ensemble_size=1, callback_on_step_end=guide, **steps).predictions[0, 0]
        asked, got = float(target(inputs["past_values"])[0]), float(member.mean())
        missed = abs(got - asked) / sigma
        reached = [] if missed <= CLOSE else [f"missed by {missed:.1f} sigma"]
        told = [f"asked {asked:.4f}", f"got {got:.4f}", *reached]
        print(f"n = {n:+d}: mean intensity (code / 255) {', '.join(told)}", flush=True)
        members[n] = extractor.to_physical(extractor.decode(member[..., 0]))
        rows["\n".join([f"n = {n:+d}", *told])] = members[n]
    differences = {f"n = {n:+d} less n = 0": members[n] - members[0] for n in members if n}
    if np.isfinite(codes[past:]).any():
        print(f"observed: {float(np.nanmean(codes[past:])) / 255:.4f}")
    title = f"{label}: {event['id']}, PreDiff asked for a mean intensity (code / 255) of n sigma above the usual"
    made = last_time(event, minutes, bool(np.isfinite(codes[past:]).any()))
    columns = lead_labels(minutes[past:], made)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure = plot_sequence(rows, columns, title, differences=differences, grid_spacing=extractor.grid_spacing)
    figure.savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
