"""A tiny training: called by tests, or run as a process of its own, alone or under torchrun, which may kill itself."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from datasets import IterableDataset
from tiny import tiny_config
from torch.utils.data import Dataset
from transformers import HfArgumentParser

from earthformer_hf import EarthformerForPrediction
from earthformer_hf.training import TrainingArguments, mean_over, train


@dataclass
class Options:
    data: str = ""
    dropout: float = 0.1
    stream: bool = False
    kill_step: int | None = None  # the last process kills itself in this step
    kill_event: int | None = None  # the first process kills itself at this access to a checkpoint's folder


def write_items(folder: Path, number: int = 16):
    """Files of 3 + 2 random frames, 12 x 16 pixels."""
    folder.mkdir(exist_ok=True)
    for n in range(number):
        np.save(folder / f"{n:02d}.npy", np.random.default_rng(n).random((5, 12, 16, 1), "float32"))


def read_item(path: Path) -> dict[str, torch.Tensor]:
    frames = torch.from_numpy(np.load(path))
    return {"past_values": frames[:3], "future_values": frames[3:]}


class Items(Dataset):
    """Files in an order that repeats, read when they are asked for."""

    def __init__(self, folder: str | Path):
        self.files = sorted(Path(folder).glob("*.npy"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, position: int):
        return read_item(self.files[position % len(self.files)])


def stream_items(files: list[Path]):
    for file in files:
        yield {name: value.numpy() for name, value in read_item(file).items()}


def kill_at_event(number: int):
    """SIGKILL at the n-th time that Python opens, renames or removes something below `checkpoints`."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "shutil.rmtree") and "checkpoints/" in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def tiny_run(arguments: TrainingArguments, options: Options, **hooks):
    set_seed(arguments.seed)
    shape = {"context_length": 3, "prediction_length": 2, "image_size": (12, 16), "num_global_vectors": 0}
    dropout = {"dropout": options.dropout, "attention_dropout": options.dropout}
    config = tiny_config(hidden_sizes=[8, 16], stem_channels=[4, 8], num_attention_heads=2, **shape, **dropout)
    model = EarthformerForPrediction(config)
    eval_set = Items(options.data)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    train_set: Dataset | IterableDataset = eval_set
    if options.stream:
        train_set = IterableDataset.from_generator(stream_items, gen_kwargs={"files": eval_set.files})
        train_set = train_set.with_format("torch")
    if options.kill_event and rank == 0:
        kill_at_event(options.kill_event)
    calls = 0

    def loss_of(model, batch):
        nonlocal calls
        calls += 1
        if calls == options.kill_step and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return (model(batch["past_values"]).predictions - batch["future_values"]).square().mean()

    def score_of(model, accelerator):
        def total_and_count(batch):
            error = (model(batch["past_values"]).predictions - batch["future_values"]).square()
            return error.sum(), torch.tensor(error.numel())

        return mean_over(eval_set, 4, total_and_count, accelerator)

    def save_best(model):
        model.save_pretrained(arguments.output_dir)

    return train(model, loss_of, train_set, score_of, save_best, arguments, **hooks)


def in_children(call: Callable[[], object], ranks: int = 1) -> list[str]:
    """Run something in forked processes that know each other as torchrun's do; how each of them ended.

    "" for well, "killed", else the message of what it raised. When one ends badly the others are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(ranks):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            message = ""
            try:
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                AcceleratorState._reset_state(reset_partial_state=True)
                call()
            except BaseException as reason:
                message = f"{type(reason).__name__}: {reason}"
            os.write(write, message.encode())
            os._exit(bool(message))
        os.close(write)
        children[child] = rank, read
    ends = [""] * ranks
    while children:
        for child in children:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
        else:
            time.sleep(0.01)
            continue
        rank, read = children.pop(child)
        with open(read, "rb") as pipe:
            ends[rank] = "killed" if os.WIFSIGNALED(status) else pipe.read().decode()
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
    return ends


if __name__ == "__main__":
    tiny_run(*HfArgumentParser((TrainingArguments, Options)).parse_args_into_dataclasses())
