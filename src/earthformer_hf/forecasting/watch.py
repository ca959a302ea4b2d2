"""A new forecast whenever a new frame has come into a folder."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..data.file_search import find_files
from ..data.file_times import parsed_step
from ..data.measures import DataFacts
from ..errors import one_line
from ..sharing.files import check_writable
from .archive_store import OF_FORECAST
from .files import save
from .forecast import forecast
from .nowcasters import load_nowcaster
from .observations import Observations, observe


LATE = 2  # steps without a new frame


class Watch:
    """A folder whose last frames are forecast from, each time once.

    A forecast is `forecast_YYYYMMDDTHHMMSS.nc`, by the time of the last frame, its reference time. Files that cannot
    be read yet, and frames that are missing, are told and waited for.

    Args:
        model: see [`~earthformer_hf.forecasting.forecast`]; one in memory.
        folder: of files with dates.
        out: the folder of the forecasts, not within `folder`.
        say: takes each line of what happens.
        device: where the model computes; the best there is if "auto".
        options: of [`~earthformer_hf.forecasting.forecast`].

    Raises:
        ValueError: no such model or folder, or an `out` that cannot be written.
    """

    def __init__(
        self,
        model: Any,
        folder: str | Path,
        out: str | Path,
        say: Callable[[str], None],
        device: str | None = "auto",
        **options: Any,
    ):
        self.folder, self.out, self.say = Path(folder).resolve(), Path(out).resolve(), say
        if not self.folder.is_dir():
            raise ValueError(f"`folder` must be a folder, {folder} is none.")
        if self.out.is_relative_to(self.folder):
            raise ValueError(f"`out` must not lie within the folder that is watched, got {out}.")
        self.nowcaster = load_nowcaster(model, None, device)
        self.own = self.out / ".watch"
        check_writable(self.own)
        self.options = {name: value for name, value in options.items() if name in OF_FORECAST}
        self.about = {name: value for name, value in options.items() if name not in OF_FORECAST}
        self.seen: dict[Path, tuple] | None = None
        self.told = ""
        self.is_waiting = False  # for files that the last look could not forecast from

    def path_of(self, time: np.datetime64) -> Path:
        """The forecast with this reference time."""
        return self.out / f"forecast_{str(time.astype('datetime64[s]')).replace('-', '').replace(':', '')}.nc"

    def look(self) -> Path | None:
        """Forecast from the last frame, if there is no such forecast yet.

        Returns:
            The new forecast's file; None if there is none, and why is said.
        """
        try:
            self.is_waiting = False
            seen = self._files()
            if seen == self.seen:
                return None
            observations = self._observe()
            time = observations.time[-1]
            path = self.path_of(time)
            if path.exists():
                self._tell(f"{path.name}: is there; waiting for frames after {time}")
            else:
                save(forecast(self.nowcaster, observations, **self.options), path)
                self.told = ""
                self.say(f"{path}: written")
            self.seen = seen  # of what failed, the next look tries again
            return None if self.told else path
        except (ValueError, OSError) as reason:
            self.is_waiting = True
            self._tell(f"waiting: {one_line(reason)}")
            return None

    def _tell(self, line: str) -> None:
        if line != self.told:
            self.say(line)
        self.told = line

    def _files(self) -> dict[Path, tuple]:
        paths, _ = find_files(self.folder, self.about.get("pattern"), bool(self.about.get("follow_links")))
        return {path: (state.st_size, state.st_mtime_ns) for path in paths if (state := path.stat())}

    def _observe(self) -> Observations:
        cache = self.own / "cache"
        try:
            observations = observe(self.folder, keep_bad=True, cache_dir=str(cache), **self.about)
        finally:
            for table in cache.glob("*"):  # all but the list of files that are known
                if table.name != "earthformer_hf_listings":
                    shutil.rmtree(table) if table.is_dir() else table.unlink()
        if not observations.is_dated:
            raise ValueError(f"`folder`: the frames of {self.folder} must have dates.")
        return observations


def watch(watched: Watch, interval: str = "10s", stop: threading.Event | None = None) -> Iterator[Path]:
    """Look again and again; the files of new forecasts, as they are made.

    Args:
        watched: what is watched.
        interval: from one look to the next, such as "10s".
        stop: ends it when it is set, after the forecast that is being made.

    Raises:
        ValueError: no time, or another process watches with the same `out`.
    """
    stop = stop or threading.Event()
    pause = parsed_step(interval, "interval") / np.timedelta64(1, "s")
    with only_watch(watched.out):
        waited = 0.0
        while not stop.is_set():
            if path := watched.look():
                waited = 0.0
                yield path
            stop.wait(pause)
            before, waited = waited, waited + pause
            late = LATE * 60 * (DataFacts(time_step=watched.nowcaster.extractor.time_step).minutes or np.inf)
            if before < late <= waited:
                watched.say(f"late: no new frame for {waited:g} s; waiting")


@contextmanager
def only_watch(out: Path) -> Iterator[None]:
    """A lock that ends with the process.

    Raises:
        ValueError: another process has it.
    """
    try:
        lock = FileLock(os.path.join(out, ".watch", "lock"), timeout=0).acquire()
    except Timeout:
        raise ValueError(f"`out`: another process writes the forecasts of {out}.") from None
    with lock:
        yield


__all__ = ["Watch", "only_watch", "watch"]
