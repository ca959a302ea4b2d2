"""SEVIR and SEVIR-LR: storms over the United States seen by radar and satellite, four hours each.

Veillette et al., "SEVIR: A Storm Event Imagery Dataset for Deep Learning Applications in Radar and Satellite
Meteorology", NeurIPS 2020; SEVIR-LR is its coarser copy in Gao et al., "PreDiff", NeurIPS 2023.

```
<data_dir>/CATALOG.csv    a row per event and image type: id, file_name, file_index, img_type, time_utc, pct_missing
<data_dir>/data/vil/...   file_name. A raster file holds one data set, named as its image type, of axes N, H, W, T
<data_dir>/data/lght/...  the flashes of event <id> as a table <id> of rows (seconds, -, -, x, y)
```

The rules of the catalogue are those of the released loaders of SEVIR, Earthformer and PreDiff, which agree.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.utils import logging

from .events import EventBuilder, EventConfig, Facts
from .frames import LazyFrames
from .guards import check_files, open_hdf5


# Events later than the first and not later than the second time. "earthformer": its released loader. "prediff" and
# "mit" (the SEVIR paper's nowcasts): all that is not test, of which they hold out windows, not events: PreDiff those
# of `prediff_window_split`, the SEVIR paper the last fifth of its file of windows.
_POOL = {"train": (None, "2019-06-01"), "test": ("2019-06-01", None)}
SPLIT_RULES: dict[str, dict[str, tuple[str | None, str | None]]] = {
    "earthformer": {
        "train": (None, "2019-01-01"),
        "val": ("2019-01-01", "2019-06-01"),
        "test": ("2019-06-01", None),
    },
    "prediff": _POOL,
    "mit": _POOL,
}
COLUMNS = ("id", "file_name", "file_index", "img_type", "time_utc", "pct_missing")
PLACE = ("llcrnrlat", "llcrnrlon", "urcrnrlat", "urcrnrlon", "proj")
OTHER_TYPES = {  # variable and units of the image types beside VIL
    "vis": ("GOES-16 visible reflectance, 0.64 um", "1e-4"),
    "ir069": ("GOES-16 brightness temperature, 6.9 um (water vapour)", "0.01 degrees Celsius"),
    "ir107": ("GOES-16 brightness temperature, 10.7 um (window)", "0.01 degrees Celsius"),
    "lght": ("flashes counted by the GOES-16 lightning mapper in five minutes", "1"),
}
# Arguments of the feature extractor for the released loaders' scaling "sevir"; their "01" is that of `Sevir.FACTS`.
SCALINGS = {
    "vil": {"offset": 33.44, "scale": 1 / 47.54},
    "ir069": {"offset": -3683.58, "scale": 1 / 1174.68},
    "ir107": {"offset": -1552.80, "scale": 1 / 2562.43},
    "lght": {"offset": 0.02990, "scale": 1 / 0.60517},
    "vis": {"offset": 0.0, "scale": 1.0},
}
# kg/m2 of the codes 0..254 of VIL, see `Sevir.FACTS`
VIL = np.concatenate([np.zeros(6), (np.arange(6, 19) - 2) / 90.66, np.exp((np.arange(19, 255) - 83.9) / 38.9)])
EDGES = np.arange(-7200, 7201, 300)  # seconds from an event's time to the 49 frames of its flashes


@dataclass
class SevirConfig(EventConfig):
    """Options of SEVIR.

    Args:
        image_type: what `values` are: "vil" (radar, vertically integrated liquid), "vis", "ir069", "ir107" (satellite)
            or "lght" (flashes counted on the grid).
        image_types: types that an event must have in the catalogue; `image_type` alone if empty. Tables of one type
            each, made with the same `image_types`, hold the same events in the same order.
        split_rule: "earthformer", "prediff" or "mit"; the last two have no events of validation, see
            [`prediff_window_split`].
        shuffle: put the events of "train" in the released loaders' order instead of that of their ids.
    """

    image_type: str = "vil"
    image_types: tuple[str, ...] = ()
    split_rule: str = "earthformer"
    shuffle: bool = False


def vil_of_code(codes: np.ndarray) -> np.ndarray:
    """Vertically integrated liquid in kg/m2 of codes 0..254, linear between two; 255 counts as 254."""
    return np.interp(codes, np.arange(len(VIL)), VIL)


def code_of_vil(vil: np.ndarray) -> np.ndarray:
    """The nearest codes of vertically integrated liquid in kg/m2; 0 of none."""
    return np.where(vil > 0, np.round(np.interp(vil, VIL[5:], np.arange(5, len(VIL)))), 0)


class Sevir(EventBuilder):
    """Events of a split in the order of their ids; `values` (T, H, W) are read from the file as they are sliced.

    Frame 24 is at the event's `time_utc`, and the others every 5 minutes from it, as in the SEVIR paper's nowcasts;
    the catalogue's `minute_offsets` may repeat a time where a scan was late, and are not read.
    """

    NAME = "sevir"
    BUILDER_CONFIG_CLASS = SevirConfig
    FRAMES: ClassVar[int] = 49
    # image type -> pixels along a side, and how they are stored
    IMAGE_TYPES: ClassVar[dict[str, tuple[int, str]]] = {
        "vil": (384, "uint8"),
        "vis": (768, "int16"),
        "ir069": (192, "int16"),
        "ir107": (192, "int16"),
        "lght": (48, "int16"),
    }
    FACTS = Facts(
        variable="vertically integrated liquid (VIL) from NEXRAD",
        units="1",
        coding="0..254; in kg/m2 0 up to 5, (x - 2) / 90.66 up to 18, exp((x - 83.9) / 38.9) above; 255 missing, "
        "of which the catalogue's filter leaves none: it is a value like any other, as published",
        time_step="5m",
        grid="384 x 384 at 1 km, 49 frames",
        licence="not stated in the files; made of public data of NOAA's NEXRAD and GOES-16",
        citation="Veillette, Samsi and Mattioli, SEVIR: A Storm Event Imagery Dataset for Deep Learning Applications "
        "in Radar and Satellite Meteorology, NeurIPS 2020",
        splits="by date, in UTC: train to 2019-01-01 00:00, val to 2019-06-01 00:00, test after it; only events with "
        "pct_missing = 0 (the released loader of Earthformer; `split_rule` has those of PreDiff and SEVIR)",
        source="s3://sevir (no sign-in), https://registry.opendata.aws/sevir",
        feature_extractor={"scale": 1 / 255, "valid_range": (0, 255)},
    )

    @classmethod
    def facts_of(cls, options: Mapping[str, Any]) -> Facts:
        image_type = options.get("image_type", "vil")
        if image_type == "vil":
            return cls.FACTS
        variable, units = OTHER_TYPES[image_type]
        size, dtype = cls.IMAGE_TYPES[image_type]
        grid = f"{size} x {size} at {384 / size:g} km, {cls.FRAMES} frames"
        changes = {"variable": variable, "units": units, "coding": dtype, "grid": grid}
        return replace(cls.FACTS, **changes, feature_extractor=SCALINGS[image_type])

    def _info(self) -> Any:
        config, known = self.config, sorted(self.IMAGE_TYPES)
        if config.split_rule not in SPLIT_RULES:
            raise ValueError(f"`split_rule` must be one of {sorted(SPLIT_RULES)}, got {config.split_rule!r}.")
        if config.image_type not in known or not set(config.image_types) <= set(known):
            raise ValueError(
                f"`image_type` and `image_types` of {self.NAME!r} must be of {known}, "
                f"got {config.image_type!r} and {tuple(config.image_types)}."
            )
        if config.image_types and config.image_type not in config.image_types:
            raise ValueError(f"`image_types` must hold {config.image_type!r}, got {tuple(config.image_types)}.")
        return super()._info()

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(SPLIT_RULES[self.config.split_rule])

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        config, root = self.config, Path(self.config.data_dir)
        types = config.image_types or (config.image_type,)
        events = events_of(read_catalogue(root / "CATALOG.csv"), types, *SPLIT_RULES[config.split_rule][split])
        events = events[events.img_type == config.image_type]
        if config.shuffle and split == "train":
            order = np.random.RandomState(1).permutation(len(events))
            events = events.iloc[order].iloc[order]  # the loaders shuffle twice with one seed
        size, dtype = self.IMAGE_TYPES[config.image_type]
        shape = (self.FRAMES, size, size)
        minutes = 240 // (self.FRAMES - 1)
        offsets = (np.arange(self.FRAMES) - self.FRAMES // 2) * np.timedelta64(minutes, "m")
        paths = {name: str(root / "data" / name) for name in events.file_name.unique()}
        bad_files = check_files(paths.values())
        known = {"minutes": minutes, "grid_spacing": f"{384 / size:g} km"}
        places = events.reindex(columns=PLACE).to_dict("records")  # NaN where the catalogue says nothing
        for event, place in zip(events.itertuples(), places):
            path = paths[event.file_name]
            problem = bad_files.get(path) or _problem(path, event, shape, dtype)
            if problem:
                yield {"id": event.id, "problem": f"{event.file_name}, row {event.file_index:.0f}: {problem}"}
                continue
            yield {
                "id": event.id,
                "time": event.time_utc.to_datetime64() + offsets,
                "geo": known | {name: value for name, value in place.items() if value == value},
                "reference": {
                    "path": path,
                    "image_type": config.image_type,
                    "row": event.id if config.image_type == "lght" else int(event.file_index),
                    "shape": shape,
                    "dtype": dtype,
                },
            }

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        path, image_type, row = (reference[name] for name in ("path", "image_type", "row"))
        read = partial(_flashes, path, row) if image_type == "lght" else partial(_frames, path, image_type, row)
        return {"values": LazyFrames(reference["shape"], reference["dtype"], read)}


class SevirLR(Sevir):
    """SEVIR's VIL at a third of the grid and half of the frames, in files that [`downsample`] makes."""

    NAME = "sevir-lr"
    FRAMES = 25
    IMAGE_TYPES = {"vil": (128, "uint8")}
    FACTS = replace(
        Sevir.FACTS,
        time_step="10m",
        grid="128 x 128 at 3 km, 25 frames; the maximum of 3 x 3 pixels of every second frame",
        citation=f"{Sevir.FACTS.citation}; Gao et al., PreDiff, NeurIPS 2023",
        source="https://deep-earth.s3.amazonaws.com/datasets/sevir_lr.zip, or `downsample` of SEVIR",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The catalogue
# ---------------------------------------------------------------------------------------------------------------------


def read_catalogue(path: Path) -> Any:
    """CATALOG.csv as a `pandas.DataFrame`.

    Raises:
        ValueError: no such file, or no table; a column that is missing, a time or number that is none, or the name of
            a file that leads out of the folder.
    """
    import pandas as pd

    if not path.is_file():
        raise ValueError(f"`data_dir` must hold the catalogue, {path} does not exist.")
    try:
        table = pd.read_csv(path, dtype={"id": str, "file_name": str, "img_type": str}, low_memory=False)
        missing = sorted(set(COLUMNS) - set(table.columns))
        if missing:
            raise ValueError(f"must have the columns {list(COLUMNS)}, {missing} are missing")
        table["time_utc"] = pd.to_datetime(table.time_utc, format="ISO8601")
        for name in ("file_index", "pct_missing"):
            table[name] = pd.to_numeric(table[name])
    except ValueError as reason:
        raise ValueError(f"{path}: {reason}.") from None
    table["file_name"] = table.file_name.fillna("")
    for place in map(PurePosixPath, table.file_name.unique()):
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{path}: the file name {str(place)!r} leads out of the folder.")
    return table


def events_of(catalogue: Any, image_types: tuple[str, ...], after: str | None = None, until: str | None = None) -> Any:
    """The rows of the catalogue that make up the events of the data set, sorted by id as text.

    The steps are in the loaders' order, which decides about repeated ids: an id with a complete and an incomplete copy
    is kept, one with two complete copies is not.

    Args:
        catalogue: of [`read_catalogue`].
        image_types: that an event must have.
        after, until: rows with `after < time_utc <= until`.
    """
    rows = catalogue
    if after is not None:
        rows = rows[rows.time_utc > after]
    if until is not None:
        rows = rows[rows.time_utc <= until]
    rows = rows[(rows.pct_missing == 0) & rows.img_type.isin(image_types)]
    copies = rows.groupby("id").img_type
    num_types = len(set(image_types))
    return rows[(copies.transform("nunique") == num_types) & (copies.transform("size") == num_types)].sort_values("id")


def prediff_window_split(
    number_of_events: int, windows_per_event: int = 3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """PreDiff's windows of training and validation: a random nine and one tenth of the windows of its pool.

    Windows of one event overlap, and fall on both sides. The pool is the split "train" with `split_rule="prediff"` and
    `shuffle=True`; item `n` of its [`~earthformer_hf.data.windows.Windows`] is window `n % windows_per_event` of event
    `n // windows_per_event`, as in the released loader.

    Returns:
        Two arrays of numbers of windows, in the order of the released loader, for `torch.utils.data.Subset`.
    """
    windows: Any = range(number_of_events * windows_per_event)
    parts = torch.utils.data.random_split(windows, [0.9, 0.1], torch.Generator().manual_seed(seed))
    train, val = (np.array(part.indices) for part in parts)
    return train, val


# ---------------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------------


def _problem(path: str, event: Any, shape: tuple[int, int, int], dtype: str) -> str | None:
    """Why an event cannot be read from its file, which is a sound HDF5 file."""
    try:
        if event.img_type == "lght":
            _member(path, event.id, None, (5,))
            return None
        data = _member(path, event.img_type, dtype, (*shape[1:], shape[0]))
    except ValueError as reason:
        return str(reason)
    return None if event.file_index in range(len(data)) else f"the file has {len(data)} rows"


def _member(path: str | Path, name: str, dtype: str | None, shape: tuple[int, ...]) -> Any:
    """A data set of a file, of N rows of `shape`.

    Raises:
        ValueError: the file lacks it, or holds another one of this name.
    """
    file = open_hdf5(path)
    data = file.get(name)
    found = getattr(data, "shape", None)
    if not found or found[1:] != shape or data.dtype.kind not in "iuf" or dtype not in (None, data.dtype):
        have = f"{found} {data.dtype}" if found else sorted(file)[:3]
        raise ValueError(f"needs {name!r} (N, {', '.join(map(str, shape))}) {dtype or 'numbers'}, found {have}")
    return data


def _frames(path: str, image_type: str, row: int, numbers: range) -> np.ndarray:
    """Frames of an event as (frames, H, W), a view of what the file holds as (H, W, frames)."""
    data = _data(path, image_type)  # (N, H, W, T)
    rising = numbers if numbers.step > 0 else numbers[::-1]
    part = slice(rising.start, rising.stop, rising.step)
    if data.chunks is not None and data.chunks[3] < data.shape[3]:
        frames = data[row, :, :, part]
    else:  # frames cannot be read apart from one another
        frames = data[row][:, :, part]
    return frames.transpose(2, 0, 1)[:: 1 if numbers.step > 0 else -1]


def _data(path: str, name: str) -> Any:
    """A data set of a file."""
    return _kept_data(path, name, os.stat(path).st_mtime_ns, os.getpid())


@lru_cache(64)
def _kept_data(path: str, name: str, changed: int, process: int) -> Any:
    """Kept as long as the file is the same; a forked process opens its own."""
    return open_hdf5(path)[name]


def _flashes(path: str, event: str, numbers: range) -> np.ndarray:
    """Flashes counted on the grid, see [`count_flashes`]."""
    return count_flashes(open_hdf5(path)[event][:])[numbers]


def count_flashes(table: np.ndarray) -> np.ndarray:
    """Flashes (n, 5) of seconds, two unused columns, x and y -> counts (49, 48, 48) int16 on time, y and x.

    A frame counts the five minutes that follow its time; the first one all that was before, the last one all that
    comes after; flashes outside the grid are left out. So does the released loader, though its comment says that a
    frame holds the five minutes before it.
    """
    seconds, x, y = table[:, 0], table[:, 3], table[:, 4]
    inside = (x >= 0) & (x < 48) & (y >= 0) & (y < 48)
    frame = np.maximum(np.searchsorted(EDGES, seconds[inside], side="right") - 1, 0)
    counts = np.zeros((len(EDGES), 48, 48), "int16")
    np.add.at(counts, (frame, y[inside].astype(int), x[inside].astype(int)), 1)
    return counts


def downsample(data_dir: str | Path, output_dir: str | Path) -> None:
    """Write SEVIR-LR from SEVIR's VIL: every second frame, and the maximum of 3 x 3 pixels.

    All rows of the files that hold an event of the data set are written, in files of the same names, so that the
    catalogue, which is copied, stays valid. A file appears when it is complete, and what is there is kept: a run that
    was stopped goes on. (PreDiff's released script; its loader can also average at run time, which is another thing.)

    Args:
        data_dir: of SEVIR.
        output_dir: of SEVIR-LR, made if need be.

    Raises:
        ValueError: files that cannot be read, each named, after the others are written.
    """
    source, target = Path(data_dir), Path(output_dir)
    target.mkdir(parents=True, exist_ok=True)
    problems = []
    for name in sorted(set(events_of(read_catalogue(source / "CATALOG.csv"), ("vil",)).file_name)):
        path = target / "data" / name
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        try:
            _downsample_file(source / "data" / name, part)
        except (ValueError, OSError) as reason:
            problems.append(f"{name}: {reason}")
            continue
        os.replace(part, path)
    shutil.copyfile(source / "CATALOG.csv", target / "CATALOG.csv")
    if problems:
        raise ValueError(f"`data_dir`: {len(problems)} files could not be read: {'; '.join(problems)}")


def _downsample_file(source: Path, target: Path) -> None:
    import h5py

    data = _member(source, "vil", "uint8", (384, 384, 49))
    with h5py.File(target, "w") as output:
        shape = (len(data), 128, 128, 25)
        small = output.create_dataset("vil", shape, "uint8", chunks=(1, *shape[1:]), compression="gzip")
        for row in logging.tqdm(range(len(data)), desc=source.name, unit="event"):
            frames = data[row][:, :, ::2]  # (384, 384, 25)
            small[row] = frames.reshape(128, 3, 128, 3, 25).max((1, 3))


__all__ = [
    "SCALINGS",
    "Sevir",
    "SevirConfig",
    "SevirLR",
    "code_of_vil",
    "count_flashes",
    "downsample",
    "events_of",
    "prediff_window_split",
    "read_catalogue",
    "vil_of_code",
]
