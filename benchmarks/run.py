"""Networks of this package against a plain path of the same weights, side by side in one process.

    python benchmarks/run.py                                                  # all cases, an hour on two cores
    python benchmarks/run.py --cases sevir-forward-fp32 --turns 3 --output results.json
    python benchmarks/run.py --cases unet-step-fp32 --memory
    python benchmarks/run.py --growth --output results.json                   # and growth.png beside it, ten minutes
    python benchmarks/run.py --forecast radar-small                           # 8 members, as shipped
    python benchmarks/run.py --forecast sevir-lr --members 2 --measured_steps 3 --turns 2     # the published size

The plain path computes as the originals do, step by step: upsampling and each convolution for itself, attention with
all weights written out and masks repeated for every sample, residual blocks over time in contiguous channels that
return a strided view, leaky ReLU into new memory. Both take turns; the first turn warms up. A ratio is ours over plain
of one turn; of CPU seconds (all threads) and of ratios, also those of wall time, the median over the turns and the
range are printed. `difference` is the largest difference of the outputs over the largest output, and after a training
step that of the gradients by their L2 norm. With `--memory`, each path also runs once in a process of its own: the
peak above what the loaded model needs. Rows are those of a table in Markdown.

A forecast has 1000 steps of the plain path, or the default 10. A few of each are measured and multiplied.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
import transformers
import yaml
from diffusers import AutoencoderKL
from torch import nn

from earthformer_hf import (
    EarthformerConfig,
    EarthformerForPrediction,
    EarthformerUNetModel,
    PreDiffPipeline,
    cuboid,
    stem_earthformer,
)
from earthformer_hf.cuboid import in_half_precision
from earthformer_hf.folding import plain_upsample_conv
from earthformer_hf.unet_earthformer import TimeResidualBlock


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples/configs"
PATHS = ("plain", "ours")
STEPS = {"plain": 1000, "ours": 10}  # of a forecast


# -- the plain path ---------------------------------------------------------------------------------------------------


def plain_attend(layer, query, key, value, mask, attn_implementation):
    """Attention with its weights written out, and the mask repeated for every sample."""
    mask = mask.repeat(query.shape[0] // mask.shape[0], 1, 1, 1)
    dropout = layer.config.attention_dropout if layer.training else 0.0
    return cuboid.eager_attention_forward(layer, query, key, value, mask, layer.scaling, dropout)


def plain_time_block(block, hidden_states, embedding=None):
    """`TimeResidualBlock` in contiguous channels, which returns a permuted view."""
    volume = hidden_states.permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
    if not in_half_precision(volume):
        volume = volume.contiguous()
    hidden = block.conv1(F.silu(block.norm1(volume)))
    if block.time_proj is None or embedding is None:
        hidden = block.norm2(hidden)
    else:
        added = block.time_proj(F.silu(embedding))[:, :, None, None, None]
        if block.scale_shift:
            scale, shift = added.chunk(2, dim=1)
            hidden = block.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = block.norm2(hidden + added)
    hidden = block.shortcut(volume) + block.conv2(block.dropout(F.silu(hidden)))
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


def recipe(name: str) -> dict:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def earthformer(name: str, batch: int = 1, **changes) -> tuple[nn.Module, dict]:
    config = EarthformerConfig(**(recipe(name)["model"] | changes))
    shape = (batch, config.context_length, *config.image_size, config.num_channels)
    return EarthformerForPrediction(config), {"past_values": torch.rand(shape)}


def unet(batch: int = 1, **changes) -> tuple[nn.Module, dict]:
    """Of random weights, also where training starts at zero."""
    network = EarthformerUNetModel(**(recipe("prediff_sevir_lr")["unet"] | changes))
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    config = network.config
    lengths = {"sample": config.prediction_length, "context": config.context_length}
    latents = {name: torch.randn(batch, n, *config.sample_size, config.in_channels) for name, n in lengths.items()}
    return network, {"timestep": 500, **latents}


@dataclass(frozen=True)
class Case:
    """A network, and what is done with it once."""

    build: Callable[[], tuple[nn.Module, dict]]
    half: bool = False
    training: bool = False
    checkpointing: bool = False  # ours; the plain path keeps all activations

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


def network(*arguments, **changes) -> Callable:
    return partial(earthformer, *arguments, **changes)


NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
SEVIR, ENSO = "earthformer_sevir", "earthformer_icar_enso"
CASES = {
    "sevir-forward-fp32": Case(network(SEVIR)),
    "sevir-forward-bf16": Case(network(SEVIR), half=True),
    "sevir-192-shifted-cuboids-fp32": Case(
        network(SEVIR, batch=4, image_size=192, self_attention_pattern="video_swin_2x8")
    ),
    "sevir-192-training-step-fp32": Case(network(SEVIR, image_size=192, **NO_DROPOUT), training=True),
    "sevir-192-training-step-checkpointing-fp32": Case(
        network(SEVIR, image_size=192, **NO_DROPOUT), training=True, checkpointing=True
    ),
    "sevir-training-step-checkpointing-fp32": Case(network(SEVIR, **NO_DROPOUT), training=True, checkpointing=True),
    "enso-forward-fp32": Case(network(ENSO)),
    "enso-training-step-fp32": Case(network(ENSO, batch=4, **NO_DROPOUT), training=True),
    "unet-step-fp32": Case(unet),
    "unet-step-bf16": Case(unet, half=True),
}

# A small denoiser, of the widths of prediff-radar-small.
SMALL = {"block_out_channels": [48, 96], "layers_per_block": 1, "in_channels": 16}
GROWTH = {
    "rows and columns of SEVIR's maps": {n: Case(network(SEVIR, image_size=n)) for n in (96, 192, 384)},
    "frames of context and forecast, 192 x 192": {
        n: Case(network(SEVIR, image_size=192, context_length=n - n // 2, prediction_length=n // 2))
        for n in (12, 25, 50)
    },
    "samples in a batch, 96 x 96": {n: Case(network(SEVIR, batch=n, image_size=96)) for n in (1, 2, 4, 8)},
    "members of an ensemble, one step": {n: Case(partial(unet, batch=n, **SMALL)) for n in (1, 2, 4, 8)},
}
GROWTH_CASES = {f"{what}: {n}": case for what, cases in GROWTH.items() for n, case in cases.items()}


def prepared(case: Case) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = case.build()
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    return model.train(case.training).to(device), inputs


def one_run(case: Case, path: str, model: nn.Module, inputs: dict) -> torch.Tensor:
    if case.checkpointing:
        (model.gradient_checkpointing_enable if path == "ours" else model.gradient_checkpointing_disable)()
    with plain_path(model) if path == "plain" else ExitStack():
        return case.run(model, inputs)


# -- forecasts --------------------------------------------------------------------------------------------------------


def pipeline_of(name: str) -> PreDiffPipeline:
    """prediff-radar-small as shipped, or the published size with random weights."""
    if name == "radar-small":
        pipeline = PreDiffPipeline.from_pretrained(ROOT / "model_cards/prediff-radar-small")
    else:
        options = recipe("prediff_sevir_lr")
        scheduler = getattr(diffusers, options["scheduler"].pop("class"))(**options["scheduler"])
        pipeline = PreDiffPipeline(AutoencoderKL(**options["vae"]), unet()[0].eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def forecast_seconds(pipeline: PreDiffPipeline, path: str, members: int, steps: int) -> dict[str, float]:
    """CPU seconds of a call: of one step, and of all that is done once."""
    config = pipeline.unet.config
    side = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    shape = (1, config.context_length, *(side * n for n in config.sample_size), pipeline.vae.config.in_channels)
    clock: list[float] = []

    def note(*arguments) -> dict:
        clock.append(time.process_time())
        return {}

    networks = nn.ModuleList(x for x in pipeline.components.values() if isinstance(x, nn.Module))
    with plain_path(networks) if path == "plain" else ExitStack():
        start = time.process_time()
        pipeline(torch.zeros(shape), members, steps, torch.Generator().manual_seed(0), callback_on_step_end=note)
        whole = time.process_time() - start
    step = (clock[-1] - clock[0]) / (steps - 1)
    return {"step": step, "rest": whole - steps * step}


def compare_forecasts(name: str, turns: int, members: int, measured: int) -> dict:
    """How many times faster `members` come with `STEPS` of ours than with those of the plain path."""
    pipeline = pipeline_of(name)
    seconds: dict = {path: [] for path in PATHS}
    for _ in range(turns):
        for path in PATHS:
            seconds[path].append(forecast_seconds(pipeline, path, members, measured))
    whole = {path: [turn["rest"] + STEPS[path] * turn["step"] for turn in seconds[path]] for path in PATHS}
    ratios = [plain / ours for plain, ours in zip(whole["plain"], whole["ours"])]
    return {"members": members, "measured": measured, "seconds": seconds, "whole": whole, "times as fast": ratios}


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


def resident(field: str) -> float:
    """Resident memory of this process in MiB, now (VmRSS) or at its highest (VmHWM); Linux only."""
    status = Path("/proc/self/status").read_text()
    return float(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 2**10


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


def circumstances() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    described = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    flags = described.get("flags", "").split()
    return {
        "date": date.today().isoformat(),
        "processor": described.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bfloat16 instructions": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, diffusers)},
    }


# -- showing ----------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 2) -> str:
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}-{high})"


HEADER = """| case | plain, CPU s | ours, CPU s | ratio | ratio of wall time | largest difference | MiB plain, ours |
|---|---|---|---|---|---|---|"""


def row(name: str, result: dict) -> str:
    cells = [spread(result["seconds"][path]["cpu"]) for path in PATHS]
    cells += [spread(result["ratios"][clock]) for clock in ("cpu", "wall")]
    memory = ", ".join(f"{mib:.0f}" for mib in result.get("peak_memory_mib", {}).values())
    return "| " + " | ".join([name, *cells, f"{result['difference']:.1e}", memory]) + " |"


def forecast_row(name: str, result: dict) -> str:
    parts = []
    for path in PATHS:
        step, rest = (spread([turn[part] for turn in result["seconds"][path]]) for part in ("step", "rest"))
        whole = spread(result["whole"][path], 0)
        parts.append(f"{path}: a step {step}, the rest {rest}, with {STEPS[path]} steps {whole}")
    times = spread(result["times as fast"], 0)
    measured = f"{result['members']} members, {result['measured']} steps measured"
    return f"{name}, {measured}, CPU s; {'; '.join(parts)}; {times} times as fast"


def draw_growth(cases: dict, file: Path):
    """Seconds above, memory below; a column for each quantity that grows."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator
    from PIL import Image

    figure, axes = plt.subplots(2, len(GROWTH), figsize=(15, 6), sharex="col", layout="constrained")
    for (what, sizes), column in zip(GROWTH.items(), axes.T):
        results = [cases[f"{what}: {n}"] for n in sizes]
        for path, marker in zip(PATHS, "os"):
            seconds = [statistics.median(result["seconds"][path]["cpu"]) for result in results]
            memory = [result["peak_memory_mib"][path] for result in results]
            for panel, values in zip(column, (seconds, memory)):
                panel.loglog(list(sizes), values, marker=marker, label=path)
                panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.yaxis.set_major_formatter("{x:g}")
                panel.minorticks_off()
        column[0].set_ylabel("CPU time (s)")
        column[1].set_ylabel("memory above the model (MiB)")
        column[1].set_xlabel(what)
        column[1].set_xticks(list(sizes), [str(n) for n in sizes])
        column[1].minorticks_off()
    axes[0, 0].legend()
    figure.savefig(file, dpi=80)
    Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = CASES | GROWTH_CASES
    parser.add_argument("--cases", nargs="+", choices=every, default=[], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="also measure the peak, in processes of their own")
    parser.add_argument("--growth", action="store_true", help="with pixels, frames, samples and members")
    parser.add_argument("--forecast", choices=["radar-small", "sevir-lr"], help="an ensemble instead of cases")
    parser.add_argument("--members", type=int, default=8, help="of a forecast")
    parser.add_argument("--measured_steps", type=int, default=10, help="of a forecast")
    parser.add_argument("--output", type=Path, help="JSON file, in which other cases stay")
    parser.add_argument("--peak", choices=PATHS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak_memory(every[arguments.cases[0]], arguments.peak))
        return
    diffusers.utils.logging.disable_progress_bar()
    given = arguments.output and arguments.output.exists()
    report = json.loads(arguments.output.read_text()) if given else {}

    def keep(name: str, result: dict):
        report[name] = result | circumstances()
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")

    print(circumstances(), flush=True)
    if arguments.forecast:
        name = f"forecast-{arguments.forecast}"
        keep(name, compare_forecasts(arguments.forecast, arguments.turns, arguments.members, arguments.measured_steps))
        print(forecast_row(name, report[name]))
        return
    print(HEADER, flush=True)
    for name in GROWTH_CASES if arguments.growth else arguments.cases or CASES:
        result = compare(every[name], arguments.turns)
        if arguments.memory or arguments.growth:
            result["peak_memory_mib"] = memory_of_both(name)
        keep(name, result)
        print(row(name, result), flush=True)
    if arguments.growth and arguments.output:
        draw_growth(report, arguments.output.with_name("growth.png"))


if __name__ == "__main__":
    main()
