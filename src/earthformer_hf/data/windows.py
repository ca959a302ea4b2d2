"""Windows: events cut into past and future, in the model's range.

```
event    |----------------------------- T frames -----------------------------|
window 0 |--- context_length ---|- prediction_length -|
window 1      stride ->|--- context_length ---|- prediction_length -|
```
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers.utils import logging

from .events import FIELDS, Events, as_event, check_origin
from .tiles import Tiles


logger = logging.get_logger(__name__)

Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
ON_MISSING = ("leave out", "stop")
REDRAWS = 1000  # of a training window, before giving up
DIGEST_BYTES, DIGEST_EVENTS = 2**28, 512  # at most so much is read for a digest


@dataclass(frozen=True)
class Cutter:
    """How one window is taken from an event; the arguments are those of [`Windows`]."""

    encode: Encode
    context_length: int
    prediction_length: int
    stride: int = 1
    frame_stride: int = 1
    series: tuple[str, ...] = ()
    on_missing: str = "leave out"

    def __post_init__(self):
        if self.on_missing not in ON_MISSING:
            raise ValueError(f"Windows: `on_missing` must be one of {ON_MISSING}, got {self.on_missing!r}.")
        for name in ("context_length", "prediction_length", "stride", "frame_stride"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"Windows: `{name}` must be a whole number of at least 1, got {value!r}.")

    @property
    def length(self) -> int:
        """Frames of a window."""
        return self.context_length + self.prediction_length

    @property
    def span(self) -> int:
        """Frames of the event from a window's first to its last."""
        return self.frame_stride * (self.length - 1) + 1

    def starts(self, length: int) -> range:
        """First frames of the windows of an event of `length` frames."""
        return range(0, length - self.span + 1, self.stride)

    def frames(self, event: dict, start: int, name: str = "values") -> np.ndarray:
        """The stored frames of a window, (T_in + T_out, H, W[, C])."""
        return np.asanyarray(event[name][start : start + self.span : self.frame_stride])

    def item(self, event: dict, start: int) -> dict[str, torch.Tensor]:
        """A window as [`Windows`] gives it."""
        raw = self.frames(event, start)
        if raw.ndim not in (3, 4) or len(raw) != self.length:
            raise ValueError(
                f"Windows: `values` of event {event.get('id')!r} must be (T, H, W) or (T, H, W, C), "
                f"got {self.length} frames from {start} as {raw.shape}."
            )
        values, observed = self.encode(raw)
        if "observed" in event:
            given = self.frames(event, start, "observed")
            observed = observed & (given if given.ndim == observed.ndim else given[..., None])
        empty = _unobserved_part(observed, self.context_length)
        if empty is not None and self.on_missing == "stop":
            ends = (0, self.context_length - 1) if empty == "context" else (self.context_length, self.length - 1)
            first, last = (start + self.frame_stride * n for n in ends)
            raise ValueError(
                f"Windows: nothing was observed in the {empty} of {_describe_event(event)}, frames {first} to {last}: "
                "leave it out (`on_missing`), or choose another stride."
            )
        if empty is not None:
            observed = np.zeros_like(observed)
        frames, mask = (
            torch.from_numpy(x if x.ndim == 4 else x[..., None]) for x in (values, observed)
        )  # (T, H, W, C)
        past = self.context_length
        item = {"past_values": frames[:past], "future_values": frames[past:]}
        item |= {"past_observed_mask": mask[:past], "future_observed_mask": mask[past:]}
        if "covariates" in event:
            covariates = torch.from_numpy(np.array(self.frames(event, start, "covariates")))  # (T, H, W, K)
            item |= {"past_covariates": covariates[:past], "future_covariates": covariates[past:]}
        if "time_features" in event:
            features = self.frames(event, start, "time_features")[:past]  # (T_in, S)
            item["past_time_features"] = torch.from_numpy(features.astype("float32"))
        for name in self.series:
            if name not in event.get("series", {}):
                raise ValueError(
                    f"Windows: `series` of {_describe_event(event)} hold {[*event.get('series', {})]}, not {name!r}."
                )
            numbers = torch.from_numpy(np.asarray(event["series"][name], "float32"))
            numbers = numbers[start : start + self.span : self.frame_stride]  # (T,)
            item |= {f"past_{name}": numbers[:past], f"future_{name}": numbers[past:]}
        return item


def _unobserved_part(observed: np.ndarray, context_length: int) -> str | None:
    """Whether the context or the future of a window holds no observed value: which, or None."""
    if not observed[:context_length].any():
        return "context"
    return None if observed[context_length:].any() else "future"


