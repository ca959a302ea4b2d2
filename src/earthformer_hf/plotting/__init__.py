"""Figures of forecasts. Functions that return a figure neither save nor show it."""

from .animation import animate_forecast, check_animation
from .canvas import RAIN_COLORS, RAIN_LEVELS, system_colors
from .cuboids import cuboids_of_cells, plot_cuboids
from .forecasts import plot_forecast
from .maps import lead_labels, plot_events, plot_sequence, sequence_row
from .ocean import plot_ocean
from .scores import plot_by_lead, plot_rank_histogram, plot_reliability, plot_spectrum


__all__ = [
    "lead_labels",
    "RAIN_COLORS",
    "RAIN_LEVELS",
    "animate_forecast",
    "check_animation",
    "cuboids_of_cells",
    "plot_by_lead",
    "plot_cuboids",
    "plot_events",
    "plot_forecast",
    "plot_ocean",
    "plot_rank_histogram",
    "plot_reliability",
    "plot_sequence",
    "plot_spectrum",
    "sequence_row",
    "system_colors",
]
