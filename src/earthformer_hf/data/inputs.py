"""What the examples forecast: a file of yours, else open data where they are at hand, else simulated weather.

label, events = rain_input("mine.npy", extractor)
event, frames, minutes = wettest_window(events, extractor, 13, 12, image_size=(128, 128))
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers.utils import logging

from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from .events import Events, find_data_dir, load_dataset
from .file_checks import format_of
from .folder import from_folder
from .guards import load_npz, open_dataset, open_hdf5, open_npy
from .measures import UNKNOWN, DataFacts, alike, canonical_units, spacing_of, step_of
from .open_radar import OpenRadarConfig
from .open_sst import OpenSstConfig
from .rain import rain_coding
from .simulated import rain_events, sst_events
from .sst_anomalies import NAMES


logger = logging.get_logger(__name__)
JITTER = 0.1  # by what part a time step may be off whole minutes
OPEN_RADAR = {2: OpenRadarConfig.file, 10: "radar_open_10min_3km.h5"}  # minutes -> file
RAIN_UNITS = ("mm/h", "mm/s", "mm/day", "mm", "dBZ")  # m/s are those of wind as well


def rain_input(path: str | Path | None, extractor: EarthformerFeatureExtractor) -> tuple[str, Sequence[dict]]:
    """Rain to forecast.

    Args:
        path: a `.npy` or `.npz` file of one array (T, H, W), rain rates in mm/h every 2 minutes, NaN where missing; a
            file in the layout of the open radar data (`.h5`), whose test split is taken; or any file that
            [`~earthformer_hf.data.from_folder`] reads, of rain rates, amounts or dBZ in stated units. If omitted, the
            open radar data where they are at hand, else simulated rain; of a model of 10 minutes those of 10 minutes.
        extractor: of the model, with a table of rain rates.

    Returns:
        What it is, in words; and its events, `values` in the extractor's raw values.

    Raises:
        ValueError: a file of another kind, or one that holds anything else, at another time step or grid spacing.
    """
    minutes = 10 if extractor.time_step == "10m" else 2
    open_data = find_data_dir() / OPEN_RADAR[minutes]
    if path is None and not open_data.exists():
        simulated = rain_events(8, minutes=minutes)
        return "simulated rain (not real)", [_encoded_rain(event, extractor) for event in simulated]
    path = Path(path or open_data)
    if is_open_radar(path):
        events = Events(load_dataset("open-radar", path.parent, "test", file=path.name))
        return f"real radar (MRMS groups of {path.name})", events
    if path.suffix in (".npy", ".npz"):
        rain = [{"id": path.stem, "values": _rain_array(path), "geo": {"minutes": 2}}]
    else:
        table = from_folder(path, _rain_variable(path), "train", fractions=(1, 0, 0))
        events = Events(table)
        longest = max(events.lengths)
        rain = [_rain_event(event, path, extractor) for event in events if len(event["values"]) > 1 or longest == 1]
        if len(rain) < len(events):
            logger.warning(f"{path}: {len(events) - len(rain)} frames stand alone between gaps, and are left out.")
    return f"input {path.name}", [_encoded_rain(event, extractor) for event in rain]


def _rain_array(path: Path) -> np.ndarray:
    """Rain rates in mm/h (T, H, W) of a user's file."""
    arrays = load_npz(path) if path.suffix == ".npz" else {"": open_npy(path)}
    if len(arrays) != 1:
        raise ValueError(f"{path} must hold one array, it holds {sorted(arrays)}.")
    (rain,) = arrays.values()
    if rain.ndim != 3 or rain.dtype.kind not in "iuf":
        raise ValueError(f"{path} must hold rain rates in mm/h (T, H, W), got {rain.dtype} {rain.shape}.")
    return _checked_rain(rain, path)


def _checked_rain(rain: np.ndarray, path: Path) -> np.ndarray:
    wrong = np.isinf(rain) | (rain < 0)
    if wrong.any():
        first = tuple(int(n) for n in np.argwhere(wrong)[0])
        raise ValueError(f"{path} holds {wrong.sum()} negative or infinite rates, the first at {first}.")
    return rain


