"""Figures of a forecast, as a forecaster looks at it: what was observed, what is forecast, and how likely it is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .canvas import add_title, new_figure
from .coasts import coastlines
from .fields import (
    CHANCE,
    CHANCE_EVER,
    FLAG,
    RAIN_UNITS,
    Map,
    check_forecast,
    forecasts,
    name_of,
    quantity,
    read_map,
    times_of,
    units_of,
)
from .ocean import draw_plume, nino34_box, nino34_means
from .panels import Panel, Sheet, add_key, draw_rows, draw_sheet


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import DataArray, Dataset

LEADS = 6  # columns of forecasts, and one of the whole period
MEMBERS = 3
STAMPS = 20  # members of one time
FLAG_PIXELS = 120
MONTHS = 8  # maps, with the last that was observed
PLUME_INCHES = 3.0
RECENT = 24  # months of the observed index


def plot_forecast(
    dataset: "Dataset",
    observations: "DataArray | None" = None,
    *,
    lead: Any = None,
    time: Any = None,
    threshold: float | None = None,
    colors: str = "rain",
    title: str | None = None,
) -> "Figure":
    """A forecast as rows of maps, each under its valid time and lead.

    The rows are what was observed last; the forecast, or the mean of an ensemble and up to three members; what was
    observed afterwards; and for each threshold the chance that it is reached, at each time and at any time. What was
    not observed is hatched grey; what comes from beyond the coverage is dotted. A map of more than 600 pixels is drawn
    as means over areas.

    Args:
        dataset: of [`~earthformer_hf.forecasting.forecast`], also reopened from a file; forecasts in months get a
            plume of the index Nino3.4, where the map covers its region.
        observations: (time, y, x) in the units of the forecast, see
            [`~earthformer_hf.forecasting.observed_maps`]: frames up to the time of the forecast are drawn before it,
            those at its valid times below it.
        lead, time: how far ahead, such as "20m", or a number of months; or a valid time such as "2020-06-01T12:40":
            draw only this time, with all members as stamps.
        threshold: draw only the chance that this is reached, in the units of the forecast.
        colors: of rain rates: "rain" as on weather maps, or "colour-blind".
        title: above all; what, by which model and from when if omitted.

    Raises:
        ValueError: a dataset that is no forecast, a time or threshold that it does not hold, or observations in other
            units.
    """
    check_forecast(dataset)
    pages = Pages(dataset, observations)
    sheet = Sheet(pages.title() if title is None else title, pages.name, pages.units, colors)
    if lead is not None or time is not None:
        place = pages.place(lead, time)
        sheet.title += f"\nvalid {pages.times.title(pages.times.leads[place])}"
        sheet.rows = in_rows(pages.stamps(place))
    elif threshold is not None:
        place = pages.threshold_place(threshold)
        sheet.rows = in_rows(pages.chances(place, pages.leads(LEADS + 1))[1])
        sheet.title += f"\nchance of {pages.event(place)}"
    elif pages.times.in_months:
        return plot_months(pages, sheet)
    else:
        sheet.rows = pages.everything()
        if len(sheet.rows) == 1:
            sheet.rows = in_rows(sheet.rows[0][1], sheet.rows[0][0])
    sheet.area = pages.area()
    sheet.coasts = coastlines(dataset, sheet.area.extent, sheet.area.unit)
    return draw_sheet(sheet)[0]


def plot_months(pages: "Pages", sheet: Sheet) -> "Figure":
    """Maps of the coming months below the plume of Nino3.4, if they show its region."""
    label, read = next(iter(forecasts(pages.dataset, 0).items()))
    before = [
        replace(panel, title=f"observed, {panel.title.split(',')[0]}") for panel in pages.context(1, []) if panel
    ]
    sheet.rows = in_rows([*before, *pages.row(read, pages.leads(MONTHS - len(before)))])
    sheet.area = pages.area()
    sheet.coasts = coastlines(pages.dataset, sheet.area.extent, sheet.area.unit)
    plume = pages.plume()
    if plume is None:
        return draw_sheet(sheet)[0]
    width, height = sheet.size()
    figure = new_figure(width, height + PLUME_INCHES + 0.8)
    grid = figure.add_gridspec(2, 1, height_ratios=[PLUME_INCHES, height])
    draw_plume(figure.add_subplot(grid[0]), *plume)
    maps = grid[1].subgridspec(len(sheet.rows), sheet.columns)
    for axis in draw_rows(figure, maps, sheet):
        axis.add_patch(nino34_box())
    add_title(figure, sheet.title + ("" if label == "forecast" else f"; maps of the {label}"))
    add_key(figure, sheet.panels)
    return figure


def in_rows(panels: Sequence[Panel | None], label: str = "") -> list[tuple[str, list[Panel | None]]]:
    """Panels in rows of up to four, or of six if there are many."""
    rows = math.ceil(len(panels) / (4 if len(panels) <= 12 else 6))
    columns = math.ceil(len(panels) / rows)
    starts = range(0, len(panels), columns)
    return [(label, list(panels[start : start + columns])) for start in starts]


class Pages:
    """The panels of a forecast and of what was observed."""

    def __init__(self, dataset: "Dataset", observations: "DataArray | Dataset | None" = None):
        self.dataset, self.times = dataset, times_of(dataset)
        self.name, self.units = name_of(dataset), units_of(dataset)
        self.observations = None if observations is None else self._checked(observations)
        self.observed = [] if self.observations is None else self._leads_of_observations()

    @property
    def thresholds(self) -> np.ndarray:
        return self.dataset["threshold"].values if CHANCE in self.dataset else np.empty(0)

    def title(self) -> str:
        found = quantity(self.dataset)
        text = self.name[:1].upper() + self.name[1:] + ", forecast"
        if "model_id" in self.dataset.attrs:
            text += f" by {self.dataset.attrs['model_id']}"
        if self.times.reference is not None:
            text += f" from {self.times.reference_text()}"
        if found is not None and "realization" in found.dims:
            text += f", {found.sizes['realization']} members"
        if "guide" in self.dataset.attrs:
            text += f", asked for {self.dataset.attrs['guide']}"
        return text

    def leads(self, most: int) -> list[int]:
        """Places of leads, evenly far apart, the last one among them."""
        total = len(self.times.leads)
        return list(range(total - 1, -1, -math.ceil(total / most)))[::-1]

    def place(self, lead: Any, time: Any) -> int:
        """Place of a lead, or of a valid time."""
        leads = self.times.leads
        known = f"the forecast has {', '.join(self.times.title(each) for each in leads)}"
        if lead is not None and time is not None:
            raise ValueError("`lead` and `time` say the same; give one.")
        try:
            if time is not None:
                valid = np.array([self.times.valid(each) for each in leads])
                return int(np.flatnonzero(valid == np.datetime64(time))[0])
            wanted = int(lead) if self.times.unit else _duration(lead)
            return int(np.flatnonzero(leads == wanted)[0])
        except (ValueError, TypeError, IndexError, AttributeError):
            name, value = ("time", time) if time is not None else ("lead", lead)
            raise ValueError(f"`{name}`: {known}; got {value!r}.") from None

    def threshold_place(self, threshold: float) -> int:
        near = np.flatnonzero(np.isclose(self.thresholds, threshold))
        if not len(near):
            known = ", ".join(f"{each:g}" for each in self.thresholds) or "none"
            raise ValueError(f"`threshold`: the forecast has the chances of {known}, got {threshold:g}.")
        return int(near[0])

    def event(self, place: int) -> str:
        """What there are chances of, in words."""
        near = self.dataset[CHANCE].attrs.get("neighbourhood")
        return f"{self.thresholds[place]:g} {self.units} or more" + (f" within {near}" if near else "")

    # -- rows ---------------------------------------------------------------------------------------------------------

    def everything(self) -> list[tuple[str, list[Panel | None]]]:
        leads = self.leads(LEADS if len(self.thresholds) else LEADS + 2)
        columns = len(leads) + bool(len(self.thresholds))
        rows = []
        if before := self.context(columns, leads):
            rows.append(("observed", before))
        for label, read in forecasts(self.dataset, MEMBERS).items():
            rows.append((label, self.row(read, leads)))
        after = [self.afterwards(lead) for lead in leads]
        if any(after):
            rows.append(("observed afterwards", after))
        rows += [self.chances(place, leads) for place in range(len(self.thresholds))]
        return rows

    def row(self, read: "Callable[[int], DataArray]", leads: Sequence[int]) -> list[Panel | None]:
        """Maps at some leads, and where there are chances, the highest of all leads."""
        whole = bool(len(self.thresholds))
        every = {lead: read_map(read(lead)) for lead in (range(len(self.times.leads)) if whole else leads)}
        panels: list[Panel | None] = [
            Panel(self.times.title(self.times.leads[lead]), every[lead], flag=self.flag(lead)) for lead in leads
        ]
        if whole:
            values = np.max([each.values for each in every.values()], axis=0)
            panels.append(Panel(f"highest until {self.until()}", replace(every[leads[-1]], values=values)))
        return panels

    def chances(self, place: int, leads: Sequence[int]) -> tuple[str, list[Panel | None]]:
        """The chance that a threshold is reached at some leads, and at any."""
        some = self.dataset[CHANCE].isel(threshold=place)
        panels: list[Panel | None] = []
        for lead in leads:
            title = self.times.title(self.times.leads[lead])
            panels.append(Panel(title, read_map(some.isel(lead_time=lead)), True, self.flag(lead)))
        if CHANCE_EVER in self.dataset:
            ever = read_map(self.dataset[CHANCE_EVER].isel(threshold=place))
            panels.append(Panel(f"at any time until {self.until()}", ever, True))
        return self.event(place).replace(" within", "\nwithin"), panels

    def stamps(self, place: int) -> list[Panel | None]:
        """All that there is of one time."""
        flag = self.flag(place)
        panels: list[Panel | None] = [
            Panel(label, read_map(read(place)), flag=flag) for label, read in forecasts(self.dataset, STAMPS).items()
        ]
        observed = self.afterwards(place)
        if observed is not None:
            panels.insert(0, replace(observed, title="observed"))
        for number in range(len(self.thresholds)):
            chance = read_map(self.dataset[CHANCE].isel(threshold=number, lead_time=place))
            panels.append(Panel(self.event(number), chance, True, flag))
        return panels

    def area(self) -> Map:
        """A map of the forecast, for its edges."""
        array = quantity(self.dataset)
        array = self.dataset[CHANCE] if array is None else array
        return read_map(array.isel({name: 0 for name in array.dims[:-2]}), FLAG_PIXELS)

    def plume(self) -> tuple[tuple, tuple, np.ndarray | None] | None:
        """Arguments of [`~earthformer_hf.plotting.ocean.draw_plume`], if the maps show the region of Nino3.4."""
        found = quantity(self.dataset)
        index = None if found is None or found.ndim > 4 else nino34_means(found)
        months = np.array([self.times.valid(lead) for lead in self.times.leads])[1:-1]
        if index is None or self.times.reference is None:
            return None
        observed = np.empty(0, "datetime64[M]"), np.empty(0)
        if self.observations is not None and (past := nino34_means(self.observations[-RECENT:])) is not None:
            known = [self.times.valid(lead) for lead, _ in self.observed][-RECENT:]
            observed = np.array(known[1:-1]), past
        several = index if index.ndim == 2 else None
        return observed, (months, index if several is None else index.mean(0), None), several

    def until(self) -> str:
        last = self.times.leads[-1]
        return self.times.valid_text(last) or self.times.lead_text(last)

    def flag(self, lead: int) -> Map | None:
        if FLAG not in self.dataset:
            return None
        return read_map(self.dataset[FLAG].isel(lead_time=lead), FLAG_PIXELS)

    # -- observations -------------------------------------------------------------------------------------------------

    def _checked(self, observations: Any) -> "DataArray":
        if hasattr(observations, "data_vars"):
            maps = [array for array in observations.data_vars.values() if array.ndim == 3]
            observations = maps[0] if len(maps) == 1 else observations
        if getattr(observations, "ndim", 0) != 3 or not hasattr(observations, "dims"):
            raise ValueError("`observations` must be an xarray.DataArray (time, y, x).")
        units = str(observations.attrs.get("units", self.units))
        if ("mm/h" if units in RAIN_UNITS else units) != self.units:
            raise ValueError(f"`observations` must be in {self.units}, as the forecast, got {units}.")
        return observations

    def _leads_of_observations(self) -> list[tuple[Any, int]]:
        """Lead and place of each frame; undated ones end with the last that the forecast saw."""
        assert self.observations is not None
        times = self.observations.coords.get(self.observations.dims[0])
        count, step = len(self.observations), self.times.leads[0]
        if times is None or times.dtype.kind != "M" or self.times.reference is None:
            return [((place - count + 1) * step, place) for place in range(count)]
        found = times.values.astype("datetime64[s]")
        if self.times.in_months:
            months = found.astype("datetime64[M]") - self.times.reference.astype("datetime64[M]")
            return [(int(lead.astype(int)), place) for place, lead in enumerate(months)]
        return [(lead, place) for place, lead in enumerate(found - self.times.reference)]

    def _observed(self, lead: Any, place: int) -> Panel:
        assert self.observations is not None
        return Panel(self.times.title(lead), read_map(self.observations[place]))

    def context(self, columns: int, leads: Sequence[int]) -> list[Panel | None]:
        """The last frames, about as far apart as the forecasts; blanks on the right where there are fewer."""
        past = [(lead, place) for lead, place in self.observed if lead <= 0 * lead]
        if not past:
            return []
        steps = 1
        if len(past) > 1 and len(leads) > 1:
            wanted = self.times.leads[leads[-1]] - self.times.leads[leads[-2]]
            steps = max(1, round(float(wanted / (past[-1][0] - past[-2][0]))))
        chosen = past[::-1][::steps][:columns][::-1]
        blanks: list[Panel | None] = [None] * (columns - len(chosen))
        return [self._observed(lead, place) for lead, place in chosen] + blanks

    def afterwards(self, place: int) -> Panel | None:
        """What was observed at a lead, within a quarter of a time step."""
        lead, step = self.times.leads[place], self.times.leads[0]
        near = [
            (found, number) for found, number in self.observed if abs(found - lead) <= step / 4 and found > 0 * step
        ]
        return self._observed(lead, near[0][1]) if near else None


def _duration(lead: Any) -> np.timedelta64:
    if isinstance(lead, str):
        import pandas

        lead = pandas.Timedelta(lead.lstrip("+")).to_timedelta64()
    return np.timedelta64(lead).astype("timedelta64[s]")


__all__ = ["Pages", "in_rows", "plot_forecast"]
