"""Hindcasts over an archive: a forecast from each of many start times, by a Dask cluster, in one Zarr store.

```
client     starts -> tasks -> scheduler -> workers, each with the model    forecasts.zarr
task       frames up to a start -> forecast -> the region of this start -> |xxxx|xxxx|....|xxxx|....|
                                            -> its mark in `complete`   -> | 1  | 1  | 0  | 1  | 0  |
```

Whatever is killed, client, worker or scheduler, the same call goes on with the starts that are not marked.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..data.file_times import parsed_step
from ..sharing.files import check_writable
from .archive_store import about_data, loaded, marks, opened, tell
from .forecast import context_places, lead_frames
from .grids import check_spacing
from .nowcasters import Nowcaster
from .observations import are_paths, latest, parsed_date


def forecast_archive(
    model: str | Path,
    data: Any,
    out: str | Path,
    start: str,
    end: str,
    every: str,
    *,
    scheduler: str | None = None,
    workers: int = 2,
    device: str = "auto",
    **options: Any,
) -> dict[str, Any]:
    """Forecast from each of many times in an archive of files, into one Zarr store (version 3).

    The store is what [`~earthformer_hf.forecasting.forecast`] returns, with a first dimension of start times,
    and `complete`, 1 of each that is done. The same call goes on where a killed one ended.

    Args:
        model: a folder or a hub id, which each worker loads once.
        data: a path, a pattern or a list of paths, that workers can read as well.
        out: a folder `.zarr`, that workers can write.
        start, end: the first and the last time to forecast from, such as "2020-01-01T12:00".
        every: from one of them to the next, such as "10m". The reference time of a forecast is that of the last frame
            at or before it.
        scheduler: address of a Dask scheduler; a cluster on this machine if omitted.
        workers: processes of the cluster on this machine.
        device: of each worker, such as "cpu"; the best that it has if "auto".
        options: those of [`~earthformer_hf.forecasting.forecast`] that JSON can hold.

    Returns:
        `made` and `kept`, how many starts this call and earlier ones have forecast from; and `left_out`, time -> why
        there is no forecast from it. The store's attribute `left_out` tells the same.

    Raises:
        ValueError: arguments that cannot work; no start that has the frames it needs; a store of another model,
            other data or options; another call that writes this store; a scheduler that is lost.
        OSError: the store cannot be written.
    """
    store = Path(out).absolute()
    if store.suffix != ".zarr":
        raise ValueError(f"`out` must end in .zarr, got {store.name!r}.")
    job = _job(model, data, device, options) | {"out": str(store)}
    if not isinstance(workers, int) or workers < 1:
        raise ValueError(f"`workers` must be a whole number of at least 1, got {workers!r}.")
    times = _times(start, end, every)
    check_writable(store.parent)
    with _only_writer(store):
        nowcaster = loaded(job["model"], "cpu")
        lead_frames(job["options"].get("lead"), nowcaster)
        starts, left_out, grid = _plan(job, nowcaster, times)
        asked = {"start": start, "end": end, "every": every, "starts": _digest(starts)}
        known = {"weights": nowcaster.identity["weights_sha256"], "data": job["data"], "data_grid": grid}
        job |= {"starts": starts, "identity": known | job["options"] | asked}
        done = marks(store, job["identity"])
        todo = [number for number in range(len(starts)) if not done[number : number + 1].any()]
        try:
            failed = _run(job, todo, scheduler, workers) if todo else {}
        except OSError as problem:
            words = (
                f"`out`: {store} cannot be written: {problem.strerror or problem}; the same call goes on from here."
            )
            raise OSError(problem.errno, words) from None
        if not store.exists():
            first = next(iter(failed))
            raise ValueError(f"no start could be forecast from; at {starts[first]}: {failed[first]}")
        left_out |= {starts[number]: why for number, why in failed.items()}
        tell(store, left_out)
    return {"made": len(todo) - len(failed), "kept": len(starts) - len(todo), "left_out": left_out}


def _job(model: Any, data: Any, device: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a worker has to know, as JSON holds it; paths are absolute."""
    if not isinstance(model, str | Path) or not are_paths(data):
        raise ValueError("`model` and `data` must be paths, or the model a hub id: each worker opens them itself.")
    paths = [str(Path(each).absolute()) for each in (data if isinstance(data, list | tuple) else [data])]
    place = str(Path(model).absolute()) if Path(model).exists() else str(model)
    job = {"model": place, "data": paths if len(paths) > 1 else paths[0], "device": device}
    try:
        return json.loads(json.dumps(job | {"options": options}))
    except TypeError as problem:
        raise ValueError(f"`options` must be what JSON can hold: {problem}.") from None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """A lock that ends with the process, however it ends."""
    path = out.with_name(f".{out.name}.lock")
    try:
        lock = FileLock(path, timeout=0).acquire()
    except Timeout:
        raise ValueError(f"`out`: another call writes {out}; wait for it, or choose another name.") from None
    with lock:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Which starts there are
# ---------------------------------------------------------------------------------------------------------------------