def counts_for_something(item: dict[str, torch.Tensor]) -> bool:
    """Whether a window has an observed context and an observed future; one that has not is left out."""
    return bool(item["future_observed_mask"].any())


def _describe_event(event: dict) -> str:
    """Words for an event: its id, and where its frames are if they are elsewhere."""
    return getattr(event["values"], "place", f"event {event.get('id')!r}")


class Windows(Dataset):
    """All windows of `context_length + prediction_length` frames of a list or table of events.

    Args:
        events: dicts as `earthformer_hf.data` describes, or a table of them: what `earthformer_hf.load_dataset` or,
            for a hosted one, `datasets.load_dataset` returns.
        encode: from stored values to the model's range and a mask: (T, H, W[, C]) -> float32 and bool of that shape,
            true where observed. Usually `EarthformerFeatureExtractor.encode`.
        context_length, prediction_length: frames of past and future.
        stride: frames between the starts of two windows of an event.
        frame_stride: of the event's frames between two frames of a window: 2 takes every other one.
        series: names of the events' series to give as well.
        on_missing: what is done with a window whose context or future was not observed at all: "leave out" makes its
            whole mask false, so that it counts for nothing in losses and scores ([`TrainingWindows`] draws another,
            a stream has none), and says how many there were; "stop" is a ValueError that names it.

    Each item is a dict of tensors: `past_values` (T_in, H, W, C) and `future_values` (T_out, H, W, C) float32,
    `past_observed_mask` and `future_observed_mask` bool, of the same shapes; missing values hold the model's fill
    value. With covariates also
    `past_covariates` (T_in, H, W, K) and `future_covariates` (T_out, H, W, K), with a series `past_<name>` (T_in,) and
    `future_<name>` (T_out,), with `time_features` (T, S) of the events `past_time_features` (T_in, S).

    Raises:
        ValueError: no event is long enough, or another `on_missing`. A shorter event beside longer ones has no window,
            and a warning names it.
    """

    def __init__(
        self,
        events: Sequence[dict] | datasets.Dataset,
        encode: Encode,
        context_length: int,
        prediction_length: int,
        stride: int = 1,
        frame_stride: int = 1,
        series: Sequence[str] = (),
        on_missing: str = "leave out",
    ):
        self.events = Events(events) if isinstance(events, datasets.Dataset) else events
        self.cutter = Cutter(
            encode, context_length, prediction_length, stride, frame_stride, _names(series), on_missing
        )
        self.left_out: set[int] = set()  # windows found so far to be without observed context or future
        self.encode, self.context_length, self.length = encode, context_length, self.cutter.length
        self.frame_stride = frame_stride
        if isinstance(self.events, Events | Tiles):
            lengths = self.events.lengths
        else:
            lengths = [len(event["values"]) for event in self.events]
        counts = [len(self.cutter.starts(length)) for length in lengths]
        event_index = np.repeat(np.arange(len(counts)), counts)
        place = (
            np.arange(len(event_index)) - np.repeat(np.cumsum([0, *counts[:-1]]), counts) if counts else event_index
        )
        self.index = np.stack([event_index, place * stride], axis=1)  # event and first frame of each window
        if not len(self.index):
            longest = max(lengths, default=0)
            raise ValueError(
                f"Windows: `events` must hold {self.cutter.span} frames or more, the longest has {longest}."
            )
        short = np.flatnonzero(np.array(counts) == 0).tolist()
        if short:
            known = self.events.table["id"] if isinstance(self.events, Events) else [e.get("id") for e in self.events]
            logger.warning(
                f"{len(short)} of {len(counts)} events are shorter than a window of {self.cutter.span} frames and "
                f"left out, such as {known[short[0]]!r} with {lengths[short[0]]}."
            )

    def __len__(self) -> int:
        return len(self.index)

    @property
    def digest(self) -> str:
        """SHA-256 of the starts of all windows, and of the names, times and values of the events.

        Of data larger than `DIGEST_BYTES`, and of more than `DIGEST_EVENTS` events, a part, spread evenly.
        """
        digest = hashlib.sha256(np.ascontiguousarray(self.index).tobytes())
        digest.update(f"{self.context_length} {self.length} {self.frame_stride} {len(self.events)}".encode())
        chosen = np.unique(np.linspace(0, len(self.events) - 1, DIGEST_EVENTS).round().astype(int)).tolist()
        for event in (self.events[index] for index in chosen):
            values = event["values"]
            size = math.prod(values.shape) * values.dtype.itemsize * len(chosen)
            digest.update(f"{event.get('id')} {values.shape} {np.asarray(event.get('time', ())).tolist()}".encode())
            try:
                digest.update(np.ascontiguousarray(values[:: math.ceil(size / DIGEST_BYTES)]).tobytes())
            except ValueError as reason:  # a damaged part of a file, which its windows name when they are read
                digest.update(str(reason).encode())
        return digest.hexdigest()

    def raw(self, item: int) -> np.ndarray:
        """The stored values of a window, (T_in + T_out, H, W[, C])."""
        event_index, start = self.index[item].tolist()
        return self.cutter.frames(self.events[event_index], start)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        event_index, start = self.index[item].tolist()
        window = self.cutter.item(self.events[event_index], start)
        if not counts_for_something(window) and item not in self.left_out:
            self.left_out.add(item)
            count = len(self.left_out)
            if count == 10 ** (len(str(count)) - 1):  # 1, 10, 100, ...
                logger.warning(
                    f"{count} of {len(self)} windows so far have no observed context or future and count for nothing, "
                    f"such as {_describe_event(self.events[event_index])} from frame {start}."
                )
        return window


