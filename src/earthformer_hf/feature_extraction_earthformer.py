"""From raw values to the model's range and back, and what the numbers mean."""

import difflib
import inspect
from collections.abc import Sequence
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import logging


logger = logging.get_logger(__name__)

# name -> from raw values above 0 to decibels, and back
TRANSFORMS = {
    "decibel": (lambda raw: 10 * np.log10(raw), lambda decibel: 10 ** (decibel / 10)),
    "reflectivity": (
        lambda raw: 10 * np.log10(200 * raw**1.6),
        lambda decibel: (10 ** (decibel / 10) / 200) ** (1 / 1.6),
    ),
}
# name -> from months (..., T) since January 1970 to time features (..., T, S)
TIME_FEATURES = {"month_of_year": lambda month: _on_circle(month % 12 / 12)}
TRACE = 0.75  # of the positive values, below the lowest code of rain: more are not of codes
DRY, DRY_BELOW = 10**-0.5, 10**-0.25  # parts of `floor`: what stands for "no rain", and where that begins


class EarthformerFeatureExtractor(FeatureExtractionMixin):
    r"""
    Turns raw values into the model's range, `(raw - offset) * scale`, and predictions back into raw values. With a
    `transform`, that map is of the raw value in decibels.

    Args:
        offset, scale (`float`): of the map above. SEVIR's published range is `scale=1/255`.
        transform (`str`, *optional*): "decibel" for 10 log10(raw), or "reflectivity" for 10 log10(200 raw^1.6), the
            dBZ of a rain rate in mm/h (Marshall and Palmer, 1948).
        floor (`float`, *optional*): with a transform, the lowest raw value that is told from 0, such as 0.1 mm/h.
            What is below becomes a value 5 dB below the floor's, as in pysteps (Pulkkinen et al., 2019), and 0 again.
        variable, units (`str`): what the raw values are, such as "rain-derived proxy code" and "1".
        time_step (`str`): time between frames, in numpy's notation: "2m" (minutes), "1M" (months).
        grid_spacing (`str`): distance between grid points, such as "3 km" or "5 degrees".
        missing_value (`float`, *optional*): raw value that stands for "not observed". NaN never needs naming. If it
            lies above `valid_range`, as 255 of codes 0..254, values above it are refused: there are none.
        fill_value (`float`, *optional*): raw value put where nothing was observed. Without it, missing values are
            refused.
        valid_range (`tuple[float, float]`, *optional*): lowest and highest raw value that exist, compared in float32.
            Other values outside it count as not observed; predictions are clipped to it.
        coverage (`list[str]`, *optional*): of a model that learnt of some grid points only, those: a text per row, "1"
            where the training data held values and "0" elsewhere. Values elsewhere count as not observed.
        thresholds (`list[float]`): raw values at which forecasts are scored.
        protocol (`str`, *optional*): name of the evaluation protocol of `earthformer_hf.evaluation.protocols`.
        physical_units (`str`, *optional*): units of `to_physical`, such as "mm/h".
        physical_table (`list[list[float]]`, *optional*): two rising rows, raw values and the physical values they
            stand for; between them, `to_physical` and `from_physical` interpolate linearly. Frames of physical values
            given in place of raw ones are refused where their range tells them: where both rows begin with 0, and more
            than three in four of the positive values lie below the lowest positive raw value of the table.
        physical_thresholds (`list[float]`): physical values at which forecasts are scored.
        time_features (`str`, *optional*): of a model that looks at the season of its frames, what it is told of it:
            "month_of_year", the sine and cosine of the calendar month as an angle, 0 in January.

    Raw and physical values are given as numpy arrays, torch tensors, xarray arrays, or lists of them. What the mask of
    a numpy masked array hides, as netCDF4 reads missing values, was not observed.

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
        transform: str | None = None,
        floor: float | None = None,
        coverage: list[str] | None = None,
        time_features: str | None = None,
        **kwargs,
    ):
        self._refuse_unknown(kwargs)
        super().__init__(**kwargs)
        numbers = {"offset": offset, "scale": scale, "missing_value": missing_value, "fill_value": fill_value}
        for name, value in numbers.items():
            if value is not None and not _is_number(value):
                raise ValueError(f"`{name}` must be a number, got {value!r}.")
        if valid_range is not None and not _are_rising(valid_range):
            raise ValueError(f"`valid_range` must be two rising numbers, got {valid_range!r}.")
        if not np.isfinite([offset, scale]).all() or scale == 0:
            raise ValueError(f"`scale` and `offset` must be finite and `scale` not 0, got {scale} and {offset}.")
        if fill_value is not None and not np.isfinite(fill_value):
            raise ValueError(f"`fill_value` must be finite, got {fill_value}.")
        _check_table(physical_table)
        if transform is not None and transform not in TRANSFORMS:
            raise ValueError(f"`transform` must be one of {sorted(TRANSFORMS)}, got {transform!r}.")
        if (transform is None) != (floor is None) or (floor is not None and not 0 < floor < np.inf):
            raise ValueError(f"`floor` must be above 0 with a `transform`, and None without, got {floor}.")
        if transform is not None and (fill_value or 0) < 0:
            raise ValueError(f"`fill_value` must not be below 0 with a `transform`, got {fill_value}.")
        if transform is not None and valid_range is not None and valid_range[0] > 0:
            raise ValueError(
                f"`valid_range` must hold 0 with a `transform`, which makes it of the dry, got {valid_range}."
            )
        if time_features is not None and time_features not in TIME_FEATURES:
            raise ValueError(f"`time_features` must be one of {sorted(TIME_FEATURES)}, got {time_features!r}.")
        self.time_features = time_features
        self.offset, self.scale, self.transform, self.floor = offset, scale, transform, floor
        self.coverage = _checked_coverage(coverage)
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

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs):
        """As [`~transformers.FeatureExtractionMixin.from_dict`], but also with arguments that the file does not hold.

        Raises:
            ValueError: a keyword without effect that resembles an argument. One that resembles none may be meant for
                another part of the library, as in `pipeline(model_kwargs=...)`: it only warns, or is returned if
                `return_unused_kwargs`.
        """
        names = cls._arguments()
        return_unused = kwargs.pop("return_unused_kwargs", False)
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        result: Any = super().from_dict(feature_extractor_dict | given, return_unused_kwargs=True, **kwargs)
        extractor, unused = result
        for name in unused:
            if close := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
                raise ValueError(f"{cls.__name__}: unknown argument {name!r}; did you mean {close[0]!r}?")
            if not return_unused:
                logger.warning(f"{cls.__name__}: the argument {name!r} has no effect.")
        return (extractor, unused) if return_unused else extractor

    @classmethod
    def _arguments(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "kwargs")]

    def _refuse_unknown(self, kwargs: dict[str, Any]):
        """Typos are refused; a file written by a newer version (it has a `feature_extractor_type`) only warns."""
        # A dict is what a tool of the library stores beside the arguments, such as auto_map.
        of_library = {"feature_extractor_type", "processor_class"}
        unknown = [n for n in kwargs if n[0] != "_" and n not in of_library and not isinstance(kwargs[n], dict)]
        if unknown and "feature_extractor_type" in kwargs:
            logger.warning(f"{type(self).__name__}: unknown entries of a stored file have no effect: {unknown}.")
        elif unknown:
            close = difflib.get_close_matches(unknown[0], self._arguments(), n=1, cutoff=0.0)[0]
            raise ValueError(f"{type(self).__name__}: unknown argument {unknown[0]!r}; did you mean {close!r}?")

    def observed(self, raw: Any) -> np.ndarray:
        """True where a raw value was observed, of the same shape.

        False where it is masked, not finite, the missing value, outside `valid_range`, or not in `coverage`.

        Raises:
            ValueError: the raw values are not on the grid of `coverage`.
        """
        raw = _as_array(raw)
        observed = np.isfinite(raw)
        if self.missing_value is not None:
            observed &= raw != self.missing_value
        if self.valid_range is not None:
            low, high = map(np.float32, self.valid_range)
            values = raw.astype("float32")
            observed &= (low <= values) & (values <= high)
        if self.coverage is not None:
            observed &= _covered(self.coverage, raw.shape)
        return observed

    def encode(self, raw: Any) -> tuple[np.ndarray, np.ndarray]:
        """Raw values of any shape -> values in the model's range, float32, and the mask of observed ones.

        Raises:
            ValueError: values are missing and no `fill_value` says what to put there, or are infinite, above a
                `missing_value` that is the highest, or, with a `transform`, below 0.
        """
        raw = _as_array(raw)
        if raw.dtype.kind not in "buif":
            raise ValueError(f"`raw` must hold real numbers, got dtype {raw.dtype}.")
        observed = self.observed(raw)
        infinite = np.isinf(raw)
        refused = infinite if self.fill_value is not None else ~observed
        if refused.any():
            first = tuple(int(n) for n in np.argwhere(refused)[0])
            outside = "" if self.valid_range is None else f" (or outside `valid_range` {self.valid_range})"
            outside += "" if self.coverage is None else " (or outside `coverage`)"
            raise ValueError(
                f"`raw` holds {int(refused.sum())} missing or non-finite values of {raw.size}{outside}, the first is "
                f"{raw[first]} at {first}; "
                + ("infinite values are never filled." if infinite.any() else "set `fill_value` to fill them.")
            )
        self._refuse_above(raw)
        if not observed.all():
            raw = np.where(observed, raw, np.float64(self.fill_value or 0))
        if self.transform is not None and self.floor is not None:
            raw = _to_decibel(raw, self.transform, self.floor)
        return ((raw.astype("float32") - np.float32(self.offset)) * np.float32(self.scale)), observed

    def _refuse_above(self, raw: np.ndarray):
        """Refuse what is no code: values above a missing value that is itself above the valid ones."""
        missing, valid = self.missing_value, self.valid_range
        if missing is None or valid is None or missing <= valid[1]:
            return
        above = raw[np.isfinite(raw) & (raw > missing)]
        if above.size:
            raise ValueError(
                f"`raw` must not be above {missing}, which stands for what is missing and is the highest value that "
                f"there is, got {above.size} such values of {raw.size}, the highest is {above.max()}."
            )

    def _refuse_physical(self, raw: np.ndarray, observed: np.ndarray):
        """Refuse what is physical by its range, as rain rates are, most of them below the lowest code of rain."""
        if self.physical_table is None:
            return
        (none, lowest), (nothing, least) = (row[:2] for row in self.physical_table)
        positive = raw[observed & (raw > 0)]
        if none != 0 or nothing != 0 or lowest <= least or not positive.size:
            return
        share = (positive < lowest).mean()
        if share > TRACE:
            units = self.physical_units or "physical values"
            raise ValueError(
                f"`raw` looks like {units}: {100 * share:.0f} % of its positive values are below {lowest}, the lowest "
                f"that stands for more than 0. `from_physical` makes raw values of {units}; of those, set what is "
                f"below {least} to 0 where it is most of them."
            )

    def decode(self, values: Any) -> np.ndarray:
        """Values in the model's range (any shape) -> raw values, float32, within `valid_range`; NaN stays NaN."""
        raw = _as_array(values).astype("float32") / np.float32(self.scale) + np.float32(self.offset)
        if self.transform is not None and self.floor is not None:
            with np.errstate(over="ignore"):  # what is beyond float32 is clipped below
                raw = TRANSFORMS[self.transform][1](raw)
            raw = np.where(raw < DRY_BELOW * self.floor, 0, raw).astype("float32")
        return raw if self.valid_range is None else np.clip(raw, self.valid_range[0], self.valid_range[1])

    def to_physical(self, raw: Any) -> np.ndarray:
        """Raw values -> physical values by `physical_table`, float32; NaN where nothing was observed.

        Raises:
            ValueError: this extractor has no table.
        """
        codes, physical = self._table()
        raw = _as_array(raw)
        return np.where(self.observed(raw), np.interp(raw, codes, physical), np.nan).astype("float32")

    def from_physical(self, physical: Any) -> np.ndarray:
        """Physical values -> raw values, float32: the inverse of `to_physical`; beyond the table, its nearer end.

        NaN and masked values become `missing_value`, or NaN if there is none.

        Raises:
            ValueError: this extractor has no table; values are infinite, or negative where the table has none such.
        """
        codes, values = self._table()
        physical = _as_array(physical)
        _refuse_impossible(physical, values)
        missing = np.nan if self.missing_value is None else self.missing_value
        return np.where(np.isnan(physical), missing, np.interp(physical, values, codes)).astype("float32")

    def _table(self):
        if self.physical_table is None:
            raise ValueError("`physical_table` is not set: this extractor knows no physical units.")
        return self.physical_table

    def time_features_of(self, time: Any) -> np.ndarray:
        """The `time_features` of dates (..., T): (..., T, S) float32.

        Raises:
            ValueError: this extractor has none, or these are no dates.
        """
        if self.time_features is None:
            raise ValueError("`time_features` is not set: this extractor says nothing of the season.")
        dates = np.asarray(time)
        if dates.dtype.kind != "M" or np.isnat(dates).any():
            raise ValueError(f"`time` must be dates, datetime64 without gaps, got {dates.dtype}: {dates!r:.80}.")
        return TIME_FEATURES[self.time_features](dates.astype("datetime64[M]").astype(int)).astype("float32")

    def __call__(self, raw: Any, return_tensors: str | None = "pt", time: Any = None) -> BatchFeature:
        """Raw frames -> `past_values` (B, T, H, W, C) float32, ready for the model.

        Args:
            raw: context frames (T, H, W), (B, T, H, W) or (B, T, H, W, C), or a list of B items (T, H, W[, C]).
            return_tensors: "pt" for torch tensors, "np" for numpy arrays.
            time: dates of the frames, (T,) or (B, T) datetime64. An extractor with `time_features` needs them, and
                gives `past_time_features` (B, T, S) as well; others do not look at them.

        Raises:
            ValueError: another rank or an empty batch; what [`encode`] refuses; physical values, told by their range;
                times that are missing, or not those of the frames.
        """
        raw = _as_array(raw)
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
        values, observed = self.encode(raw)
        self._refuse_physical(raw, observed)
        inputs = {"past_values": values}
        if self.valid_range is not None:
            _tell_outside(raw if self.missing_value is None else raw[raw != self.missing_value], self.valid_range)
        if self.time_features is not None:
            if np.shape(time) not in (raw.shape[1:2], raw.shape[:2]):
                raise ValueError(
                    f"`time` must be the dates of the frames, of shape {raw.shape[1:2]} or {raw.shape[:2]}: the model "
                    f"looks at the season ({self.time_features}), got {'none' if time is None else np.shape(time)}."
                )
            features = self.time_features_of(time)
            inputs["past_time_features"] = np.array(np.broadcast_to(features, (*raw.shape[:2], features.shape[-1])))
        return BatchFeature(inputs, tensor_type=return_tensors)


