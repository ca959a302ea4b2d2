"""What a training step costs with and without half precision, compilation and checkpointing, and how long it waits.

    python benchmarks/training.py                                                          # the tiny radar model
    python benchmarks/training.py --recipe examples/configs/earthformer_sevir.yaml --variants plain --steps 3

Ratios of one run, each variant in a process of its own; the first two steps are left out. Data are synthetic events of
the model's image size in a file that is mapped into memory, 49 frames of uint8 each, as SEVIR's. Memory is what the
training adds to the process (on a GPU, the most that torch held). Waiting is the share of the time that a step spends
until it has its batch.
"""

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import yaml

from earthformer_hf import EarthformerConfig, EarthformerFeatureExtractor, EarthformerForPrediction
from earthformer_hf.data.windows import TrainingWindows, Windows
from earthformer_hf.training import Run, TrainingArguments


VARIANTS = {
    "plain": {},
    "bf16": {"mixed_precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True},
}
FRAMES = 49


def write_events(path: Path, size: tuple[int, int], num_events: int = 8):
    """uint8 (num_events, 49, H, W), mostly zeros."""
    random = np.random.default_rng(0)
    events = np.lib.format.open_memmap(path, "w+", "uint8", (num_events, FRAMES, *size))
    for event in events:
        event[:] = np.where(random.random(event.shape) < 0.74, 0, random.integers(0, 255, event.shape))


def measure(options: dict, config: EarthformerConfig, file: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Samples per second, memory in MB, and the share of time that waits for data."""
    extractor = EarthformerFeatureExtractor(scale=1 / 255)
    events = [{"id": str(n), "values": values} for n, values in enumerate(np.load(file, mmap_mode="r"))]
    windows = Windows(events, extractor.encode, config.context_length, config.prediction_length)
    untimed_steps, last_step = 2, 2 + arguments.steps
    # 4 steps more than are measured, so that workers still read ahead at the last one
    steps = {"max_steps": last_step + 4, "save_every": 10**9, "num_workers": arguments.num_workers}
    with TemporaryDirectory() as folder:
        run = Run(TrainingArguments(folder, batch_size=arguments.batch_size, optimizer="adamw", **steps, **options))
        model = run.prepare(EarthformerForPrediction(config))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        waited, started = 0.0, 0.0
        for micro_batches in run.steps(TrainingWindows(windows, 0)):
            if run.step == untimed_steps:
                waited, started = 0.0, time.perf_counter()
            asked = time.perf_counter()
            batch = next(micro_batches)
            waited += time.perf_counter() - asked
            loss = model(past_values=batch["past_values"], future_values=batch["future_values"]).loss
            run.backward(loss)
            run.update([loss])
            if run.step == last_step:
                break
        seconds = time.perf_counter() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    return {"rate": arguments.steps * arguments.batch_size / seconds, "memory": memory, "waiting": waited / seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("examples/configs/earthformer_radar_tiny.yaml"))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=1)
    arguments = parser.parse_args()
    config = EarthformerConfig(**yaml.safe_load(arguments.recipe.read_text())["model"])
    with TemporaryDirectory() as folder:
        file = Path(folder) / "events.npy"
        write_events(file, config.image_size)
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            results = {
                name: pool.submit(measure, VARIANTS[name], config, str(file), arguments).result()
                for name in arguments.variants
            }
    first = results[arguments.variants[0]]
    print(f"{arguments.recipe.stem}, batches of {arguments.batch_size}, {torch.get_num_threads()} threads")
    for name, result in results.items():
        print(
            f"{name:14} {result['rate']:8.3f} samples/s (x {result['rate'] / first['rate']:.2f})  "
            f"{result['memory']:8.0f} MB (x {result['memory'] / first['memory']:.2f})  "
            f"waiting for data {100 * result['waiting']:.1f} %"
        )


if __name__ == "__main__":
    main()
