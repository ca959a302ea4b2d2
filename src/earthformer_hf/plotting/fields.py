"""What a forecast's dataset holds, for a reader: rows of maps, times in words, and coordinates.

A dataset is what [`~earthformer_hf.forecasting.forecast`] returns, also reopened from NetCDF or Zarr. Maps are read
one by one, and means over areas where they have more than `PIXELS` rows or columns.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from xarray import DataArray, Dataset


PIXELS = 600  # of a map that is drawn, along its longer side
CHANCE, CHANCE_EVER, FLAG = "exceedance_probability", "exceedance_probability_at_any_time", "quality_flag"
RAIN_UNITS = ("mm h-1", "mm/h", "mm h^-1", "mm/hr", "mm hr-1", "kg m-2 h-1")
LENGTHS = {"m": 0.001, "metre": 0.001, "meter": 0.001, "km": 1.0}  # in kilometres


# ---------------------------------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------------------------------


def check_forecast(dataset: "Dataset") -> None:
    """
    Raises:
        ValueError: what is no forecast of maps from one time.
    """
    missing = "lead_time" not in getattr(dataset, "dims", ())
    if missing or (quantity(dataset) is None and CHANCE not in dataset):
        raise ValueError(
            "`dataset` must be a forecast, with a variable of (lead_time, y, x), as `forecast` returns it, got "
            f"{type(dataset).__name__}"
            + (f" of {sorted(map(str, dataset.data_vars))}" if hasattr(dataset, "data_vars") else "")
            + "."
        )
    if dataset.get("forecast_reference_time", dataset["lead_time"][0]).ndim:
        raise ValueError(
            "`dataset` holds forecasts from several times; choose one: dataset.isel(forecast_reference_time=-1)."
        )


def quantity(dataset: "Dataset") -> "DataArray | None":
    """The forecast's members, or the only one, or else a product of them in the same units."""
    found = [array for array in dataset.data_vars.values() if "lead_time" in array.dims and array.name != FLAG]
    found = [array for array in found if array.name != CHANCE and array.ndim >= 3]
    found.sort(key=lambda array: (str(array.name).endswith(("_mean", "_percentile")), -array.ndim))
    return found[0] if found else None


def units_of(dataset: "Dataset") -> str:
    """Of the forecast quantity; rain rates in "mm/h"."""
    array = quantity(dataset)
    units = (dataset["threshold"] if array is None else array).attrs.get("units", "")
    return "mm/h" if units in RAIN_UNITS else str(units)


def name_of(dataset: "Dataset") -> str:
    """The quantity in words."""
    if units_of(dataset) == "mm/h":
        return "rain rate"
    title = str(dataset.attrs.get("title", ""))
    if title.startswith("Forecast of "):
        return title.removeprefix("Forecast of ")
    array = quantity(dataset)
    if array is None:
        return "forecast"
    name = array.attrs.get("long_name") or array.attrs.get("standard_name") or str(array.name)
    return str(name).removesuffix("_mean").removesuffix("_percentile").replace("_", " ")


def forecasts(dataset: "Dataset", members: int) -> "dict[str, Callable[[int], DataArray]]":
    """Label -> place of a lead -> its map (y, x) in the units of the quantity: mean, percentiles, so many members.

    The mean is taken of the members where the dataset has none.
    """
    found: dict[str, Callable[[int], DataArray]] = {}

    def add(label: str, array: "DataArray", **place: int) -> None:
        found[label] = lambda lead: array.isel({"lead_time": lead, **place})

    for array in dataset.data_vars.values():
        name = str(array.name)
        if name.endswith("_mean"):
            add("mean", array)
        elif name.endswith("_percentile"):
            for place, percentile in enumerate(dataset["percentile"].values):
                add(f"percentile {percentile:g}", array, percentile=place)
        elif array.ndim == 3 and "lead_time" in array.dims and name != FLAG:
            add("forecast", array)
    several = quantity(dataset)
    if several is not None and "realization" in several.dims:
        every, count = several, several.sizes["realization"]
        if "mean" not in found and count > 1:
            found = {"mean": lambda lead: every.isel(lead_time=lead).mean("realization")} | found
        for place in range(min(members, count)):
            add(f"member {place + 1}", several, realization=place)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """When the maps of a forecast are valid.

    Args:
        leads: (T,), timedelta64, or numbers of `unit`.
        unit: "month", "year" or "frame" of numbers.
        reference: datetime64[s] of the last observed frame; None if it is undated.
    """

    leads: np.ndarray
    unit: str
    reference: Any

    @property
    def in_months(self) -> bool:
        return self.unit in ("month", "year")

    def valid(self, lead: Any) -> Any:
        """The time so far after the reference."""
        if self.reference is None or self.unit == "frame":
            return None
        if self.in_months:
            months = int(lead) * (12 if self.unit == "year" else 1)
            return self.reference.astype("datetime64[M]") + np.timedelta64(months, "M")
        return self.reference + lead

    def lead_text(self, lead: Any) -> str:
        """Such as "+20 min", "-1 h", "+3 months", "0 min"."""
        return self._signed(lead).replace("+0", "0", 1) if lead == 0 * lead else self._signed(lead)

    def _signed(self, lead: Any) -> str:
        if self.unit:
            return f"{int(lead):+d} {self.unit}{'s' if abs(int(lead)) != 1 else ''}"
        seconds = int(lead / np.timedelta64(1, "s"))
        steps = [int(each / np.timedelta64(1, "s")) for each in self.leads]
        for size, unit in ((86400, "day"), (3600, "h"), (60, "min")):
            if all(step % size == 0 for step in (*steps, seconds)):
                count = seconds // size
                plural = "s" if unit == "day" and abs(count) != 1 else ""
                if unit == "min" and max(steps) >= 3 * 3600:
                    return f"{'-' if count < 0 else '+'}{abs(count) // 60}:{abs(count) % 60:02d} h"
                return f"{count:+d} {unit}{plural}"
        return f"{seconds:+d} s"

    def valid_text(self, lead: Any) -> str:
        """Such as "12:40", and the day if it is another than that of the reference; "" if undated."""
        valid = self.valid(lead)
        if valid is None or self.reference is None:
            return ""
        if self.in_months:
            return valid.item().strftime("%b %Y")
        when, reference = (time.astype("datetime64[s]").item() for time in (valid, self.reference))
        if all(step % np.timedelta64(1, "D") == 0 for step in self.leads.astype("timedelta64[s]")):
            return f"{when.day} {when:%b %Y}"
        return f"{when:%H:%M}" if when.date() == reference.date() else f"{when.day} {when:%b %H:%M}"

    def title(self, lead: Any) -> str:
        """Valid time and lead."""
        return ", ".join(text for text in (self.valid_text(lead), self.lead_text(lead)) if text)

    def reference_text(self) -> str:
        if self.reference is None:
            return ""
        if self.in_months:
            return self.reference.astype("datetime64[M]").item().strftime("%B %Y")
        when = self.reference.astype("datetime64[s]").item()
        return f"{when.day} {when:%B %Y, %H:%M} UTC"


