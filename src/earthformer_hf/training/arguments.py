"""What a recipe and the command line may choose: the blocks that several training scripts share."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TrainingArguments:
    """How any model is trained: `training:` of a recipe, and the base of the blocks of PreDiff's stages.

    Raises:
        ValueError: a number that is too small.
    """

    output_dir: str = field(default="runs/model", metadata={"help": "where checkpoints and the best model go"})
    max_steps: int = field(default=1000, metadata={"help": "of the whole training; learning rates follow from it"})
    batch_size: int = field(default=4, metadata={"help": "items of a micro-batch, per process"})
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "items of a step: gradients are accumulated up to it, on however many processes"},
    )
    optimizer: Literal["muon", "adamw"] = field(
        default="muon", metadata={"help": "muon: for weight matrices, with AdamW for the rest; adamw: for all"}
    )
    learning_rate: float = field(default=5e-3, metadata={"help": "the highest one, after the warm-up"})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"help": "of AdamW"})
    position_rate: float = field(
        default=1.0, metadata={"help": "learning rate of position embeddings and biases, relative to the rest"}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "relative to the learning rate"})
    warmup_steps: int = field(default=100, metadata={"help": "steps over which the learning rate rises from 0"})
    min_lr_rate: float = field(default=0.0, metadata={"help": "learning rate at the end, relative to the highest"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "longer gradients are cut to this norm"})
    ema_decay: float | None = field(default=0.99, metadata={"help": "of the averaged weights; null keeps none"})
    mixed_precision: Literal["no", "bf16"] = field(default="no", metadata={"help": "bf16: half precision"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more work"})
    torch_compile: bool = field(default=False, metadata={"help": "compile the attention blocks"})
    num_workers: int = field(default=0, metadata={"help": "processes that read data, per process that trains"})
    eval_every: int = field(default=100, metadata={"help": "steps between evaluations"})
    patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one"}
    )
    save_every: int = field(default=50, metadata={"help": "steps between checkpoints"})
    stop_at: int | None = field(default=None, metadata={"help": "stop before max_steps; the same command goes on"})
    extend: bool = field(
        default=False, metadata={"help": "go on with a run whose max_steps was lower; the card says so"}
    )
    on_nan: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "what happens at a step whose loss or gradients are not finite"}
    )
    report_to: Literal["none", "tensorboard", "trackio"] = field(default="none", metadata={"help": "tracks the run"})
    seed: int = field(default=0, metadata={"help": "of weights, order of the data, dropout and noise"})

    def __post_init__(self):
        _check(
            self,
            at_least_1=(
                "max_steps",
                "batch_size",
                "total_batch_size",
                "eval_every",
                "save_every",
                "stop_at",
                "patience",
            ),
            at_least_0=("learning_rate", "position_rate", "weight_decay", "warmup_steps", "num_workers", "seed"),
            between_0_and_1=("ema_decay", "min_lr_rate"),
            above_0=("max_grad_norm",),
        )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`betas` must be two numbers from 0 to below 1, got {self.betas}.")


@dataclass
class PublishedArguments(TrainingArguments):
    """For models that get a card."""

    push_to_hub: str | None = field(default=None, metadata={"help": "namespace/name to push the best model to"})


@dataclass
class LatentArguments(TrainingArguments):
    """For networks that are trained in the latents of an autoencoder."""

    latents: str = field(default="runs/latents", metadata={"help": "folder of the encoded windows"})
    encoded_windows: int = field(default=4096, metadata={"help": "how many varied windows are encoded, once"})

    def __post_init__(self):
        super().__post_init__()
        _check(self, at_least_1=("encoded_windows",))


@dataclass
class DataArguments:
    """What is trained on: `data:` of a recipe."""

    source: str = field(
        default="",
        metadata={"help": "of earthformer_hf.load_dataset; or a folder of `data prepare`; or its id on the hub"},
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of a source's files; EARTHFORMER_HF_DATA if omitted"}
    )
    train_split: str = field(default="train", metadata={"help": "to train on; `train[:100]` is a part of it"})
    eval_split: str = field(default="val", metadata={"help": "to choose the best weights on"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder for the frames as plain arrays, from which reading is fastest"}
    )
    tile: list[int] | None = field(
        default=None, metadata={"help": "height and width of the tiles that frames are cut into"}
    )
    on_missing: Literal["leave out", "stop"] = field(
        default="leave out", metadata={"help": "what is done with a window of unobserved context or future"}
    )
    options: dict = field(default_factory=dict, metadata={"help": "of the data set, in a recipe only"})
    train_options: dict = field(
        default_factory=dict, metadata={"help": "further ones, for training windows, in a recipe only"}
    )
    turn: bool = field(default=False, metadata={"help": "draw flips and quarter turns"})
    gain: float = field(default=1.0, metadata={"help": "draw a factor for the values from 1/gain .. gain"})
    mix: bool = field(default=False, metadata={"help": "draw sums of two windows, for anomalies"})
    heavy_threshold: float | None = field(
        default=None, metadata={"help": "draw windows by how much of them reaches this stored value"}
    )
    heavy_part: Literal["future", "context"] = field(
        default="future", metadata={"help": "the part of a window that counts for heavy_threshold"}
    )
    teacher_weight: float = field(
        default=0.0, metadata={"help": "fraction of the target that is a linear forecast instead of what followed"}
    )
    frame_stride: int = field(default=1, metadata={"help": "2 takes every other frame"})
    train_stride: int = field(default=1, metadata={"help": "frames between training windows"})
    eval_stride: int = field(default=4, metadata={"help": "frames between validation windows"})

    def __post_init__(self):
        _check(
            self,
            at_least_1=("gain", "frame_stride", "train_stride", "eval_stride"),
            between_0_and_1=("teacher_weight",),
        )
        if self.tile is not None and (len(self.tile) != 2 or min(self.tile) < 1):
            raise ValueError(f"`tile` must be a height and a width of at least 1, got {self.tile}.")


def _check(
    arguments: object,
    at_least_1: tuple[str, ...] = (),
    at_least_0: tuple[str, ...] = (),
    between_0_and_1: tuple[str, ...] = (),
    above_0: tuple[str, ...] = (),
):
    """Refuse numbers out of bounds, also those that are not finite; what is None is left alone."""
    bounds = {
        **{name: ("at least 1", lambda x: 1 <= x < math.inf) for name in at_least_1},
        **{name: ("at least 0", lambda x: 0 <= x < math.inf) for name in at_least_0},
        **{name: ("from 0 to 1", lambda x: 0 <= x <= 1) for name in between_0_and_1},
        **{name: ("above 0", lambda x: 0 < x < math.inf) for name in above_0},
    }
    for name, (words, holds) in bounds.items():
        value = getattr(arguments, name)
        if value is not None and not holds(value):
            raise ValueError(f"`{name}` must be {words}, got {value}.")


__all__ = ["DataArguments", "LatentArguments", "PublishedArguments", "TrainingArguments"]
