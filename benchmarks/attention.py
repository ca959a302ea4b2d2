"""Time and memory of fused attention (sdpa) against plain attention (eager), side by side.

    python benchmarks/attention.py                       # the released SEVIR setting, one forecast at a time
    python benchmarks/attention.py --recipe examples/configs/earthformer_icar_enso.yaml --batch 8

Time: the two take turns in one process, the median counts. Memory: the peak above what the loaded model needs, each
in a process of its own (on a GPU, as the allocator counts it).
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from earthformer_hf import EarthformerConfig, EarthformerForPrediction


KINDS = ("eager", "sdpa")


def build(recipe: Path, batch: int):
    config = EarthformerConfig(**yaml.safe_load(recipe.read_text())["model"])
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


def resident(what: str) -> float:
    """Resident memory of this process in MiB, now (VmRSS) or at its highest (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return float(re.search(rf"{what}:\s+(\d+) kB", status).group(1)) / 2**10


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
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward only")
    parser.add_argument("--memory", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model, past_values = build(arguments.recipe, arguments.batch)
    if arguments.memory:
        model.set_attn_implementation(arguments.memory)
        print(peak_memory(model, past_values, arguments.train))
        return

    what = "forward and backward" if arguments.train else "forward"
    print(f"{arguments.recipe.stem}, batch {arguments.batch}, {what}, {past_values.device.type}", flush=True)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(arguments.repeats + 1):
        for kind in KINDS:
            model.set_attn_implementation(kind)
            start = time.perf_counter()
            run(model, past_values, arguments.train)
            if repeat > 0:  # the first round warms up
                seconds[kind].append(time.perf_counter() - start)
    memory = {}
    for kind in KINDS:
        command = [sys.executable, *sys.argv, "--memory", kind]
        memory[kind] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    eager, sdpa = (statistics.median(seconds[kind]) for kind in KINDS)
    print(f"{'':8s}{'eager':>12s}{'sdpa':>12s}{'sdpa / eager':>15s}")
    print(f"{'time':8s}{eager:10.2f} s{sdpa:10.2f} s{sdpa / eager:15.2f}")
    print(f"{'memory':8s}{memory['eager']:8.0f} MiB{memory['sdpa']:8.0f} MiB{memory['sdpa'] / memory['eager']:15.2f}")


if __name__ == "__main__":
    main()
