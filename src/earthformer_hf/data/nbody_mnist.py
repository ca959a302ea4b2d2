"""N-body MNIST: three digits that attract each other, drawn as they fall around and bounce off the borders.

Source: Gao et al., "Earthformer", NeurIPS 2022, https://arxiv.org/abs/2207.05833, section 4.1, with the constants of
its published data set `nbody_digits3_len20_size64_r0_train20k`. The law is that of the published code, a pull of
G d / sqrt(d^2 + softening^2), nearly the same at any distance d; the authors' text writes another one. Only numbers
are drawn and stored; frames are rendered when they are asked for.

```
draw (digits, corners, velocities) --motion: 100 raw steps--> every 5th --render: 128 x 128--> bicubic --> 64 x 64
```
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .events import EventBuilder, EventConfig, Facts
from .frames import LazyFrames
from .guards import load_npz, open_npy


BODIES, FRAMES, STEPS = 3, 20, 5  # raw steps from one frame to the next
RAW_SIZE, SIZE = 128, 64
GRAVITY, SOFTENING = 0.05, 10.0
FASTEST = 2.0  # raw pixels a step, along each axis
BORDER = 10.0  # a digit's centre turns back here
INK = 5 / 255  # digits are cropped to brighter pixels
DIGITS = 40_000  # of a file, its first ones, from which all splits draw
BLOCK = 256  # sequences moved at once


@dataclass
class NBodyMnistConfig(EventConfig):
    """Options of N-body MNIST.

    Args:
        digits: file in `data_dir` with handwritten digits, see [`load_digits`].
        seed: of the sequences; a sequence depends on seed, split and its number alone.
        sizes: sequences of train, val and test.
        parameters: folder in `data_dir` with the published `nbody_train.npz`, `nbody_val.npz` and `nbody_test.npz`,
            to use these sequences instead of drawing some; `digits` must then be the published `mnist.npz`.
    """

    digits: str = "mnist_10k.npz"
    seed: int = 0
    sizes: tuple[int, int, int] = (20_000, 1_000, 1_000)
    parameters: str | None = None


class NBodyMnist(EventBuilder):
    """Sequences of a split: `values` (20, 64, 64) float32 in 0..255.

    `series`: `energy` (20,), see [`n_body_energy`], which the motion keeps but for borders and the speed limit;
    `positions` (20, 3, 2) of the digits' upper left corners (x, y) in raw pixels, between which
    the forces act, and `velocities` (20, 3, 2) in raw pixels a step.
    """

    NAME = "nbody-mnist"
    BUILDER_CONFIG_CLASS = NBodyMnistConfig
    FACTS = Facts(
        variable="brightness",
        units="1",
        coding="0..255",
        time_step="1s",
        grid="64 x 64 pixels; a frame is 5 steps of the motion, and a second stands for a frame",
        licence="that of the digits: MNIST is usually given as CC BY-SA 3.0",
        citation="Gao et al., Earthformer, NeurIPS 2022, https://arxiv.org/abs/2207.05833; LeCun et al., MNIST",
        splits="20,000 / 1,000 / 1,000 motions of the same digits (published configuration of the data set)",
        source="https://earthformer.s3.amazonaws.com/nbody/nbody_paper.zip, or drawn anew",
        feature_extractor={"scale": 1 / 255, "valid_range": (0, 255)},
    )

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        config = self.config
        folder = Path(config.data_dir)
        source = {"digits": str(folder / config.digits), "seed": config.seed, "split": split, "parameters": None}
        available = len(load_digits(source["digits"])[0])
        if config.parameters is None:
            count = config.sizes[self.SPLITS.index(split)]
        else:
            source["parameters"] = str(folder / config.parameters / f"nbody_{split}.npz")
            drawn = _published(source["parameters"], changed(source["parameters"]))
            count = len(drawn["digit_indices"])
            if drawn["digit_indices"].max() >= available:
                raise ValueError(
                    f"`digits`: {source['parameters']} draws digit {drawn['digit_indices'].max()}, "
                    f"{source['digits']} holds {available}."
                )
        time = np.arange(FRAMES).astype("datetime64[s]")
        for index in range(count):
            yield {"id": f"{split}:{index}", "time": time, "geo": {}, "reference": source | {"index": index}}

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        block, place = divmod(reference["index"], BLOCK)
        source = tuple(reference[name] for name in ("digits", "seed", "split", "parameters"))
        state = changed(reference["digits"]), changed(reference["parameters"])
        indices, positions, velocities, energy = (part[place] for part in _moved(*source, block, state))
        crops, _ = load_digits(reference["digits"])

        def draw(numbers: range) -> np.ndarray:
            return render(crops[indices], positions[list(numbers)])

        return {
            "values": LazyFrames((FRAMES, SIZE, SIZE), "float32", draw),
            "series": {"energy": energy, "positions": positions, "velocities": velocities},
        }


def changed(path: str | None) -> int:
    """When a file was changed: what is kept in memory of it holds for that time."""
    return os.stat(path).st_mtime_ns if path and os.path.exists(path) else 0


def load_digits(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a file: each cropped to its ink, (n, 28, 28) float32 in 0..255 in the upper left corner of zeros;
    and their widths and heights (n, 2).

    Args:
        path: of an array (n, 28, 28) in a `.npy` file, or as `images` or `X` (the published `mnist.npz`) in an `.npz`.

    Raises:
        ValueError: a missing file, another shape, or values that are not in 0..255.
    """
    return _cropped(path, changed(path))


