"""Ask the forecast for more rain, or less: knowledge alignment of one storm.

    python examples/guided_forecast.py                        # real radar if there is any, else simulated rain
    python examples/guided_forecast.py --input mine.npy       # as for forecast_prediff.py

Each row of outputs/guided_forecast.png is one member, from the same noise, whose mean intensity is asked to change by
the usual change plus n standard deviations. The gradient goes through the decoder; with `--network` the alignment
network reads the latents instead, which is faster and less exact.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from forecast_prediff import MODEL, shown, storm
from forecast_radar import describe, input_path

from earthformer_hf import KnowledgeAlignmentCallback, PreDiffPipeline
from earthformer_hf.guidance import frame_mean, intensity_change
from earthformer_hf.plotting import plot_sequence


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--guidance_scale", type=float, default=1000.0)
    parser.add_argument("--network", action="store_true", help="read the noisy latents, not the decoded frames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/guided_forecast.png"))
    arguments = parser.parse_args()
    path = input_path(arguments.input)
    label = describe(path)
    print(f"rain: {label}, guided forecast by {arguments.model}", flush=True)
    pipeline = PreDiffPipeline.from_pretrained(arguments.model)
    extractor, usual = pipeline.feature_extractor, pipeline.alignment.config.statistics
    event, codes, leads = storm(path, pipeline)
    past = pipeline.unet.config.context_length
    inputs = extractor(codes[:past])

    known = extractor.to_physical(codes)
    rows = {"observed": shown(known[past:], known[:past])}
    quantity = None if arguments.network else frame_mean
    for n in (-2, -1, 0, 1, 2):
        target = intensity_change(usual["change_mean"], usual["change_deviation"], n)
        guide = KnowledgeAlignmentCallback(target, quantity, arguments.guidance_scale)
        generator = torch.Generator().manual_seed(arguments.seed)
        member = pipeline(**inputs, ensemble_size=1, generator=generator, callback_on_step_end=guide).predictions[0, 0]
        asked, got = float(target(inputs["past_values"])[0]), float(member.mean())
        print(f"n = {n:+d}: mean intensity asked {asked:.4f}, got {got:.4f} (code / 255)", flush=True)
        rows[f"n = {n:+d}"] = shown(extractor.to_physical(extractor.decode(member[..., 0])))
    if np.isfinite(codes[past:]).any():
        print(f"observed: {float(np.nanmean(codes[past:])) / 255:.4f}")
    title = f"{label}: {event['id']}, PreDiff asked for a change of mean intensity of n deviations"
    columns = [leads[i] for i in (0, past // 2, past - 1)] + leads[past:]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    plot_sequence(rows, columns, title).savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
