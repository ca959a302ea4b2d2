"""Time and memory of fused attention (sdpa) against others, side by side: plain attention (eager), and fused attention
with the masks of a pattern repeated for each sample of the batch (repeated).

    python benchmarks/attention.py                       # the released SEVIR setting, one forecast at a time
    python benchmarks/attention.py --recipe examples/configs/earthformer_icar_enso.yaml --batch 8
    python benchmarks/attention.py --pattern video_swin_2x8 --batch 4     # shifted cuboids, each with its mask

Time: they take turns in one process, the median counts. Memory: the peak above what the loaded model needs, each in a
process of its own (on a GPU, as the allocator counts it).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from earthformer_hf import EarthformerConfig, EarthformerForPrediction


IMPLEMENTATIONS = ("sdpa", "eager", "repeated")


def attend_with_repeated_masks(module, query, key, value, attention_mask, **options):
    """Fused attention that does not let a mask per cuboid, (1, cuboids * heads, Q, K), broadcast over the batch."""
    if attention_mask is not None and attention_mask.shape[1] > module.num_heads:
        attention_mask = attention_mask.repeat(query.shape[0], 1, 1, 1)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register("repeated", attend_with_repeated_masks)


def build(recipe: Path, pattern: str | None, batch: int):
    options = yaml.safe_load(recipe.read_text())["model"]
    config = EarthformerConfig(**(options | ({"self_attention_pattern": pattern} if pattern else {})))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = EarthformerForPrediction(config).eval().to(device)
    shape = (batch, config.context_length, *config.image_size, config.num_channels)
    return model, torch.rand(shape, device=device)


def run(model, past_values, train: bool):
    if train:
        model.zero_grad()
        model(past_values).predictions.square().mean().backward()
    else:
        with torch.no_grad():
            model(past_values)
    if past_values.is_cuda:
        torch.cuda.synchronize()


def resident(field: str) -> float:
    """Resident memory of this process in MiB, now (VmRSS) or at its highest (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return float(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 2**10


def peak_memory(model, past_values, train: bool) -> float:
    """MiB above what is in use before the run."""
    if past_values.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(model, past_values, train)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    before = resident("VmRSS")
    run(model, past_values, train)
    return resident("VmHWM") - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("examples/configs/earthformer_sevir.yaml"))
    parser.add_argument("--pattern", help="self-attention pattern instead of the recipe's, such as video_swin_2x8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward only")
    parser.add_argument("--memory", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, past_values = build(arguments.recipe, arguments.pattern, arguments.batch)
    if arguments.memory:
        model.set_attn_implementation(arguments.memory)
        print(peak_memory(model, past_values, arguments.train))
        return

    passes = "forward and backward" if arguments.train else "forward"
    pattern = model.config.self_attention_pattern
    print(
        f"{arguments.recipe.stem}, {pattern}, batch {arguments.batch}, {passes}, {past_values.device.type}", flush=True
    )
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for repeat in range(arguments.repeats + 1):
        for name in IMPLEMENTATIONS:
            model.set_attn_implementation(name)
            start = time.perf_counter()
            run(model, past_values, arguments.train)
            if repeat > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    print(f"{'':10s}{'time':>12s}{'sdpa / it':>12s}{'memory':>14s}{'sdpa / it':>12s}")
    fused_time, fused_memory = statistics.median(seconds["sdpa"]), 0.0
    for name in IMPLEMENTATIONS:
        command = [sys.executable, *sys.argv, "--memory", name]
        # Else glibc keeps freed blocks of ever larger size, and the peak shows what it keeps.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        memory = float(done.stdout)
        fused_memory = memory if name == "sdpa" else fused_memory
        median = statistics.median(seconds[name])
        print(
            f"{name:10s}{median:10.2f} s{fused_time / median:12.2f}{memory:10.0f} MiB{fused_memory / memory:12.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
