"""MovingMNIST: two digits that move straight ahead and bounce off the borders.

Source: Srivastava et al., "Unsupervised Learning of Video Representations using LSTMs", ICML 2015,
https://arxiv.org/abs/1502.04681, and its published test sequences, `mnist_test_seq.npy` (20, 10000, 64, 64) uint8,
which Earthformer splits anew: this is not the usual protocol, which tests on all 10,000. Or drawn anew by the same
rules: whole digits of 28 x 28 start anywhere, move 3.6 pixels a frame in any direction, are set on the border where
they would cross it, and turn round; whole pixels, and the brighter digit counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .events import EventBuilder, EventConfig, Facts
from .frames import LazyFrames
from .guards import open_npy
from .nbody_mnist import changed, read_digits


BODIES, FRAMES, SIZE, DIGIT = 2, 20, 64, 28
SPEED = 0.1  # of the free way, SIZE - DIGIT, a frame
PUBLISHED = 10_000


@dataclass
class MovingMnistConfig(EventConfig):
    """Options of MovingMNIST.

    Args:
        file: the published sequences in `data_dir`.
        digits: file in `data_dir` with handwritten digits, to draw sequences instead of reading `file`; see
            [`~earthformer_hf.data.nbody_mnist.read_digits`]. If it names the split of each digit, a split is drawn
            from its own digits.
        seed: of drawn sequences; one depends on seed, split and its number alone.
        sizes: drawn sequences of train, val and test.
    """

    file: str = "mnist_test_seq.npy"
    digits: str | None = None
    seed: int = 0
    sizes: tuple[int, int, int] = (8_100, 900, 1_000)


class MovingMnist(EventBuilder):
    """Sequences of a split: `values` (20, 64, 64) uint8."""

    NAME = "moving-mnist"
    BUILDER_CONFIG_CLASS = MovingMnistConfig
    FACTS = Facts(
        variable="brightness",
        units="1",
        coding="0..255",
        time_step="1s",
        grid="64 x 64 pixels; a second stands for a frame",
        licence="that of the digits: MNIST is usually given as CC BY-SA 3.0",
        citation="Srivastava et al., Unsupervised Learning of Video Representations using LSTMs, ICML 2015",
        splits="the last 1,000 are test; of the others 900 drawn at random (RandomState(123)) are val (Earthformer)",
        source="https://github.com/tychovdo/MovingMNIST/raw/master/mnist_test_seq.npy.gz, or drawn anew",
        feature_extractor={"scale": 1 / 255, "valid_range": (0, 255)},
    )

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        config = self.config
        time = np.arange(FRAMES).astype("datetime64[s]")
        source: dict[str, Any]
        if config.digits is None:
            path = Path(config.data_dir) / config.file
            if not path.exists():
                raise ValueError(f"`file`: {path} does not exist; give `digits` to draw sequences instead.")
            sequences = open_npy(path)
            if sequences.shape != (FRAMES, PUBLISHED, SIZE, SIZE) or sequences.dtype != np.uint8:
                raise ValueError(
                    f"`file`: {path} must hold uint8 {(FRAMES, PUBLISHED, SIZE, SIZE)}, "
                    f"got {sequences.dtype} {sequences.shape}."
                )
            source, numbers = {"file": str(path)}, published_split(split)
        else:
            digits = str(Path(config.data_dir) / config.digits)
            _digits(digits, split, changed(digits))
            source = {"digits": digits, "seed": config.seed, "split": split}
            numbers = np.arange(config.sizes[self.SPLITS.index(split)])
        for index in numbers:
            yield {
                "id": f"{split}:{index}" if config.digits else f"{index}",
                "time": time,
                "geo": {},
                "reference": source | {"number": int(index)},
            }

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        index = reference["number"]

        def draw(numbers: range) -> np.ndarray:
            if "file" in reference:
                path = reference["file"]
                return np.array(_sequences(path, changed(path))[list(numbers), index])
            path = reference["digits"]
            return drawn(_digits(path, reference["split"], changed(path)), _random(reference))[list(numbers)]

        return {"values": LazyFrames((FRAMES, SIZE, SIZE), "uint8", draw)}


def published_split(split: str) -> np.ndarray:
    """Numbers of a split's sequences in the published file.

    Earthformer splits the first 9,000 with scikit-learn's `train_test_split(test_size=0.1, random_state=123)`, which
    is this permutation: the first tenth is held out.
    """
    mixed = np.random.RandomState(123).permutation(PUBLISHED - 1_000)
    return {"train": mixed[900:], "val": mixed[:900], "test": np.arange(PUBLISHED - 1_000, PUBLISHED)}[split]


def drawn(digits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A sequence of digits (n, 28, 28) that move as the file's do: (20, 64, 64) uint8."""
    chosen = digits[random.integers(len(digits), size=BODIES)]
    place, angle = random.uniform(size=(BODIES, 2)), random.uniform(0, 2 * np.pi, BODIES)
    velocity = SPEED * np.stack([np.sin(angle), np.cos(angle)], axis=-1)  # (bodies, 2), y and x
    frames = np.zeros((FRAMES, SIZE, SIZE), "uint8")
    for frame in frames:
        place = place + velocity
        inside = np.clip(place, 0, 1)
        velocity = np.where(inside == place, velocity, -velocity)
        place = inside
        for digit, (y, x) in zip(chosen, ((SIZE - DIGIT) * place).astype(int)):
            window = frame[y : y + DIGIT, x : x + DIGIT]
            np.maximum(window, digit, out=window)
    return frames


def _random(reference: dict[str, Any]) -> np.random.Generator:
    split = MovingMnist.SPLITS.index(reference["split"])
    return np.random.default_rng([reference["seed"], split, reference["number"]])


@lru_cache(4)
def _sequences(path: str, state: int) -> np.ndarray:
    return open_npy(path)


@lru_cache(4)
def _digits(path: str, split: str, state: int) -> np.ndarray:
    """The digits that a split is drawn from, uint8."""
    digits, splits = read_digits(path)
    digits = digits if splits is None else digits[splits == split]
    if not len(digits) or digits.dtype != np.uint8:
        raise ValueError(
            f"`digits`: {path} must hold uint8 digits of split {split!r}, got {len(digits)} {digits.dtype}."
        )
    return digits


__all__ = ["BODIES", "FRAMES", "MovingMnist", "MovingMnistConfig", "PUBLISHED", "SIZE", "drawn", "published_split"]
