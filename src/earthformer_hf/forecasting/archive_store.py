"""The Zarr store of an archive's forecasts, and the task of a worker that fills one region of it.

A region is done when its mark in `complete` is set, which is written after it.
"""

import inspect
import json
import shutil
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ..data.file_times import parsed_step
from .forecast import forecast
from .nowcasters import Nowcaster, load_nowcaster
from .observations import latest, stretches


ABOUT_MODEL = {"device", "feature_extractor"}
OF_FORECAST = {  # options of `forecast` that are not about files, nor about its model
    name for name, option in inspect.signature(forecast).parameters.items() if option.kind is option.KEYWORD_ONLY
} - ABOUT_MODEL
REFERENCE = "forecast_reference_time"
LEFT_OUT = "left_out"
_computing = threading.Lock()  # one forecast at a time in a process: `max_memory` is that of one


def marks(out: Path, identity: Mapping[str, Any]) -> np.ndarray:
    """Which starts a store holds, (N,) bool; of length 0 if there is no store.

    Raises:
        ValueError: it is no such store, or of another model, other data or options.
    """
    import zarr

    if not out.exists():
        return np.zeros(0, bool)
    try:
        group = zarr.open_group(out, mode="r")
        known, done = json.loads(str(group.attrs["archive"])), np.asarray(group["complete"]) == 1
    except Exception:  # whatever lies there
        raise ValueError(f"`out`: {out} is there already, and no store of an archive's forecasts.") from None
    for name in sorted({*known, *identity}):
        if known.get(name) != identity.get(name):
            was, is_now = known.get(name), identity.get(name)
            raise ValueError(f"`out`: {out} was begun with `{name}` {was!r}, not {is_now!r}; choose another name.")
    return done


def tell(out: Path, left_out: Mapping[str, str]) -> None:
    """Write into a store's attributes from which times there is no forecast, and why."""
    import zarr

    text = "\n".join(f"{time}: {reason}" for time, reason in left_out.items())
    zarr.open_group(out, mode="r+").attrs[LEFT_OUT] = text


def hindcast(job: dict[str, Any], number: int) -> str | None:
    """Forecast from one start, and write its region: what a worker does.

    Args:
        job: see [`~earthformer_hf.forecasting.archive`].
        number: of the start.

    Returns:
        Why there is no forecast, None if there is one.

    Raises:
        OSError: the store cannot be written.
    """
    import zarr

    out = Path(job["out"])
    lock = out.with_name(f".{out.name}.{number}.lock")
    with FileLock(lock):  # a worker of a client that was killed may still be at it
        if not out.exists() or zarr.open_array(out / "complete", mode="r")[number] != 1:
            try:
                dataset = _forecast(job, job["starts"][number])
            except ValueError as reason:
                lock.unlink(missing_ok=True)
                return str(reason)
            with FileLock(out.with_name(f".{out.name}.begin.lock")) as beginning:
                if not out.exists():
                    _begin(out, dataset, job)
                Path(beginning.lock_file).unlink(missing_ok=True)
            for name, array in dataset.data_vars.items():
                zarr.open_array(out / str(name), mode="r+")[number] = array.values
            zarr.open_array(out / "complete", mode="r+")[number] = 1
        lock.unlink(missing_ok=True)
    return None


def about_data(options: Mapping[str, Any]) -> str:
    """Those of the options that say how files are read, as JSON."""
    return json.dumps({name: value for name, value in options.items() if name not in OF_FORECAST})


def _forecast(job: dict[str, Any], start: str) -> Any:
    with _computing:
        times, stretch = opened(json.dumps(job["data"]), about_data(job["options"]), job["identity"]["starts"])
        time = np.datetime64(start, "s")
        options = {name: value for name, value in job["options"].items() if name in OF_FORECAST}
        return forecast(loaded(job["model"], job["device"]), stretch(latest(times, time)).until(time), **options)


@lru_cache(1)
def loaded(model: str, device: str) -> Nowcaster:
    """The model of this process."""
    return load_nowcaster(model, None, device)


@lru_cache(1)
def opened(data: str, options: str, digest: str) -> tuple[list[np.ndarray], Any]:
    """The files as this process has opened them; another digest of the starts opens them again."""
    times, stretch = stretches(json.loads(data), **json.loads(options))
    return times, lru_cache(8)(stretch)


# ---------------------------------------------------------------------------------------------------------------------
# The store
# ---------------------------------------------------------------------------------------------------------------------


def _begin(out: Path, dataset: Any, job: dict[str, Any]) -> None:
    """A store without forecasts, whole or not there; its arrays take no room yet."""
    import zarr

    starts = np.array(job["starts"], "datetime64[s]")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    coordinates = dataset.coords.to_dataset().drop_vars([REFERENCE, "time"])
    coordinates = coordinates.assign_coords(
        {
            REFERENCE: (REFERENCE, starts.astype("datetime64[ns]"), dataset[REFERENCE].attrs),
            "time": ((REFERENCE, "lead_time"), _valid_times(starts, dataset["lead_time"]), dataset["time"].attrs),
        }
    )
    for name in coordinates.variables:
        original = dataset[name].encoding
        coordinates[name].encoding = {key: original[key] for key in ("units", "dtype") if key in original}
    coordinates.attrs = _plain(dataset.attrs) | {"archive": json.dumps(job["identity"]), LEFT_OUT: ""}
    coordinates.to_zarr(part, zarr_format=3, consolidated=False)
    group = zarr.open_group(part, mode="r+")
    for name, array in dataset.data_vars.items():
        # one member, percentile or threshold: a codec takes no chunk of 2 GB
        chunks = [size if side in ("lead_time", *array.dims[-2:]) else 1 for side, size in array.sizes.items()]
        group.create_array(
            str(name),
            shape=(len(starts), *array.shape),
            chunks=(1, *chunks),
            dtype=array.dtype,
            fill_value=np.nan if array.dtype.kind == "f" else -1,
            dimension_names=[REFERENCE, *map(str, array.dims)],
            attributes=_plain(array.attrs),
        )
    told: dict[str, Any] = {"long_name": "1 of a start whose forecast is written"}
    sizes: dict[str, Any] = {"shape": (len(starts),), "chunks": (1,), "dtype": "int8"}
    group.create_array("complete", **sizes, fill_value=0, dimension_names=[REFERENCE], attributes=told)
    part.rename(out)


def _plain(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value.tolist() if hasattr(value, "tolist") else value for name, value in attributes.items()}


def _valid_times(starts: np.ndarray, lead: Any) -> np.ndarray:
    """(N, T) of the starts and lead times, which count months or years, or are durations."""
    if lead.dtype.kind == "m":
        return starts[:, None].astype("datetime64[ns]") + lead.values.astype("timedelta64[ns]")
    unit = np.datetime_data(parsed_step({"months": "1M", "years": "1Y"}[lead.attrs["units"]]))[0]
    valid = starts[:, None].astype(f"datetime64[{unit}]") + lead.values.astype(f"timedelta64[{unit}]")
    return valid.astype("datetime64[ns]")


__all__ = ["about_data", "hindcast", "loaded", "marks", "opened", "tell"]