def windows(events: Any, encode: Encode, context_length: int, prediction_length: int, **options: Any) -> Any:
    """Past and future from events: [`Windows`] of a list or table, and their stream of a streamed table.

    Args:
        events: a list of events, a `datasets.Dataset` or a `datasets.IterableDataset` of them.
        encode, context_length, prediction_length, options: as for [`Windows`].

    Returns:
        [`Windows`]; or, of an `IterableDataset`, another one whose examples are the items of [`Windows`]. It is
        sharded over processes and workers, shuffled and resumed as `datasets` does it.
    """
    if isinstance(events, dict):
        raise ValueError(f"windows: `events` must be of one split, got a dict of {sorted(events)}.")
    if not isinstance(events, datasets.IterableDataset):
        return Windows(events, encode, context_length, prediction_length, **options)
    check_origin(events)
    options["series"] = _names(options.get("series", ()))
    cutter = Cutter(encode, context_length, prediction_length, **options)
    columns = events.column_names or list(FIELDS)
    return events.map(partial(_cut, cutter), batched=True, batch_size=1, remove_columns=columns)


def _names(series: Sequence[str]) -> tuple[str, ...]:
    if isinstance(series, str):
        raise ValueError(f"Windows: `series` must be a list of names, got {series!r}.")
    return tuple(series)


def _cut(cutter: Cutter, batch: dict[str, list]) -> dict[str, list]:
    """A batch of one event -> the batch of its windows."""
    event = as_event({name: column[0] for name, column in batch.items()})
    found = [cutter.item(event, start) for start in cutter.starts(len(event["values"]))]
    items = [item for item in found if counts_for_something(item)]
    if len(items) < len(found):
        without = f"{len(found) - len(items)} of {len(found)} windows of {_describe_event(event)}"
        logger.warning(f"{without} have no observed context or future: left out.")
    elif not items:
        held = f"{_describe_event(event)} holds {len(event['values'])} frames"
        logger.warning(f"{held}, a window needs {cutter.span}: left out.")
    return {name: [item[name] for item in items] for name in (items[0] if items else ("past_values",))}


