"""From raw values to the model's range and back, and what the numbers mean."""

import difflib
import inspect
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin


class EarthformerFeatureExtractor(FeatureExtractionMixin):
    r"""
    Turns raw values into the model's range, `(raw - offset) * scale`, and predictions back into raw values.

    Args:
        offset, scale (`float`): of the map above. SEVIR's published range is `scale=1/255`.
        variable, units (`str`): what the raw values are, such as "rain-derived proxy code" and "1".
        time_step (`str`): time between frames, in numpy's notation: "2m" (minutes), "1M" (months).
        grid_spacing (`str`): distance between grid points, such as "3 km" or "5 degrees".
        missing_value (`float`, *optional*): raw value that stands for "not observed". NaN never needs naming.
        fill_value (`float`, *optional*): raw value put where nothing was observed. Without it, missing values are
            refused.
        valid_range (`tuple[float, float]`, *optional*): raw values that exist; predictions are clipped to it.
        thresholds (`list[float]`): raw values at which forecasts are scored.
        protocol (`str`, *optional*): name of the evaluation protocol of `earthformer_hf.evaluation.protocols`.
        physical_units (`str`, *optional*): units of `to_physical`, such as "mm/h".
        physical_table (`list[list[float]]`, *optional*): two rising rows, raw values and the physical values they
            stand for; between them, `to_physical` and `from_physical` interpolate linearly.
        physical_thresholds (`list[float]`): physical values at which forecasts are scored.

    Example:

    ```python
    >>> extractor = EarthformerFeatureExtractor(scale=1 / 255, missing_value=255, fill_value=0)
    >>> inputs = extractor(codes)  # (T, H, W) or (B, T, H, W[, 1]) -> inputs["past_values"] (B, T, H, W, 1)
    >>> codes = extractor.decode(model(**inputs).predictions)
    ```
    """

    model_input_names = ["past_values"]

    def __init__(
        self,
        offset: float = 0.0,
        scale: float = 1.0,
        variable: str = "unknown",
        units: str = "unknown",
        time_step: str = "unknown",
        grid_spacing: str = "unknown",
        missing_value: float | None = None,
        fill_value: float | None = None,
        valid_range: tuple[float, float] | None = None,
        thresholds: tuple[float, ...] = (),
        protocol: str | None = None,
        physical_units: str | None = None,
        physical_table: list[list[float]] | None = None,
        physical_thresholds: tuple[float, ...] = (),
        **kwargs,
    ):
        # A stored file carries `feature_extractor_type` and may come from a newer version: it is not refused.
        unknown = [name for name in kwargs if not name.startswith("_")]
        if unknown and "feature_extractor_type" not in kwargs:
            known = [name for name in inspect.signature(type(self).__init__).parameters if name != "kwargs"]
            close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{type(self).__name__}: unknown argument {unknown[0]!r}; did you mean {close!r}?")
        super().__init__(**kwargs)
        if valid_range is not None and not (len(valid_range) == 2 and valid_range[0] < valid_range[1]):
            raise ValueError(f"`valid_range` must be two rising numbers, got {valid_range}.")
        if not np.isfinite([offset, scale]).all() or scale == 0:
            raise ValueError(f"`scale` and `offset` must be finite and `scale` not 0, got {scale} and {offset}.")
        if fill_value is not None and not np.isfinite(fill_value):
            raise ValueError(f"`fill_value` must be finite, got {fill_value}.")
        if physical_table is not None:
            rows = [np.asarray(row, dtype="float64") for row in physical_table]
            rising = (
                len(rows) == 2 and rows[0].shape == rows[1].shape and all((np.diff(row) > 0).all() for row in rows)
            )
            if not rising:
                raise ValueError("`physical_table` must be two rising rows of equal length: raw and physical values.")
        self.offset, self.scale = offset, scale
        self.variable, self.units = variable, units
        self.time_step, self.grid_spacing = time_step, grid_spacing
        self.missing_value, self.fill_value = missing_value, fill_value
        self.valid_range = None if valid_range is None else list(valid_range)
        self.thresholds, self.protocol = list(thresholds), protocol
        self.physical_units, self.physical_table = physical_units, physical_table
        self.physical_thresholds = list(physical_thresholds)

    @wraps(FeatureExtractionMixin.push_to_hub, assigned=())
    def push_to_hub(self, repo_id: str, **options):  # type: ignore[override]
        """As [`~transformers.FeatureExtractionMixin.push_to_hub`], but with its code, and its card first.

        Args:
            card, tag: as for [`earthformer_hf.sharing.push`].
        """
        if find_spec(f"{__package__}.sharing") is None:  # this file was downloaded with a model
            return super().push_to_hub(repo_id, **options)
        return import_module(f"{__package__}.sharing").push(self, repo_id, **options)

    def observed(self, raw: np.ndarray) -> np.ndarray:
        """True where a raw value is finite and not the missing value; same shape."""
        observed = np.isfinite(raw)
        return observed if self.missing_value is None else observed & (raw != self.missing_value)

    def encode(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raw values of any shape -> values in the model's range, float32, and the mask of observed ones.

        Raises:
            ValueError: values are missing and no `fill_value` says what to put there, or are infinite.
        """
        raw = np.asarray(raw)
        if raw.dtype.kind not in "buif":
            raise ValueError(f"`raw` must hold real numbers, got dtype {raw.dtype}.")
        observed = self.observed(raw)
        infinite = np.isinf(raw)
        refused = infinite if self.fill_value is not None else ~observed
        if refused.any():
            first = tuple(int(n) for n in np.argwhere(refused)[0])
            raise ValueError(
                f"`raw` holds {int(refused.sum())} missing or non-finite values of {raw.size}, the first is "
                f"{raw[first]} at {first}; "
                + ("infinite values are never filled." if infinite.any() else "set `fill_value` to fill them.")
            )
        if not observed.all():
            raw = np.where(observed, raw, np.float64(self.fill_value or 0))
        return ((raw.astype("float32") - np.float32(self.offset)) * np.float32(self.scale)), observed

    def decode(self, values: np.ndarray | torch.Tensor) -> np.ndarray:
        """Values in the model's range (any shape) -> raw values, float32, within `valid_range`."""
        if isinstance(values, torch.Tensor):
            values = values.detach().float().cpu().numpy()
        raw = np.asarray(values, dtype="float32") / np.float32(self.scale) + np.float32(self.offset)
        return raw if self.valid_range is None else np.clip(raw, self.valid_range[0], self.valid_range[1])

    def to_physical(self, raw: np.ndarray) -> np.ndarray:
        """Raw values -> physical values by `physical_table`, float32; NaN stays NaN.

        Raises:
            ValueError: this extractor has no table.
        """
        codes, physical = self._table()
        return np.interp(raw, codes, physical).astype("float32")

    def from_physical(self, physical: np.ndarray) -> np.ndarray:
        """Physical values -> raw values, float32: the inverse of `to_physical` within the table."""
        codes, values = self._table()
        return np.interp(physical, values, codes).astype("float32")

    def _table(self):
        if self.physical_table is None:
            raise ValueError("`physical_table` is not set: this extractor knows no physical units.")
        return self.physical_table

    def __call__(self, raw: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """Raw frames -> `past_values` (B, T, H, W, C) float32, ready for the model.

        Args:
            raw: context frames (T, H, W), (B, T, H, W) or (B, T, H, W, C), or a list of B items (T, H, W[, C]).
            return_tensors: "pt" for torch tensors, "np" for numpy arrays.

        Raises:
            ValueError: another rank or an empty batch; missing values that are not to be filled.
        """
        if isinstance(raw, (list, tuple)):
            raw = np.stack([np.asarray(item) for item in raw]) if len(raw) else np.empty((0,))
        raw = np.asarray(raw.detach().cpu() if isinstance(raw, torch.Tensor) else raw)
        shape = raw.shape
        if raw.ndim == 3:
            raw = raw[None]
        if raw.ndim == 4:
            raw = raw[..., None]
        if raw.ndim != 5 or 0 in raw.shape:
            raise ValueError(
                f"`raw` must have shape (time, height, width), (batch, time, height, width) or "
                f"(batch, time, height, width, channels) and not be empty, got {shape}."
            )
        values, _ = self.encode(raw)
        return BatchFeature({"past_values": values}, tensor_type=return_tensors)


__all__ = ["EarthformerFeatureExtractor"]