def _rain_variable(path: Path) -> str | None:
    """The only field of a file in units of rain; None if there are none or several, which its reader then names."""
    try:
        format_of(path)
    except ValueError as reason:
        raise ValueError(
            f"{path} must be .npy or .npz (mm/h), .h5 (open radar layout) or a dated grid such as .nc: it {reason}."
        ) from None
    with open_dataset(path, decode_times=False) as dataset:
        fields = [name for name, array in dataset.data_vars.items() if array.ndim > 1]
        names = [name for name in fields if canonical_units(str(dataset[name].attrs.get("units", ""))) in RAIN_UNITS]
    return str(names[0]) if len(names) == 1 else None


def _rain_event(event: dict, path: Path, extractor: EarthformerFeatureExtractor) -> dict:
    """An event with its values in mm/h and its time step in minutes."""
    geo = event["geo"]
    facts = DataFacts(geo.get("units", UNKNOWN), step_of(event["time"], geo), spacing_of(geo))
    minutes = round(facts.minutes or 0)  # scan times jitter
    if event["values"].ndim != 3 or not minutes or abs((facts.minutes or 0) - minutes) > JITTER * minutes:
        raise ValueError(
            f"{path} must hold dated maps (T, H, W), whole minutes apart, got {event['values'].shape} every "
            f"{facts.time_step}."
        )
    if alike("grid_spacing", extractor.grid_spacing, facts.grid_spacing) is False:
        raise ValueError(f"{path} must have a grid of {extractor.grid_spacing}, got {facts.grid_spacing}.")
    try:
        coding = rain_coding(EarthformerFeatureExtractor(), facts)
    except ValueError as reason:
        raise ValueError(f"{path}: {str(reason).partition(';')[0]}.") from reason
    rain = _checked_rain(coding.to_rain(np.asarray(event["values"])), path)
    return event | {"values": rain, "geo": geo | {"minutes": minutes}}


def _encoded_rain(event: dict, extractor: EarthformerFeatureExtractor) -> dict:
    """The event with rain rates in mm/h as the extractor's raw values, NaN as its missing value."""
    rain = event["values"].astype("float32")
    codes = extractor.from_physical(np.nan_to_num(rain))
    missing = np.nan if extractor.missing_value is None else extractor.missing_value
    return event | {"values": np.where(np.isfinite(rain), codes, missing).astype("float32")}


def last_time(event: dict, minutes: np.ndarray, known: bool) -> np.datetime64:
    """When the last frame of the past of [`wettest_window`] was; "not a time" of an event without dates.

    Args:
        minutes: of its frames.
        known: whether the future is, so that the window is the event's first, not its last.
    """
    time = np.asarray(event.get("time", ()), "datetime64[s]")
    if not len(time) or np.isnat(time).any():
        return np.datetime64("NaT")
    return time[0] - np.timedelta64(int(minutes[0]), "m") if known else time[-1]


