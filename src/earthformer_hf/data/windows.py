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
        augment: draw flips and quarter turns, the same for all frames of a window (PreDiff, section 4.2 of its
            appendix). Frames must be square.

    Each item is a dict of tensors: `past_values` (T_in, H, W, 1) and `future_values` (T_out, H, W, 1) float32,
    `future_observed_mask` (T_out, H, W, 1) bool. Missing values hold the model's fill value.

    Raises:
        ValueError: no event is long enough, or `augment` is asked for on frames that are not square.
    """

    def __init__(
        self,
        events: Sequence[dict],
        encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
        context_length: int,
        prediction_length: int,
        stride: int = 1,
        augment: bool = False,
    ):
        if stride < 1:
            raise ValueError(f"Windows: `stride` must be at least 1, got {stride}.")
        self.events, self.encode, self.augment = events, encode, augment
        self.context_length, self.length = context_length, context_length + prediction_length
        self.index = [
            (number, start)
            for number, event in enumerate(events)
            for start in range(0, len(event["values"]) - self.length + 1, stride)
        ]
        if not self.index:
            longest = max((len(event["values"]) for event in events), default=0)
            raise ValueError(f"Windows: `events` must hold {self.length} frames or more, the longest has {longest}.")
        if augment and any(event["values"].shape[1] != event["values"].shape[2] for event in events):
            raise ValueError("Windows: `augment` turns frames, so they must be square.")

    def __len__(self) -> int:
        return len(self.index)

    def raw(self, item: int) -> np.ndarray:
        """The stored values of a window, (T_in + T_out, H, W)."""
        number, start = self.index[item]
        return self.events[number]["values"][start : start + self.length]

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        values, observed = self.encode(self.raw(item))
        if self.augment:
            turns, flip = torch.randint(4, (2,)).tolist()
            values, observed = (np.rot90(x, turns, axes=(1, 2)) for x in (values, observed))
            if flip % 2:
                values, observed = (x[:, :, ::-1] for x in (values, observed))
        frames = torch.from_numpy(np.ascontiguousarray(values))[..., None]  # (T, H, W, 1)
        mask = torch.from_numpy(np.ascontiguousarray(observed))[..., None]
        return {
            "past_values": frames[: self.context_length],
            "future_values": frames[self.context_length :],
            "future_observed_mask": mask[self.context_length :],
        }
