"""Forecasts of a user's own grid: arrays and files in, georeferenced datasets out."""

from .archive import forecast_archive, forecast_on
from .files import open_forecast, save
from .forecast import forecast
from .nowcasters import describe
from .observations import Observations, observe
from .observed import observed_maps


__all__ = [
    "Observations",
    "describe",
    "forecast",
    "forecast_archive",
    "forecast_on",
    "observe",
    "observed_maps",
    "open_forecast",
    "save",
]
