"""Windows: events cut into past and future, in the model's range.

```
event    |----------------------------- T frames -----------------------------|
window 0 |--- context_length ---|- prediction_length -|
window 1      stride ->|--- context_length ---|- prediction_length -|
```
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset


class Windows(Dataset):
    """All windows of `context_length + prediction_length` frames of a list of events.

    Args:
        events: dicts with `id` and `values` (T, H, W), in stored units.
        encode: from stored values to the model's range and a mask: (T, H, W) -> float32 (T, H, W), bool (T, H, W),
            true where observed. Usually `EarthformerFeatureExtractor.encode`.
        context_length, prediction_length: frames of past and future.
        stride: frames between the starts of two windows of an event.
        frame_stride: of the event's frames between two frames of a window: 2 takes every other one.

    Each item is a dict of tensors: `past_values` (T_in, H, W, 1) and `future_values` (T_out, H, W, 1) float32,
    `future_observed_mask` (T_out, H, W, 1) bool. Missing values hold the model's fill value.
    An item whose future was not observed at all is a ValueError: its loss would be undefined.

    Raises:
        ValueError: no event is long enough.
    """

    def __init__(
        self,
        events: Sequence[dict],
        encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        context_length: int,
        prediction_length: int,
        stride: int = 1,
        frame_stride: int = 1,
    ):
        for name, value in (("stride", stride), ("frame_stride", frame_stride)):
            if value < 1:
                raise ValueError(f"Windows: `{name}` must be at least 1, got {value}.")
        self.events, self.encode = events, encode
        self.context_length, self.length = context_length, context_length + prediction_length
        self.frame_stride, span = frame_stride, frame_stride * (self.length - 1) + 1  # of the event's frames
        self.index = [
            (number, start)
            for number, event in enumerate(events)
            for start in range(0, len(event["values"]) - span + 1, stride)
        ]
        if not self.index:
            longest = max((len(event["values"]) for event in events), default=0)
            raise ValueError(f"Windows: `events` must hold {span} frames or more, the longest has {longest}.")

    def __len__(self) -> int:
        return len(self.index)

    def raw(self, item: int) -> np.ndarray:
        """The stored values of a window, (T_in + T_out, H, W)."""
        number, start = self.index[item]
        return self.events[number]["values"][start :: self.frame_stride][: self.length]

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        values, observed = self.encode(self.raw(item))
        if not observed[self.context_length :].any():
            number, start = self.index[item]
            first, last = (start + self.frame_stride * n for n in (self.context_length, self.length - 1))
            raise ValueError(
                f"Windows: nothing was observed in the future of event {self.events[number].get('id')!r}, frames "
                f"{first} to {last}: leave it out, or choose another stride."
            )
        frames, mask = torch.from_numpy(values)[..., None], torch.from_numpy(observed)[..., None]  # (T, H, W, 1)
        return {
            "past_values": frames[: self.context_length],
            "future_values": frames[self.context_length :],
            "future_observed_mask": mask[self.context_length :],
        }


class TrainingWindows(Dataset):
    """Windows in an endless random order, varied at random: item `position` is a function of `seed` alone.

    Each epoch is a permutation of the windows. A run that stops after n items goes on with `range(n, ...)` as its
    sampler and sees what an uninterrupted run would have seen, whatever the number of workers.

    Args:
        windows: what to draw from.
        seed: of order and variation.
        turn: draw flips and quarter turns, one for all frames of a window (PreDiff, appendix); frames must be square.
        gain: multiply the values by a factor drawn from 1 / gain .. gain (log-uniform), at most to `highest`.
        mix: draw cos(a) * window + sin(a) * another window, with an angle `a` from the full circle: for anomalies,
            whose sums and opposites are about as likely.
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
        if turn and any(event["values"].shape[1] != event["values"].shape[2] for event in windows.events):
            raise ValueError("TrainingWindows: `turn` needs square frames.")
        if gain < 1:
            raise ValueError(f"TrainingWindows: `gain` must be at least 1, got {gain}.")
        self.windows, self.seed, self.turn = windows, seed, turn
        self.gain, self.mix, self.highest = gain, mix, highest
        self.teacher_weight = teacher_weight
        self.shares = None if weights is None else weights / weights.sum()
        self.order: tuple[int, np.ndarray] | None = None

    def _item(self, number: int) -> dict[str, torch.Tensor]:
        item = self.windows[number]
        if self.teacher_weight:
            event, start = self.windows.index[number]
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
        item = self._item(int(self.order[1][place]))
        random = np.random.default_rng([self.seed, 1, position])
        turns, flip = int(random.integers(4)), random.integers(2)
        factor = self.gain ** random.uniform(-1, 1)
        if self.mix:
            angle, other = random.uniform(0, 2 * np.pi), self._item(int(random.integers(size)))
            for name in ("past_values", "future_values"):
                item[name] = np.cos(angle) * item[name] + np.sin(angle) * other[name]
            item["future_observed_mask"] = item["future_observed_mask"] & other["future_observed_mask"]
        for name, tensor in item.items():
            if self.turn:
                tensor = torch.rot90(tensor, turns, dims=(1, 2))
                tensor = tensor.flip(2) if flip else tensor
            if tensor.is_floating_point() and factor != 1:
                tensor = (tensor * factor).clamp(max=self.highest)
            item[name] = tensor
        return item


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
    for event in windows.events:
        sampled = event["values"][:, ::4, ::4]
        _, observed = windows.encode(sampled)
        shares.append((observed & (sampled >= threshold)).mean(axis=(1, 2)))
    frames = windows.frame_stride * np.arange(*parts[part])
    return np.array([shares[event][start + frames].mean() for event, start in windows.index]) + floor
