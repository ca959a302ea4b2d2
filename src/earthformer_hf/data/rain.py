"""Rain rates in mm/h from stored values and back, for what knows nothing but rain."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from .measures import DataFacts, canonical_units
from .open_radar import rain_rate, rain_table, stored_code


RATES = {"mm/h": 1.0, "mm/s": 3600.0, "m/s": 3.6e6, "mm/day": 1 / 24}  # unit -> mm/h
LOWEST_DBZ = -32.0  # stands for no echo where nothing else does


@dataclass(frozen=True)
class RainCoding:
    """How stored values and rain rates become each other.

    Args:
        to_rain: stored values -> mm/h, of the same shape.
        from_rain: mm/h, and the stored value that stands for no rain -> stored values.
    """

    to_rain: Callable[[np.ndarray], np.ndarray]
    from_rain: Callable[[np.ndarray, float], np.ndarray]


def rain_coding(extractor: EarthformerFeatureExtractor, facts: DataFacts) -> RainCoding:
    """The coding of data in a unit of rain, in dBZ (Z = 200 R^1.6, Marshall and Palmer, 1948), or in codes.

    Args:
        extractor: of the data: a `physical_table` to a unit of rain or dBZ is followed.
        facts: of the data. Amounts in mm are those of one time step.

    Raises:
        ValueError: the data are no rain, as far as is known.
    """
    if extractor.physical_table is None:
        return _of_units(canonical_units(facts.units), facts)
    inner = _of_units(canonical_units(extractor.physical_units or ""), facts)
    open_radar = np.array_equal(extractor.physical_table, rain_table())
    whole = all(float(code).is_integer() for code in extractor.physical_table[0])

    def to_rain(values: np.ndarray) -> np.ndarray:
        return inner.to_rain(extractor.to_physical(values))

    def from_rain(rain: np.ndarray, dry: float) -> np.ndarray:
        rain = rain_rate(stored_code(rain)) if open_radar else rain  # half a dB, as these data are
        codes = extractor.from_physical(inner.from_rain(rain, LOWEST_DBZ))
        return np.round(codes) if whole else codes

    return RainCoding(to_rain, from_rain)


def _of_units(units: str, facts: DataFacts) -> RainCoding:
    if units == "dBZ":
        return RainCoding(rain_of_decibels, decibels_of_rain)
    if units == "mm" and facts.minutes:
        factor = 60 / facts.minutes
    elif factor_of(units):
        factor = factor_of(units)
    else:
        raise ValueError(
            f"the data must be rain in one of {[*RATES, 'mm/5min', 'mm', 'dBZ']}, or codes with a table of these, got "
            f"the units {units or 'unknown'!r}; `feature_extractor` of the protocol may state `units`"
        )
    if factor == 1:
        return RainCoding(np.asarray, lambda rain, dry: rain)
    return RainCoding(lambda values: values * factor, lambda rain, dry: rain / factor)


def factor_of(units: str) -> float:
    """From a rate in canonical units, such as "mm/day" or "mm/5min", to mm/h; 0 of anything else."""
    minutes = re.fullmatch(r"mm/(\d+)min", units)
    return 60 / int(minutes[1]) if minutes and int(minutes[1]) else RATES.get(units, 0.0)


def rain_of_decibels(decibels: np.ndarray) -> np.ndarray:
    """dBZ -> mm/h, by Z = 200 R^1.6."""
    return (10 ** (decibels.astype("float64") / 10) / 200) ** (1 / 1.6)


def decibels_of_rain(rain: np.ndarray, dry: float = -np.inf) -> np.ndarray:
    """The inverse of [`rain_of_decibels`]; `dry` dBZ at least."""
    return np.maximum(10 * np.log10(200 * np.maximum(rain, 1e-9) ** 1.6), dry)


def lowest_value(extractor: EarthformerFeatureExtractor, facts: DataFacts) -> float:
    """The lowest stored value that exists: of the extractor's range, or as the units have it; -inf if any may."""
    units = canonical_units(facts.units)
    if extractor.valid_range is not None:
        return float(extractor.valid_range[0])
    if units == "dBZ":
        return LOWEST_DBZ
    return 0.0 if factor_of(units) or units in ("mm", "1") else -np.inf


__all__ = [
    "LOWEST_DBZ",
    "RainCoding",
    "decibels_of_rain",
    "lowest_value",
    "rain_coding",
    "rain_of_decibels",
]
