"""Forecasts that are scored without being made again: a Zarr store of an archive's hindcasts as a forecaster."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data import Windows
from ..data.guards import open_dataset
from ..data.measures import DataFacts, canonical_units
from ..data.rain import rain_coding
from .forecasters import Window, data_extractor
from .protocols import Protocol


REFERENCE = "forecast_reference_time"


class StoredForecasts:
    """The forecasts of a store, found by the time of a window's last context frame, in stored units.

    Args:
        path: of a store of [`~earthformer_hf.forecasting.forecast_archive`], on the grid of the data.
        protocol: under which it is scored.
        facts: of the protocol's data.

    Attributes:
        is_ensemble: whether it holds members.
        made_by: model and weights, as the store states them.

    Raises:
        ValueError: no such store, one of products without members, or of other units, lead times or time step.
    """

    def __init__(self, path: str | Path, protocol: Protocol, facts: DataFacts):
        self.path, self.protocol = Path(path), protocol
        self.extractor = data_extractor(protocol)
        dataset = open_dataset(path, allow_sparse=True)
        names = [str(name) for name in dataset.data_vars if name != "quality_flag" and not str(name).endswith("_mean")]
        leading = [(REFERENCE, "lead_time"), (REFERENCE, "realization", "lead_time")]
        members = [name for name in names if dataset[name].dims[:-2] in leading]
        if "complete" not in dataset or len(members) != 1:
            raise ValueError(f"`model`: {path} must be a store of an archive's forecasts, or of their members.")
        self.values = dataset[members[0]]
        self.is_ensemble = "realization" in self.values.dims
        self._check_leads(dataset["lead_time"].values, facts)
        self.coding = None
        if canonical_units(self.values.attrs["units"]) == "mm/h":
            self.coding = rain_coding(self.extractor, facts)
        elif canonical_units(self.values.attrs["units"]) != canonical_units(facts.units):
            raise ValueError(f"`model`: {path} is in {self.values.attrs['units']}, the data are in {facts.units}.")
        done = np.flatnonzero(dataset["complete"].values == 1)
        times = dataset[REFERENCE].values.astype("datetime64[s]")
        self.places = {times[place]: int(place) for place in done}
        known = {name: dataset.attrs.get(name) for name in ("model_id", "model_revision", "weights_sha256", "seed")}
        self.made_by = {name: str(value) for name, value in known.items() if value is not None}

    def _check_leads(self, leads: np.ndarray, facts: DataFacts) -> None:
        step, length = facts.step, self.protocol.prediction_length
        if step is None or leads.dtype.kind != "m":
            raise ValueError(f"`model`: lead times of {self.path} and the time step of the data must be durations.")
        expected = step * np.arange(1, length + 1)
        if len(leads) < length or (leads[:length] != expected.astype(leads.dtype)).any():
            raise ValueError(
                f"`model`: {self.path} has lead times {leads.astype('timedelta64[s]')[:3]}... ({len(leads)}), "
                f"{self.protocol.name!r} has {length} of {facts.time_step}."
            )

    def restrict(self, windows: Windows) -> None:
        """Leave only the windows whose forecasts are in the store.

        Raises:
            ValueError: there are none.
        """
        last = (self.protocol.context_length - 1) * self.protocol.frame_stride
        keep = [
            self._time(windows.events[event], start + last) in self.places for event, start in windows.index.tolist()
        ]
        if not any(keep):
            raise ValueError(f"`model`: {self.path} holds no forecast from a window of {self.protocol.name!r}.")
        windows.index = windows.index[np.array(keep)]

    @staticmethod
    def _time(event: Any, frame: int) -> np.datetime64:
        return np.datetime64(event["time"][frame], "s")

    def __call__(self, window: Window) -> np.ndarray:
        last = window.start + (self.protocol.context_length - 1) * self.protocol.frame_stride
        place = self.places[self._time(window.event, last)]
        values = self.values.isel({REFERENCE: place, "lead_time": slice(len(window.future))}).values
        if values.shape[-3:] != window.future.shape:
            raise ValueError(
                f"`model`: {self.path} holds maps {values.shape[-3:]}, the data of {self.protocol.name!r} are "
                f"{window.future.shape}."
            )
        reached = np.isfinite(values)
        if self.coding is not None:
            values = self.coding.from_rain(np.where(reached, values, 0), 0.0)
        values = np.where(reached, values, self.extractor.fill_value or 0).astype("float32")
        return values if reached.all() else np.ma.masked_array(values, ~reached)


__all__ = ["StoredForecasts"]