def _on_circle(turns: np.ndarray) -> np.ndarray:
    """Parts of a full turn (...) as sine and cosine, (..., 2)."""
    return np.stack([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)], axis=-1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _are_rising(ends: Any) -> bool:
    """Whether these are two numbers, the first below the second."""
    return isinstance(ends, Sequence | np.ndarray) and [*map(_is_number, ends)] == [True, True] and ends[0] < ends[1]


def _check_table(table: list[list[float]] | None):
    if table is not None:
        rows = [np.asarray(row, dtype="float64") for row in table]
        if len(rows) != 2 or rows[0].shape != rows[1].shape or not all((np.diff(row) > 0).all() for row in rows):
            raise ValueError("`physical_table` must be two rising rows of equal length: raw and physical values.")


def _tell_outside(raw: np.ndarray, valid_range: Sequence[float]):
    low, high = map(np.float32, valid_range)
    values = raw.astype("float32")
    if ((values < low) | (values > high)).any():
        logger.warning_once(f"`raw` holds values outside `valid_range` {list(valid_range)}, which count as missing.")


def _refuse_impossible(physical: np.ndarray, values: Sequence[float]):
    wrong = np.isinf(physical) | ((physical < 0) & (values[0] >= 0))
    if wrong.any():
        first = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise ValueError(
            f"`physical` holds {int(wrong.sum())} negative or infinite values of {physical.size}, the first is "
            f"{physical[first]} at {first}; mark what was not observed by NaN."
        )