def times_of(dataset: "Dataset") -> Times:
    """The times of a forecast's dataset."""
    lead = dataset["lead_time"]
    reference = dataset.get("forecast_reference_time")
    last = None if reference is None else reference.values.astype("datetime64[s]")[()]
    units = str(lead.attrs.get("units", ""))
    if lead.dtype.kind == "m":
        return Times(lead.values.astype("timedelta64[s]"), "", last)
    if units in ("seconds", "minutes", "hours", "days", "weeks"):  # not decoded by xarray
        step = np.array(1, f"timedelta64[{units[0] if units[0] in 'smh' else units[0].upper()}]")
        return Times(lead.values * step, "", last)
    return Times(lead.values, units.removesuffix("s") if units in ("months", "years") else "frame", last)


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """A map as it is drawn, the first row at the top and the first column on the left.

    Args:
        values: (h, w), NaN where missing.
        extent: left, right, bottom and top edge, in `unit`.
        unit: "km", "degrees" or "pixels".
    """

    values: np.ndarray
    extent: tuple[float, float, float, float]
    unit: str

    @property
    def aspect(self) -> float:
        """Height of a unit over its width."""
        middle = (self.extent[2] + self.extent[3]) / 2
        return 1 / max(0.2, math.cos(math.radians(middle))) if self.unit == "degrees" else 1.0

    @property
    def shape(self) -> float:
        """Height over width, on the page."""
        left, right, bottom, top = self.extent
        return abs(top - bottom) * self.aspect / abs(right - left)


def read_map(array: "DataArray", pixels: int = PIXELS) -> Map:
    """A map (y, x) of a dataset."""
    step = math.ceil(max(array.shape) / pixels)
    height, width = (length // step * step for length in array.shape)
    array = array[:height, :width]
    values = means(np.asarray(array.values, "float32"), step)
    (top, bottom, y_unit), (left, right, unit) = (_edges(array, name) for name in array.dims)
    if top < bottom and y_unit != "pixels":
        values, top, bottom = values[::-1], bottom, top
    if right < left:
        values, left, right = values[:, ::-1], right, left
    return Map(values, (left, right, bottom, top), unit)


def _edges(array: "DataArray", name: Any) -> tuple[float, float, str]:
    """The outer edges of the first and the last cell along a dimension, and their unit."""
    centres = array.coords.get(name)
    units = "" if centres is None else str(centres.attrs.get("units", ""))
    if centres is None or len(centres) < 2:
        return -0.5, array.sizes[name] - 0.5, "pixels"
    degrees = "degree" in units or str(name).lower() in ("lat", "lon", "latitude", "longitude")
    scale = 1.0 if degrees else LENGTHS.get(units)
    first, second, last = (float(centres[place]) for place in (0, 1, -1))
    half = (second - first) / 2
    if scale is None:
        return -0.5, array.sizes[name] - 0.5, "pixels"
    return scale * (first - half), scale * (last + half), "degrees" if degrees else "km"


def means(values: np.ndarray, step: int) -> np.ndarray:
    """Means (h, w) over areas of `step` x `step` pixels, of what was observed, if that is half of it or more; rows and
    columns that do not fill one are left out."""
    if step <= 1:
        return values
    height, width = (n // step for n in values.shape)
    areas = values[: height * step, : width * step].reshape(height, step, width, step)
    seen = np.isfinite(areas)
    counts, sums = seen.sum((1, 3)), np.where(seen, areas, np.float32(0)).sum((1, 3))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(2 * counts >= step * step, sums / counts, np.nan).astype("float32")


__all__ = [
    "CHANCE",
    "CHANCE_EVER",
    "FLAG",
    "PIXELS",
    "Map",
    "Times",
    "check_forecast",
    "forecasts",
    "means",
    "name_of",
    "quantity",
    "read_map",
    "times_of",
    "RAIN_UNITS",
    "units_of",
]
