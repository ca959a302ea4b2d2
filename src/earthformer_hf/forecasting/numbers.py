"""What the numbers are: a user's units, the linear quantity in which means are taken, and the model's raw values."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..data.measures import UNKNOWN, DataFacts, canonical_units
from ..data.rain import rain_coding
from ..feature_extraction_earthformer import EarthformerFeatureExtractor


CODE = "code"  # the units of a model's own raw values


@dataclass(frozen=True)
class Numbers:
    """Conversions of arrays of any shape; NaN stays NaN.

    Args:
        units: of the linear quantity: mm/h of rain, else those of the model.
        linear_of: a user's values -> linear.
        raw_of: linear -> the model's raw values.
        linear_of_raw: and back.
    """

    units: str
    linear_of: Callable[[np.ndarray], np.ndarray]
    raw_of: Callable[[np.ndarray], np.ndarray]
    linear_of_raw: Callable[[np.ndarray], np.ndarray]

    @property
    def is_rain(self) -> bool:
        return self.units == "mm/h"


def numbers_of(facts: DataFacts, extractor: EarthformerFeatureExtractor) -> Numbers:
    """The conversions from a user's units to a model's.

    Args:
        facts: of the data: rain in mm/h, mm/5min, mm, mm/day, mm/s, m/s or dBZ; "code" for the model's raw values; or
            the units of a model that is of something else.
        extractor: of the model.

    Raises:
        ValueError: units that are unknown, or do not become the model's.
    """
    own = DataFacts(extractor.units, extractor.time_step)
    given, wanted = canonical_units(facts.units), canonical_units(extractor.units)
    try:
        coding = rain_coding(extractor, own)
    except ValueError:
        if given not in (wanted, CODE) or wanted in ("1", UNKNOWN):
            raise ValueError(
                f"`data` is in {facts.units}, the model takes {extractor.variable} in {extractor.units}; `units` "
                "states those of the data."
            ) from None
        return Numbers(wanted, _floats, _floats, _floats)

    def raw_of(rain: np.ndarray) -> np.ndarray:
        raw = coding.from_rain(np.nan_to_num(rain), -np.inf)
        missing = np.nan if extractor.missing_value is None else extractor.missing_value
        return np.where(np.isfinite(rain), raw, missing).astype("float32")

    def linear_of_raw(raw: np.ndarray) -> np.ndarray:
        return np.asarray(coding.to_rain(raw), "float32")

    if given == CODE:
        return Numbers("mm/h", linear_of_raw, raw_of, linear_of_raw)
    try:
        stored = rain_coding(EarthformerFeatureExtractor(), facts)
    except ValueError:
        raise ValueError(
            "`data` must be rain in mm/h, mm/5min, mm, mm/day, mm/s, m/s or dBZ, or in the model's own codes "
            f"('code'), got {facts.units!r}; `units` states those of the data."
        ) from None

    def linear_of(values: np.ndarray) -> np.ndarray:
        rain = stored.to_rain(_floats(values))
        _check(rain, values)
        return rain

    return Numbers("mm/h", linear_of, raw_of, linear_of_raw)


def _floats(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, "float32")


def _check(rain: np.ndarray, values: np.ndarray) -> None:
    wrong = np.isinf(rain) | (rain < 0)
    if wrong.any():
        first = tuple(int(n) for n in np.argwhere(wrong)[0])
        value = f"{values[first]:g}"
        raise ValueError(
            f"`data` holds {int(wrong.sum())} negative or infinite rain rates, the first is {value} at {first}; if it "
            f"stands for what was not observed, say so of files by `--option missing_value={value}`, of arrays by NaN."
        )


__all__ = ["CODE", "Numbers", "numbers_of"]