@lru_cache(4)
def _cropped(path: str, state: int) -> tuple[np.ndarray, np.ndarray]:
    digits, _ = read_digits(path)
    crops, sizes = np.zeros(digits.shape, "float32"), np.empty((len(digits), 2), "float32")
    for index, digit in enumerate(digits):
        ink = digit > INK
        crop = digit[np.ix_(ink.any(1), ink.any(0))]
        crops[index, : crop.shape[0], : crop.shape[1]] = crop
        sizes[index] = crop.shape[::-1]
    return crops, sizes


def read_digits(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The digits (n, 28, 28) of a file as they are stored, and the split (n,) of each if it names them."""
    if path.endswith(".npy"):
        digits, split = np.array(open_npy(path)), None
    else:
        arrays = load_npz(path)
        name = "images" if "images" in arrays else "X"
        if name not in arrays:
            raise ValueError(f"`digits`: {path} must hold `images` or `X`, found {sorted(arrays)}.")
        digits, split = arrays[name][:50_000], arrays.get("split")
    if digits.size != len(digits) * 28 * 28 or digits.dtype.kind not in "uif":
        raise ValueError(f"`digits`: {path} must hold numbers (n, 28, 28), got {digits.dtype} {digits.shape}.")
    if not (digits.min() >= 0 and 1 < digits.max() <= 255):
        raise ValueError(f"`digits`: {path} must hold 0..255, got {digits.min()}..{digits.max()}.")
    return digits.reshape(-1, 28, 28), split


@lru_cache(128)
def _moved(
    path: str, seed: int, split: str, parameters: str | None, block: int, state: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """Digits (n, 3), positions and velocities (n, 20, 3, 2), and energy (n, 20) of a block of sequences."""
    _, sizes = load_digits(path)
    chosen = range(block * BLOCK, (block + 1) * BLOCK)
    if parameters is None:
        indices, places, angles, speeds = _random_motions(seed, split, chosen, min(DIGITS, len(sizes)))
    else:
        drawn = _published(parameters, state[1])
        names = ("digit_indices", "affine_transforms_multipliers", "init_velocity_angle", "init_velocity_magnitude")
        indices, places, angles, speeds = (drawn[name][chosen.start : chosen.stop] for name in names)
    positions, velocities = motion(
        places * (RAW_SIZE - sizes[indices]),
        np.stack([speeds * np.cos(angles), speeds * np.sin(angles)], axis=-1),
        sizes[indices],
    )
    positions, velocities = positions.swapaxes(0, 1), velocities.swapaxes(0, 1)
    energy = n_body_energy(torch.from_numpy(positions), torch.from_numpy(velocities), GRAVITY, SOFTENING)
    return indices, positions, velocities, energy.numpy()


def _random_motions(seed: int, split: str, numbers: range, digits: int) -> list[np.ndarray]:
    """Digits (n, 3), places (n, 3, 2) in 0..1, angles (n, 3), and speeds (n, 3) of sequences, each from its number."""
    drawn = []
    for sequence in numbers:
        random = np.random.default_rng([seed, NBodyMnist.SPLITS.index(split), sequence])
        drawn.append(
            (
                random.integers(digits, size=BODIES),
                random.uniform(size=(BODIES, 2)),
                random.uniform(0, 2 * np.pi, BODIES),
                random.uniform(0, FASTEST, BODIES),
            )
        )
    return [np.stack(part) for part in zip(*drawn)]


@lru_cache(4)
def _published(path: str, state: int) -> dict[str, np.ndarray]:
    """The drawn numbers of a published file.

    Raises:
        ValueError: a missing file or array, or a setting other than the published one.
    """
    import yaml

    unchanging: dict[str, int] = {
        "appearance_mult": 1,
        "scale_variation": 1,
        "base_rotation_angle": 0,
        "random_acceleration_magnitude": 0,
    }
    shapes = {
        "digit_indices": (BODIES,),
        "affine_transforms_multipliers": (BODIES, 2),
        "init_velocity_angle": (BODIES,),
        "init_velocity_magnitude": (BODIES,),
        "distractor_seeds": (FRAMES * STEPS, 0, 5),
    }
    drawn = load_npz(path, [*unchanging, *shapes])
    for name, expected_value in unchanging.items():
        if (drawn[name] != expected_value).any():
            raise ValueError(f"`parameters`: {name!r} of {path} must be {expected_value}, as published.")
    for name, shape in shapes.items():
        expected = (len(drawn["digit_indices"]), *shape)
        if drawn[name].shape != expected:
            raise ValueError(f"`parameters`: {name!r} of {path} must be {expected}, got {drawn[name].shape}.")
    settings = Path(path).with_name("nbody_dataset_cfg.yaml")
    published: dict[str, Any] = {
        "nbody_acc_mode": "r0",
        "nbody_G": GRAVITY,
        "nbody_softening_distance": SOFTENING,
        "nbody_mass": None,
        "max_velocity_scale": FASTEST,
        "img_size": SIZE,
        "raw_img_size": RAW_SIZE,
        "raw_seq_len_multiplier": STEPS,
    }
    configured: dict[str, Any] = (yaml.safe_load(settings.read_text()) if settings.exists() else None) or {}
    configured = configured.get("dataset", configured)
    for name, value in published.items():
        if configured.get(name, value) != value:
            raise ValueError(f"`parameters`: {name} of {settings} must be {value}, got {configured[name]}.")
    return drawn


def motion(
    position: np.ndarray, velocity: np.ndarray, size: np.ndarray, frames: int = FRAMES, steps: int = STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's motion of digits, in single precision as published: semi-implicit Euler, all sequences at once.

    A step: the velocity takes the pull of the others and is cut to the speed limit; the corner takes the velocity; a
    centre beyond the border is put on it, and that component of the velocity turns round.

    Args:
        position: upper left corners (..., bodies, 2), x and y in raw pixels.
        velocity: (..., bodies, 2) in raw pixels a step.
        size: widths and heights (..., bodies, 2).
        frames: how many to return, the first is the start.
        steps: from one to the next.

    Returns:
        Positions and velocities, (frames, ..., bodies, 2) float32.
    """
    position, velocity, half = (np.asarray(x, "float32") for x in (position, velocity, size / 2))
    kept = np.empty((2, frames, *position.shape), "float32")
    for frame in range(frames):
        kept[:, frame] = position, velocity
        for _ in range(steps if frame < frames - 1 else 0):
            velocity = np.clip((velocity + pull(position)).astype("float32"), -FASTEST, FASTEST)
            position = position + velocity
            centre = position + half
            inside = np.clip(centre, BORDER, RAW_SIZE - BORDER)
            velocity = np.where(inside == centre, velocity, -velocity)
            position = position + (inside - centre)
    return kept[0], kept[1]


def pull(position: np.ndarray) -> np.ndarray:
    """The acceleration of each body towards the others, all masses 1: (..., bodies, 2) -> the same."""
    apart = position[..., None, :, :] - position[..., :, None, :]  # (..., body, other, 2)
    distance = (apart**2).sum(-1, keepdims=True) + np.float32(SOFTENING**2)
    return (np.float32(GRAVITY) * (apart * distance**-0.5)).sum(-2, dtype="float64")


def render(digits: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Frames of digits at their places: the brightest digit counts, half a raw pixel is blended from its neighbours.

    The published frames come from OpenCV 4, which rounds places to 1/32 pixel; so do these. (OpenCV 5 does not.)

    Args:
        digits: (bodies, 28, 28) in 0..255.
        position: upper left corners (T, bodies, 2), x and y in raw pixels.

    Returns:
        (T, 64, 64) float32 in 0..255.
    """
    frames, bodies = position.shape[:2]
    margin = digits.shape[-1] + 1  # digits reach over the borders
    place = np.ceil((np.rint(1024 * position) - 16) / 32)
    corner = (place // 32).astype(int) + margin
    x, y = (place % 32 / 32).astype("float32").transpose(2, 0, 1)[..., None, None]  # (T, bodies, 1, 1) each
    padded = np.pad(digits, ((0, 0), (1, 1), (1, 1)))
    rows = (1 - y) * padded[:, 1:] + y * padded[:, :-1]
    patches = (1 - x) * rows[..., 1:] + x * rows[..., :-1]  # (T, bodies, 29, 29)

    canvas = np.zeros((frames, RAW_SIZE + 2 * margin, RAW_SIZE + 2 * margin), "float32")
    view = np.lib.stride_tricks.sliding_window_view(canvas, patches.shape[2:], (1, 2), writeable=True)
    for body in range(bodies):
        where = np.arange(frames), corner[:, body, 1], corner[:, body, 0]
        view[where] = np.maximum(view[where], patches[:, body])
    raw = torch.from_numpy(canvas[:, None, margin:-margin, margin:-margin])  # (T, 1, 128, 128)
    small = torch.nn.functional.interpolate(raw, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return small[:, 0].clamp(0, 255).numpy()


def n_body_energy(
    positions: torch.Tensor, velocities: torch.Tensor, gravity: float = 0.05, softening: float = 10.0
) -> torch.Tensor:
    """The energy that the digits of N-body MNIST keep, for an alignment network that was trained on it.

    Kinetic energy plus gravity * sqrt(distance^2 + softening^2) of each pair, all masses 1: the potential whose force
    is that of the data set, gravity * d / sqrt(distance^2 + softening^2) towards the other body. (PreDiff, section
    4.1, writes the potential of a force that falls with the distance, which the published data do not have.)

    Args:
        positions, velocities: (..., bodies, 2) in pixels of the raw frame, and per raw frame.
        gravity, softening: the data set's.

    Returns:
        (...). Of the last context frame, it is the `target` of [`KnowledgeAlignmentCallback`].
    """
    distance = (positions[..., :, None, :] - positions[..., None, :, :]).square().sum(-1)  # (..., bodies, bodies)
    pairs = torch.ones_like(distance).triu(1)
    potential = gravity * (distance + softening**2).sqrt() * pairs
    return 0.5 * velocities.square().sum((-1, -2)) + potential.sum((-1, -2))


__all__ = [
    "BODIES",
    "FRAMES",
    "NBodyMnist",
    "NBodyMnistConfig",
    "SIZE",
    "STEPS",
    "changed",
    "load_digits",
    "motion",
    "n_body_energy",
    "pull",
    "read_digits",
    "render",
]