def wettest_window(
    events: Sequence[dict],
    extractor: EarthformerFeatureExtractor,
    context_length: int,
    prediction_length: int,
    image_size: Sequence[int],
    latest: bool = False,
) -> tuple[dict, np.ndarray, np.ndarray]:
    """The first window of the event with most rain, among those that also hold the future if there are any.

    Args:
        events: of one time step, which `geo` states in `minutes`.
        extractor: of the model. Where its time step is a multiple of that, frames between are left out.
        context_length, prediction_length: frames of past and future.
        image_size: height and width that the model takes.
        latest: instead the last frames of the last event that holds the past, after which nothing is known.

    Returns:
        The event; its raw values (T_in + T_out, H, W) float32, NaN where not observed and after the event's end; and
        the minutes (T_in + T_out,) of the frames, 0 for the last of the past.

    Raises:
        ValueError: no event holds the past, frames of another size, or an extractor that states no minutes.
    """
    length = context_length + prediction_length
    amount, unit = extractor.time_step[:-1], extractor.time_step[-1:]
    if unit != "m" or not amount.isdecimal():
        raise ValueError(f"`extractor` must state a time step in minutes, such as '2m', got {extractor.time_step!r}.")
    minutes, given = int(amount), events[0]["geo"]["minutes"]
    if minutes % given:
        raise ValueError(f"frames every {minutes} minutes, or a part of that, are needed, got {given} minutes.")
    frame_stride = minutes // given
    past_span, span = (frame_stride * (frames - 1) + 1 for frames in (context_length, length))

    def rank(event: dict) -> tuple[bool, bool, float]:
        frames = len(event["values"])
        return frames >= span, frames >= past_span, float(extractor.encode(event["values"])[0].mean())

    if latest:
        event = max(reversed(events), key=lambda event: len(event["values"]) >= past_span)
        codes = np.asarray(event["values"])[-past_span:][::frame_stride]
    else:
        event = max(events, key=rank)
        codes = np.asarray(event["values"])[::frame_stride][:length]
    height, width = image_size
    if len(codes) < context_length or codes.shape[1:] != (height, width):
        raise ValueError(f"{past_span} frames or more of {height} x {width} are needed, got {event['values'].shape}.")
    window = np.full((length, height, width), np.nan, "float32")
    window[: len(codes)] = np.where(extractor.observed(codes), codes, np.nan)
    return event, window, minutes * (np.arange(length) - context_length + 1)


def ocean_input(path: str | Path | None) -> tuple[str, dict[str, Sequence[dict]]]:
    """Sea-surface temperature to forecast.

    Args:
        path: a NetCDF file in the layout of the open record, see `open_sst.py`, of which all months are taken. If
            omitted, the open record where it is at hand, else a simulated ocean.

    Returns:
        What it is, in words; and the events of each split: "test" alone of a user's file.

    Raises:
        ValueError: a file that holds anything else.
    """
    if path is not None:
        path, all_years = Path(path), {"test": (-10_000, 10_000)}
        table = load_dataset("open-sst", path.parent, "test", file=path.name, years=all_years)
        return f"input {path.name}", {"test": Events(table)}
    if (find_data_dir() / OpenSstConfig.file).exists():
        splits = load_dataset("open-sst")
        label = f"real ocean (Kaplan SST, {OpenSstConfig.file}, 1993-2014)"
        return label, {split: Events(table) for split, table in splits.items()}
    years_and_seed = {"train": (60, 1), "val": (20, 2), "test": (10, 0)}
    return "simulated ocean (not real)", {split: sst_events(*numbers) for split, numbers in years_and_seed.items()}


def holds_ocean(path: str | Path) -> bool:
    """Whether a file holds temperatures or anomalies of the sea's surface; rain otherwise.

    Raises:
        ValueError: the file is missing, damaged, or of no known kind.
    """
    path = Path(path)
    if path.suffix in (".npy", ".npz"):
        return False
    with open_dataset(path, decode_times=False) as dataset:
        standard = [str(array.attrs.get("standard_name", "")) for array in dataset.data_vars.values()]
        return bool(set(NAMES) & set(dataset.data_vars)) or any("sea_surface_temperature" in n for n in standard)


def is_open_radar(path: str | Path) -> bool:
    """Whether a file is in the layout of the open radar data."""
    return Path(path).suffix in (".h5", ".hdf5") and "vil_lut" in open_hdf5(path)


def last_frames(event: dict, count: int) -> dict:
    """The last frames of an event, at most so many, with their times and series."""
    series = {name: numbers[-count:] for name, numbers in event.get("series", {}).items()}
    return event | {name: event[name][-count:] for name in ("time", "values")} | {"series": series}


__all__ = ["holds_ocean", "is_open_radar", "last_frames", "last_time", "ocean_input", "rain_input", "wettest_window"]