def _checked_coverage(coverage: list[str] | None) -> list[str] | None:
    texts = [coverage] if isinstance(coverage, str) else coverage or []
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`coverage` must be texts of 0 and 1, one per grid row, got {coverage}.")
    if len({len(text) for text in texts}) > 1 or set("".join(texts)) - {"0", "1"} or coverage == []:
        raise ValueError(f"`coverage` must be texts of 0 and 1, of equal length, one per grid row, got {coverage}.")
    return None if coverage is None else list(texts)


def _covered(coverage: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """`coverage`, bool, as it broadcasts to raw values (..., H, W) or (..., H, W, C)."""
    covered = np.array([list(row) for row in coverage]) == "1"
    if shape[-2:] == covered.shape:
        return covered
    if shape[-3:-1] == covered.shape:
        return covered[..., None]
    raise ValueError(f"`raw` must be on the grid of `coverage`, {covered.shape}, got the shape {shape}.")


def _to_decibel(raw: np.ndarray, transform: str, floor: float) -> np.ndarray:
    """Raw values of 0 or more in decibels; those below the floor become one value."""
    if (raw < 0).any():
        first = tuple(int(n) for n in np.argwhere(raw < 0)[0])
        raise ValueError(
            f"`raw` must not be below 0 with the transform {transform!r}, the first is {raw[first]} at {first}; "
            "`valid_range` makes such values missing."
        )
    dry = raw.astype("float32") < np.float32(floor)  # compared as the values are stored
    return TRANSFORMS[transform][0](np.where(dry, DRY * floor, raw.astype("float64")))


def _as_array(values: Any) -> np.ndarray:
    """Array-like values as a plain numpy array; what a mask hides becomes NaN."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if isinstance(values, (list, tuple)) and len(values) > 0:
        items = [_as_array(item) for item in values]
        shapes = sorted({item.shape for item in items})
        if len(shapes) > 1:
            raise ValueError(f"`raw`: the items of a list must have one shape, got {shapes}.")
        return np.stack(items)
    if isinstance(values, np.ma.MaskedArray) and values.dtype.kind in "buif":
        return np.ma.filled(values.astype(np.result_type(values.dtype, np.float32)), np.nan)
    return np.asarray(values)


__all__ = ["EarthformerFeatureExtractor"]