def _times(start: str, end: str, every: str) -> np.ndarray:
    first, last, step = parsed_date(start, "start"), parsed_date(end, "end"), parsed_step(every, "every")
    unit = np.datetime_data(step)[0]
    if last < first or not step.astype(int):
        raise ValueError(f"`start`, `end` and `every` must name times to forecast from, got {start}, {end}, {every}.")
    if unit not in "MY":
        return np.arange(first, last + np.timedelta64(1, "s"), step.astype("timedelta64[s]"))
    whole = first.astype(f"datetime64[{unit}]")
    steps = np.arange(whole, last.astype(f"datetime64[{unit}]") + 1, step).astype("datetime64[s]")
    times = steps + (first - whole.astype("datetime64[s]"))
    return times[times <= last]


def _plan(job: dict, nowcaster: Nowcaster, times: np.ndarray) -> tuple[list[str], dict[str, str], str]:
    """Times of the frames to forecast from; other times -> why not; and a digest of the grid and its units."""
    opened.cache_clear()
    ends, stretch = opened(json.dumps(job["data"]), about_data(job["options"]), "")
    found: list[str] = []
    left_out: dict[str, str] = {}
    grid = ""
    for time in times:
        try:
            observations = stretch(latest(ends, time)).until(time)
            context_places(observations, nowcaster, job["options"].get("resample_time"))
        except ValueError as reason:
            left_out[str(time)] = str(reason)
            continue
        last, own = str(observations.time[-1]), observations.grid
        if not grid and job["options"].get("coarsen_to") is None:
            check_spacing(own, nowcaster.extractor.grid_spacing)
        here = _digest([observations.facts.units, list(own.y), list(own.x)])
        grid = grid or here
        if last in found[-1:]:
            left_out[str(time)] = f"no new frame since {last}."
        elif here != grid:
            left_out[str(time)] = "its frames are on another grid, or in other units, than those of the first start."
        else:
            found.append(last)
    if not found:
        raise ValueError(f"no start has the frames it needs; at {times[0]}: {left_out[str(times[0])]}")
    return found, left_out, grid


# ---------------------------------------------------------------------------------------------------------------------
# The cluster
# ---------------------------------------------------------------------------------------------------------------------


def forecast_on(scheduler: str, model: str | Path, data: Any, **options: Any) -> Any:
    """What [`~earthformer_hf.forecasting.forecast`] returns, made by a worker of a Dask cluster, such as one with a
    GPU, which keeps the model for the next call.

    Args:
        scheduler: address of a Dask scheduler.
        model, data: paths, or the model a hub id; the worker opens them.
        options: of `forecast`.

    Raises:
        ValueError: what `forecast` raises; a scheduler that cannot be reached.
    """
    device = options.pop("device", None) or "auto"
    job = _job(model, data, device, options)

    def task(job: dict) -> Any:  # sent as code, so that the scheduler imports nothing of it
        from earthformer_hf.forecasting import forecast
        from earthformer_hf.forecasting.archive_store import loaded

        return forecast(loaded(job["model"], job["device"]), job["data"], **job["options"])

    with _client(scheduler) as client:
        return client.submit(task, job, pure=False).result()


def _distributed() -> Any:
    """The library of the cluster.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import distributed
    except ModuleNotFoundError:
        raise ValueError("distributed is missing; install it with: pip install 'earthformer-hf[cluster]'.") from None
    return distributed


def _client(scheduler: str) -> Any:
    """
    Raises:
        ValueError: a scheduler that cannot be reached.
    """
    distributed = _distributed()
    try:
        return distributed.Client(scheduler)
    except (OSError, ValueError) as problem:
        raise ValueError(f"`scheduler`: {scheduler} cannot be reached: {problem}.") from None


def _run(job: dict, todo: list[int], scheduler: str | None, workers: int) -> dict[int, str]:
    """Forecast from each start; numbers of those that cannot be -> why."""
    distributed = _distributed()
    failed: dict[int, str] = {}
    with ExitStack() as stack:
        if scheduler is None:
            options: dict[str, Any] = {
                "n_workers": workers,
                "threads_per_worker": 1,
                "dashboard_address": "localhost:0",
            }
            client = stack.enter_context(distributed.Client(stack.enter_context(distributed.LocalCluster(**options))))
            client.run(logging.disable_progress_bar)
        else:
            client = stack.enter_context(_client(scheduler))

        def task(job: dict, number: int) -> str | None:  # sent as code, so that the scheduler imports nothing of it
            from earthformer_hf.forecasting.archive_store import hindcast

            return hindcast(job, number)

        name = f"archive-{_digest([job['out'], job['identity']])}"
        shared = client.submit(dict, job, key=name, pure=False)  # sent once, not with each task
        numbers = {f"{name}-{number}": number for number in todo}
        futures = client.map(task, [shared] * len(todo), todo, key=list(numbers), pure=False)
        bar = stack.enter_context(logging.tqdm(total=len(todo), desc=f"starts ({client.dashboard_link})"))
        for future, reason in distributed.as_completed(futures, with_results=True):
            if isinstance(reason, distributed.CancelledError):  # which it gives back, and does not raise
                raise ValueError("`scheduler`: it was lost; the same call goes on where this one ended.")
            bar.update()
            if reason is not None:
                failed[numbers[future.key]] = reason
            future.release()
    return failed


__all__ = ["forecast_archive", "forecast_on"]