class TrainingWindows(Dataset):
    """Windows in an endless random order, varied at random: item `position` is a function of `seed` alone.

    Each epoch is a permutation of the windows; in the place of one without observed context or future, another is
    drawn. A run that stops after n items goes on with `range(n, ...)` as its sampler and sees what an uninterrupted
    run would have seen, whatever the number of workers.

    Args:
        windows: what to draw from.
        seed: of order and variation.
        turn: draw flips and quarter turns, one for all frames of a window (PreDiff, appendix); frames must be square.
        gain: multiply the values by a factor drawn from 1 / gain .. gain (log-uniform), at most to `highest`.
        mix: draw cos(a) * window + sin(a) * another window, with an angle `a` from the full circle: for anomalies,
            whose sums and opposites are about as likely. Not with time features, which are those of one window.
        highest: the largest value of the model's range.
        teacher_weight: share of the target taken from the event's `teacher`, an array (windows, T_out, H, W) in stored
            units with what a simpler model forecasts from each start; NaN where it forecasts nothing.
        weights: draw windows in proportion to these, with replacement, instead of permutations; see `heavy_share`.

    Raises:
        ValueError: `turn` is asked for on frames that are not square, or `gain` is below 1.
    """

    def __init__(
        self,
        windows: Windows,
        seed: int,
        turn: bool = False,
        gain: float = 1.0,
        mix: bool = False,
        highest: float = float("inf"),
        teacher_weight: float = 0.0,
        weights: np.ndarray | None = None,
    ):
        if turn:
            _check_square(windows.events[0])
        if gain < 1:
            raise ValueError(f"TrainingWindows: `gain` must be at least 1, got {gain}.")
        if mix and "time_features" in windows.events[0]:
            raise ValueError("TrainingWindows: `mix` must be false with time features: two windows have two seasons.")
        self.windows, self.seed, self.turn = windows, seed, turn
        self.gain, self.mix, self.highest = gain, mix, highest
        self.teacher_weight = teacher_weight
        self.shares = None if weights is None else weights / weights.sum()
        self.order: tuple[int, np.ndarray] | None = None

    @property
    def digest(self) -> str:
        """Of the windows, see [`Windows`]."""
        return self.windows.digest

    def _observed(self, window: int, position: int) -> tuple[int, dict[str, torch.Tensor]]:
        """A window that counts for something: this one, or one drawn in its place."""
        item, random = self.windows[window], None
        for _ in range(REDRAWS):
            if counts_for_something(item):
                return window, item
            random = random or np.random.default_rng([self.seed, 2, position])
            window = int(random.choice(len(self.windows), p=self.shares))
            item = self.windows[window]
        raise ValueError(f"TrainingWindows: none of {REDRAWS} windows drawn has an observed context and future.")

    def _item(self, window: int, position: int) -> dict[str, torch.Tensor]:
        window, item = self._observed(window, position)
        if self.teacher_weight:
            event, start = self.windows.index[window].tolist()
            values, known = self.windows.encode(self.windows.events[event]["teacher"][start])
            mixed = torch.lerp(item["future_values"], torch.from_numpy(values)[..., None], self.teacher_weight)
            item["future_values"] = torch.where(torch.from_numpy(known)[..., None], mixed, item["future_values"])
        return item

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        size = len(self.windows)
        epoch, place = divmod(position, size)
        if self.order is None or self.order[0] != epoch:  # drawn once an epoch
            random = np.random.default_rng([self.seed, 0, epoch])
            drawn = random.permutation(size) if self.shares is None else random.choice(size, size, p=self.shares)
            self.order = epoch, drawn
        item = self._item(int(self.order[1][place]), position)
        random = np.random.default_rng([self.seed, 1, position])
        turns, flip = int(random.integers(4)), random.integers(2)
        factor = self.gain ** random.uniform(-1, 1)
        if self.mix:
            angle, other = random.uniform(0, 2 * np.pi), self._item(int(random.integers(size)), position)
            for part in ("past", "future"):
                values, mask = f"{part}_values", f"{part}_observed_mask"
                item[values] = np.cos(angle) * item[values] + np.sin(angle) * other[values]
                item[mask] = item[mask] & other[mask]
        for name, tensor in item.items():
            if self.turn and tensor.ndim == 4:  # (T, H, W, C)
                tensor = torch.rot90(tensor, turns, dims=(1, 2))
                tensor = tensor.flip(2) if flip else tensor
            if name in ("past_values", "future_values") and factor != 1:
                tensor = (tensor * factor).clamp(max=self.highest)
            item[name] = tensor
        return item


def _check_square(event: dict):
    height, width = event["values"].shape[1:3]
    if height != width:
        raise ValueError(f"TrainingWindows: `turn` needs square frames, got {height} x {width}.")


def heavy_share(windows: Windows, threshold: float, part: str = "future", floor: float = 0.002) -> np.ndarray:
    """The share of each window's frames at or above a threshold in stored units, plus a floor: weights for drawing.

    Heavy rain covers little of a radar map, and windows that hold it teach most; cf. the importance sampling of
    Ravuri et al., "Skilful precipitation nowcasting using deep generative models of radar", Nature 2021, methods.
    Counted on every fourth row and column.

    Args:
        part: "future", or "context" for models of what may happen: choosing windows by what did happen would teach
            them that it happens more often.

    Returns:
        (windows,) float64.

    Raises:
        ValueError: another part.
    """
    parts = {"context": (0, windows.context_length), "future": (windows.context_length, windows.length)}
    if part not in parts:
        raise ValueError(f"heavy_share: `part` must be one of {sorted(parts)}, got {part!r}.")
    shares = []
    for event_index in range(len(windows.events)):
        sampled = windows.events[event_index]["values"][:, ::4, ::4]
        _, observed = windows.encode(sampled)
        shares.append((observed & (sampled >= threshold)).mean(axis=(1, 2)))
    frames = windows.frame_stride * np.arange(*parts[part])
    return np.array([shares[event][start + frames].mean() for event, start in windows.index]) + floor


__all__ = ["Cutter", "TrainingWindows", "Windows", "heavy_share", "windows"]
