"""What was observed before and during a forecast, as maps to be drawn beside it."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.coarsening import area_means
from ..data.measures import canonical_units
from ..data.rain import rain_coding
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..plotting.fields import units_of
from ..plotting.forecasts import LEADS
from .observations import Observations


if TYPE_CHECKING:
    from xarray import DataArray, Dataset

FRAMES = 8  # before the forecast
FRAMES_OF_MONTHS = 26
CELLS = 1000  # along the longer side; means over areas of finer grids


def observed_maps(dataset: "Dataset", observations: Observations) -> "DataArray | None":
    """The last frames that a forecast saw, about as far apart as they are drawn, and those at its valid times.

    Args:
        dataset: of [`~earthformer_hf.forecasting.forecast`].
        observations: of the same quantity, see [`~earthformer_hf.forecasting.observe`]; those after `until` are drawn
            too.

    Returns:
        (time, y, x) in the units of the forecast, NaN where missing, in areas where the grid is fine; without times if
        the observations have none. None if their units do not become those of the forecast.
    """
    import xarray

    units = canonical_units(units_of(dataset))
    try:
        to_linear = rain_coding(EarthformerFeatureExtractor(), observations.facts).to_rain if units == "mm/h" else None
    except ValueError:  # a model's own codes, say
        return None
    if to_linear is None and canonical_units(observations.facts.units) != units:
        return None
    step = math.ceil(max(observations.grid.shape) / CELLS)
    time = np.concatenate([observations.time, observations.later])
    places = _frames(dataset, observations, time)
    maps = []
    for place in places:  # one by one: frames of a fine grid are large
        values = np.asarray(observations.read(slice(place, place + 1)), "float32")
        maps.append(area_means(values if to_linear is None else to_linear(values), step)[0])
    grid = observations.grid.coarser(step)
    coordinates: dict[str, Any] = {}
    for role, name, centres in zip("yx", grid.names, (grid.y, grid.x)):
        coordinates[name] = (name, centres, {"units": str(grid.geo.get(f"{role}_units", ""))})
    if observations.is_dated:
        coordinates["time"] = time[places].astype("datetime64[ns]")
    return xarray.DataArray(np.stack(maps), coordinates, ("time", *grid.names), attrs={"units": units})


def _frames(dataset: "Dataset", observations: Observations, time: np.ndarray) -> list[int]:
    """Numbers of the frames that are drawn, of those at these times."""
    lead = dataset["lead_time"].values
    total = len(observations.time)
    if lead.dtype.kind != "m":
        return list(range(max(0, total - FRAMES_OF_MONTHS), total))
    if not observations.is_dated or "forecast_reference_time" not in dataset:
        return list(range(max(0, total - FRAMES), total))
    ahead = time - dataset["forecast_reference_time"].values.astype("datetime64[s]")
    drawn = math.ceil(len(lead) / LEADS) * lead[0]  # from map to map
    stride = max(1, round(float(drawn / (observations.facts.step or lead[0]))))
    past, future = np.flatnonzero(ahead <= np.timedelta64(0)), np.flatnonzero(ahead > np.timedelta64(0))
    valid = [place for place in future if np.abs(ahead[place] - lead).min() <= lead[0] / 4]
    return [int(place) for place in [*past[::-1][::stride][:FRAMES][::-1], *valid]]


__all__ = ["observed_maps"]
