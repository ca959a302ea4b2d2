"""Forecasts of a user's own grid: arrays and files in, georeferenced datasets out."""

from .archive import forecast_archive
from .files import save
from .forecast import forecast
from .nowcasters import describe
from .observations import Observations, observe


__all__ = ["Observations", "describe", "forecast", "forecast_archive", "observe", "save"]
