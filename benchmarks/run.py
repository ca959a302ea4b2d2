"""Networks of this package against a plain path of the same weights, side by side in one process.

    python benchmarks/run.py                                                  # all cases, half an hour on two cores
    python benchmarks/run.py --cases sevir-forward-fp32 --turns 3 --output results.json
    python benchmarks/run.py --cases unet-step-fp32 --memory

The plain path computes as the originals do, step by step: upsampling and each convolution for itself, attention with
all weights written out and masks repeated for every sample, residual blocks over time that return a strided view,
leaky ReLU into new memory. Both take turns; the first turn warms up. A ratio is ours over plain of one turn; of CPU
seconds (all threads) and of ratios, also those of wall time, the median over the turns and the range are printed.
`difference` is the largest difference of the outputs over the largest output, and after a training step that of the
gradients by their L2 norm. With `--memory`, each path also runs once in a process of its own: the peak above what the
loaded model needs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
import transformers
import yaml
from attention import resident
from torch import nn

from earthformer_hf import EarthformerConfig, EarthformerForPrediction, EarthformerUNetModel, cuboid, stem_earthformer
from earthformer_hf.cuboid import in_half_precision
from earthformer_hf.folding import plain_upsample_conv
from earthformer_hf.unet_earthformer import TimeResidualBlock


RECIPES = Path(__file__).parents[1] / "examples/configs"
PATHS = ("plain", "ours")


# -- the plain path ---------------------------------------------------------------------------------------------------


def plain_attend(layer, query, key, value, mask, attn_implementation):
    """Attention with its weights written out, and the mask repeated for every sample."""
    mask = mask.repeat(query.shape[0] // mask.shape[0], 1, 1, 1)
    dropout = layer.config.attention_dropout if layer.training else 0.0
    return cuboid.eager_attention_forward(layer, query, key, value, mask, layer.scaling, dropout)


def plain_time_block(block, hidden_states, embedding=None):
    """`TimeResidualBlock` of the released setting ("default"), which returns a permuted view."""
    volume = hidden_states.permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
    if not in_half_precision(volume):
        volume = volume.contiguous()
    hidden = block.conv1(F.silu(block.norm1(volume)))
    if block.time_proj is not None and embedding is not None:
        hidden = hidden + block.time_proj(F.silu(embedding))[:, :, None, None, None]
    hidden = block.shortcut(volume) + block.conv2(block.dropout(F.silu(block.norm2(hidden))))
    return hidden.permute(0, 2, 3, 4, 1)


@contextmanager
def plain_path(model: nn.Module):
    """The model computes step by step."""
    activations = [module for module in model.modules() if isinstance(module, nn.LeakyReLU)]
    with ExitStack() as stack:
        for module in (cuboid, stem_earthformer):
            stack.enter_context(patch.object(module, "upsample_conv", plain_upsample_conv))
        stack.enter_context(patch.object(cuboid.CuboidAttentionBase, "attend", plain_attend))
        stack.enter_context(patch.object(TimeResidualBlock, "forward", plain_time_block))
        for activation in activations:
            stack.enter_context(patch.object(activation, "inplace", False))
        yield


# -- cases ------------------------------------------------------------------------------------------------------------


def sevir(**changes) -> tuple[nn.Module, dict]:
    options = yaml.safe_load((RECIPES / "earthformer_sevir.yaml").read_text())["model"]
    config = EarthformerConfig(**(options | changes))
    shape = (1, config.context_length, *config.image_size, config.num_channels)
    return EarthformerForPrediction(config), {"past_values": torch.rand(shape)}


def unet() -> tuple[nn.Module, dict]:
    """Of random weights, also where training starts at zero."""
    options = yaml.safe_load((RECIPES / "prediff_sevir_lr.yaml").read_text())["unet"]
    network = EarthformerUNetModel(**options)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    config = network.config
    lengths = {"sample": config.prediction_length, "context": config.context_length}
    latents = {name: torch.randn(1, n, *config.sample_size, config.in_channels) for name, n in lengths.items()}
    return network, {"timestep": 500, **latents}


@dataclass(frozen=True)
class Case:
    """A network, and what is done with it once."""

    build: Callable[[], tuple[nn.Module, dict]]
    half: bool = False
    training: bool = False

    def run(self, model: nn.Module, inputs: dict) -> torch.Tensor:
        """The output, or after a training step all gradients."""
        device = next(model.parameters()).device.type
        model.zero_grad()
        with torch.set_grad_enabled(self.training), torch.autocast(device, torch.bfloat16, enabled=self.half):
            output = model(**inputs)[0]
        if self.training:
            output.float().square().mean().backward()
            output = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if device == "cuda":
            torch.cuda.synchronize()
        return output.float()


CASES = {
    "sevir-forward-fp32": Case(sevir),
    "sevir-forward-bf16": Case(sevir, half=True),
    "sevir-192-training-step-fp32": Case(
        lambda: sevir(image_size=192, dropout=0.0, attention_dropout=0.0), training=True
    ),
    "unet-step-fp32": Case(unet),
    "unet-step-bf16": Case(unet, half=True),
}


def prepared(case: Case) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = case.build()
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    return model.train(case.training).to(device), inputs


def one_run(case: Case, path: str, model: nn.Module, inputs: dict) -> torch.Tensor:
    with plain_path(model) if path == "plain" else ExitStack():
        return case.run(model, inputs)


# -- measuring --------------------------------------------------------------------------------------------------------


def compare(case: Case, turns: int) -> dict:
    """Seconds of every turn, ratios, and the difference of the results."""
    model, inputs = prepared(case)
    seconds: dict = {path: {"cpu": [], "wall": []} for path in PATHS}
    results = {}
    for turn in range(turns + 1):
        for path in PATHS:
            cpu, wall = time.process_time(), time.perf_counter()
            results[path] = one_run(case, path, model, inputs)
            if turn > 0:
                seconds[path]["cpu"].append(time.process_time() - cpu)
                seconds[path]["wall"].append(time.perf_counter() - wall)
    apart = results["ours"] - results["plain"]
    order = 2 if case.training else float("inf")
    difference = torch.linalg.vector_norm(apart, order) / torch.linalg.vector_norm(results["plain"], order)
    ratios = {
        clock: [ours / plain for ours, plain in zip(seconds["ours"][clock], seconds["plain"][clock])]
        for clock in ("cpu", "wall")
    }
    return {"seconds": seconds, "ratios": ratios, "difference": difference.item()}


def peak_memory(case: Case, path: str) -> float:
    """MiB above what is in use before the run."""
    model, inputs = prepared(case)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one_run(case, path, model, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building the model
    before = resident("VmRSS")
    one_run(case, path, model, inputs)
    return resident("VmHWM") - before


def memory_of_both(name: str) -> dict[str, float]:
    # Else glibc keeps freed blocks of ever larger size, and the peak shows what it keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    memory = {}
    for path in PATHS:
        command = [sys.executable, __file__, "--cases", name, "--peak", path]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        memory[path] = float(done.stdout)
    return memory


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    described = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    flags = described.get("flags", "").split()
    return {
        "processor": described.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16 instructions": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
    }


def spread(values: list[float], digits: int) -> str:
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}-{high})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="also measure the peak, in processes of their own")
    parser.add_argument("--output", type=Path, help="JSON file with every turn, the machine and the versions")
    parser.add_argument("--peak", choices=PATHS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_memory(CASES[arguments.cases[0]], arguments.peak))
        return
    report = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
        "cases": {},
    }
    print(f"{report['machine']}\n{report['versions']}", flush=True)
    columns = f"{'plain, CPU s':>22s}{'ours, CPU s':>22s}{'CPU ratio':>18s}{'wall ratio':>18s}{'difference':>12s}"
    print(f"{'case':30s}{columns}" + f"{'MiB plain, ours':>20s}" * arguments.memory, flush=True)
    for name in arguments.cases:
        result = report["cases"][name] = compare(CASES[name], arguments.turns)
        seconds, ratios = ("".join(f"{spread(x, 2):>{n}s}" for x in values) for n, values in (
            (22, [result["seconds"][path]["cpu"] for path in PATHS]), (18, list(result["ratios"].values()))
        ))  # fmt: skip
        row = f"{name:30s}{seconds}{ratios}{result['difference']:12.1e}"
        if arguments.memory:
            result["peak_memory_mib"] = memory_of_both(name)
            row += "{:>13.0f}, {:.0f}".format(*result["peak_memory_mib"].values())
        print(row, flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
