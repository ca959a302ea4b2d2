"""Events as rows of a table: what every source's builder makes, and how a row becomes an event again.

A builder's table has a row per event, and the frames stay in the source's files until they are sliced: a data set of a
terabyte is ready in seconds and never copied. A hosted table (`hosted.py`) holds the frames themselves.
"""

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers.utils import logging

from ..configuration_earthformer import nearest_name
from .frames import LazyFrames, decompressed
from .references import key, read_cache, signed, verified


logger = logging.get_logger(__name__)

# name -> module of this folder and its builder
SOURCES: dict[str, tuple[str, str]] = {
    "sevir": ("sevir", "Sevir"),
    "sevir-lr": ("sevir", "SevirLR"),
    "icar-enso": ("icar_enso", "IcarEnso"),
    "nbody-mnist": ("nbody_mnist", "NBodyMnist"),
    "moving-mnist": ("moving_mnist", "MovingMnist"),
    "earthnet2021": ("earthnet", "EarthNet2021"),
    "earthnet2021x": ("earthnet", "EarthNet2021x"),
    "open-radar": ("open_radar", "OpenRadar"),
    "open-sst": ("open_sst", "OpenSst"),
    "folder": ("folder", "Folder"),
    "simulated-land": ("simulated", "SimulatedLand"),
}


@dataclass(frozen=True)
class Facts:
    """What a user must know about a data set before using it.

    Args:
        variable, units, coding: what the stored numbers are.
        time_step: between frames, in numpy's notation: "5m".
        grid: size and spacing of a frame.
        licence, citation: of the data.
        splits: the rule, and where it is from.
        source: where the files are published.
        feature_extractor: keyword arguments of [`EarthformerFeatureExtractor`] that bring the stored values to the
            model's range.
    """

    variable: str
    units: str
    coding: str
    time_step: str
    grid: str
    licence: str
    citation: str
    splits: str
    source: str
    feature_extractor: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------

_FRAMES = {
    "frames": datasets.List(datasets.Value("binary")),
    "shape": datasets.List(datasets.Value("int32")),
    "dtype": datasets.Value("string"),
}
_EVENT = {
    "id": datasets.Value("string"),
    "length": datasets.Value("int32"),
    "time": datasets.List(datasets.Value("timestamp[s]")),
    "geo": datasets.Value("string"),  # JSON
}
FEATURES = datasets.Features(_EVENT | {"reference": datasets.Value("string")})  # signed: for `read`
HOSTED_FEATURES = datasets.Features(
    _EVENT
    | {
        "values": _FRAMES,
        "observed": _FRAMES,
        "covariates": _FRAMES,
        "series": datasets.Value("string"),  # JSON
        "missing": datasets.Value("int64"),
    }
)
ARRAYS = ("values", "observed", "covariates")
FIELDS = ("id", "time", "geo", *ARRAYS, "series")  # of an event
CACHE = "cache"  # the `source` of rows that refer to memory maps


def as_event(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a builder's or a hosted table as an event; an event stays as it is.

    Raises:
        ValueError: the event cannot be used, its files have changed and cannot be read, or it refers to files and was
            not made on this machine.
    """
    if isinstance(row.get("reference"), str):
        read = _referred
    elif isinstance(row.get("values"), dict):
        read = _hosted
    else:
        return row
    place = place_of(row)
    if row.get("problem"):
        raise ValueError(f"{place}: {row['problem']}")
    try:
        known = {"id": row["id"], "time": np.array(row["time"], "datetime64[s]"), "geo": json.loads(row["geo"])}
        parts = read(row)
    except Exception as reason:  # whatever a damaged file may cause
        raise ValueError(f"{place}: {reason}") from reason
    for name in ARRAYS:
        if isinstance(parts.get(name), LazyFrames):
            parts[name].place = f"{place}, `{name}`"
    return known | parts


def _referred(row: dict[str, Any]) -> dict[str, Any]:
    reference = verified(row["reference"])
    return read_cache(reference) if reference["source"] == CACHE else builder_of(reference["source"]).read(reference)


def _hosted(row: dict[str, Any]) -> dict[str, Any]:
    parts = {name: decompressed(row[name]) for name in ARRAYS if row[name] is not None and row[name]["frames"]}
    if "values" not in parts:
        raise ValueError("holds no frames")
    series = {name: np.array(numbers) for name, numbers in json.loads(row["series"] or "{}").items()}
    for name, numbers in series.items():
        if numbers.dtype.kind not in "buif" or numbers.shape[:1] != (len(parts["values"]),):
            raise ValueError(f"the series {name!r} must hold a number for each of {len(parts['values'])} frames")
    return parts | ({"series": series} if series else {})


def place_of(row: dict[str, Any]) -> str:
    """Words for a row: the event's id, and the file and row it refers to."""
    try:
        reference = verified(row["reference"])
    except (KeyError, ValueError):
        reference = {}
    words = [
        f"{name} {value}" for name, value in reference.items() if name != "source" and isinstance(value, str | int)
    ]
    return f"event {row['id']!r}{' (' + ', '.join(words) + ')' if words else ''}"


def as_events(batch: dict[str, list]) -> dict[str, list]:
    """A batch of rows, column by column, as a batch of events: the transform of tables that `load_dataset` returns."""
    names = list(batch)
    events = [as_event(dict(zip(names, row))) for row in zip(*batch.values())]
    return {name: [event[name] for event in events] for name in events[0]} if events else {}


def check_origin(table: datasets.Dataset | datasets.IterableDataset) -> None:
    """Refuse a downloaded table that refers to files of this machine, as a crafted HDF5 file may.

    Raises:
        ValueError: the table has a column `reference`, and neither a source nor a cache of this machine has made it.
    """
    if "reference" not in (table.column_names or ()):
        return
    known = {None, CACHE, *(module for module, _ in SOURCES.values())}  # None: made by the program itself
    if table.info.builder_name not in known:
        raise ValueError(f"a table of {table.info.builder_name} must hold its frames, not refer to files; not read.")
    if isinstance(table, datasets.Dataset) and len(table):  # of a stream each row is asked when it comes
        verified(table.with_format(None)[0]["reference"])


def usable(table: datasets.Dataset, name: str) -> datasets.Dataset:
    """The rows that have no problem; each of the others is logged with its reason.

    Args:
        table: of a source with `keep_bad`, or any other, which is returned as it is.
        name: of the source, for the log.
    """
    if "problem" not in table.column_names:
        return table
    table = table.with_format(None)
    problems = table["problem"][:]
    for index in (index for index, problem in enumerate(problems) if problem):
        logger.warning(f"{name}: left out {table[index]['id']}: {problems[index]}")
    return table.select([index for index, problem in enumerate(problems) if not problem])


class Events(Sequence):
    """The events of a table, one by one.

    Args:
        table: of a builder or hosted, whatever its format.

    Raises:
        ValueError: see [`check_origin`].
    """

    def __init__(self, table: datasets.Dataset):
        self.table = table.with_format(None)
        check_origin(table)
        times = self.table.with_format("arrow")["time"][:]  # what a downloaded `length` says may be wrong
        self.lengths: list[int] = pc.list_value_length(times).fill_null(0).to_pylist()
        self.known: dict[int, dict] = {}  # views of memory maps are kept: making them takes as long as reading them

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """(T, H, W) or (T, H, W, C) of every event, without reading frames."""
        if "reference" in self.table.column_names:
            return [tuple(self[index]["values"].shape) for index in range(len(self))]
        sizes = self.table.select_columns(["values"]).flatten()["values.shape"]
        return [(length, *size) for length, size in zip(self.lengths, sizes)]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if index in self.known:
            return self.known[index]
        event = as_event(self.table[index])
        if isinstance(event["values"], np.memmap):
            self.known[index] = event
        return event


# ---------------------------------------------------------------------------------------------------------------------
# Builders
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class EventConfig(datasets.BuilderConfig):
    """Options that all sources share.

    Args:
        data_dir: the folder of the source's files.
        keep_bad: give an event that cannot be read as a row whose `problem` says why, instead of a ValueError.
    """

    keep_bad: bool = False


class EventBuilder(datasets.GeneratorBasedBuilder):
    """A source of events. A subclass states `FACTS` and `SPLITS`, lists its events, and reads them.

    `rows(split)` yields dicts: `id`, `time`, `geo` (a dict), and `reference` (a dict of JSON values, from which `read`
    finds the frames again); or `id` and `problem`, for an event that is in the catalogue and cannot be used.
    `read(reference)` returns the fields of the event that hold frames: `values`, and `observed`, `covariates`,
    `series` where the source has them.
    """

    BUILDER_CONFIG_CLASS = EventConfig
    FACTS: ClassVar[Facts]
    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    NAME: ClassVar[str]
    NEEDS_FILES: ClassVar[bool] = True
    wanted: tuple[str, ...] = ()  # the splits to list; all if empty

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        raise NotImplementedError

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def without_damage(cls, row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """Rows of what is left of a row whose frames cannot all be read, and what is wrong with the rest."""
        return [], []

    @classmethod
    def facts_of(cls, options: Mapping[str, Any]) -> Facts:
        """`FACTS`, as options or a reference of the source change them."""
        return cls.FACTS

    @classmethod
    def watched_files(cls, data_dir: Path, options: Mapping[str, Any]) -> Iterator[str]:
        """The files on which a table depends: all below the folder, where a source does not know better."""
        for folder, _, names in os.walk(data_dir):
            yield from (os.path.join(folder, name) for name in names)

    @property
    def facts(self) -> Facts:
        return self.facts_of(vars(self.config))

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of `SPLITS` that there are with these options."""
        return self.SPLITS

    def _info(self) -> datasets.DatasetInfo:
        features = FEATURES | {"problem": datasets.Value("string")} if self.config.keep_bad else FEATURES
        return datasets.DatasetInfo(
            description=f"{self.facts.variable}; {self.facts.grid}; every {self.facts.time_step}",
            features=datasets.Features(features),
            citation=self.facts.citation,
            license=self.facts.licence,
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        names = [name for name in self.splits if name in (self.wanted or self.SPLITS)]
        return [datasets.SplitGenerator(name=name, gen_kwargs={"split": name}) for name in names]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, row in enumerate(self.rows(split)):
            problem = row.get("problem") or _time_problem(row["time"])
            if problem and not self.config.keep_bad:
                raise ValueError(f"{self.NAME}, event {row['id']!r}: {problem}")
            reference = {"source": self.NAME} | row.get("reference", {})
            filled = {
                "id": row["id"],
                "length": len(row.get("time", ())),
                "time": np.asarray(row.get("time", ()), "datetime64[s]").tolist(),
                "geo": json.dumps(row.get("geo", {})),
                "reference": signed(reference),
            }
            yield str(index), filled | ({"problem": problem or ""} if self.config.keep_bad else {})


def _time_problem(time: np.ndarray) -> str | None:
    falling = np.flatnonzero(np.diff(np.asarray(time, "datetime64[s]")) <= np.timedelta64(0, "s"))
    if len(falling):
        return (
            f"`time` must rise, but frame {falling[0] + 1} ({time[falling[0] + 1]}) does not follow {time[falling[0]]}"
        )
    return None


def builder_of(name: str) -> type[EventBuilder]:
    """The builder of a source.

    Raises:
        ValueError: no source has that name.
    """
    if name not in SOURCES:
        close = nearest_name(name, SOURCES)
        guess = f" Did you mean {close!r}?" if close else ""
        raise ValueError(f"`name` must be one of {sorted(SOURCES)}, got {name!r}.{guess}")
    module, class_name = SOURCES[name]
    return getattr(importlib.import_module(f".{module}", __package__), class_name)


def is_source(name: str) -> bool:
    """Whether a name is that of a source, and not a prepared folder or an id on a hub, "namespace/name".

    Raises:
        ValueError: it is none of them; the nearest source is suggested.
    """
    if name in SOURCES:
        return True
    if not name or not (Path(name).is_dir() or "/" in name):
        builder_of(name)
    return False


def find_data_dir(data_dir: str | Path | None = None) -> Path:
    """The folder of a source's files; EARTHFORMER_HF_DATA (default ../shared/data) if omitted."""
    return Path(data_dir or os.environ.get("EARTHFORMER_HF_DATA", "../shared/data")).expanduser().resolve()


def make_builder(
    name: str,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    split: str | None = None,
    **options: Any,
) -> EventBuilder:
    """The builder of a source with its options; arguments and errors are those of [`load_dataset`]."""
    builder_class = builder_of(name)
    data_dir = find_data_dir(data_dir)
    if builder_class.NEEDS_FILES and not data_dir.exists():
        raise ValueError(f"`data_dir` must be the folder of the files of {name!r}, {data_dir} does not exist.")
    known = options_of(builder_class)
    if set(options) - known:
        raise ValueError(f"`options` of {name!r} must be of {sorted(known)}, got {sorted(set(options) - known)}.")
    wanted = tuple(part.partition("[")[0] for part in split.split("+")) if split else ()
    if not set(wanted) <= set(builder_class.SPLITS):
        raise ValueError(f"`split` of {name!r} must be of {list(builder_class.SPLITS)}, got {split!r}.")
    files = builder_class.watched_files(data_dir, options)
    fingerprint = "-".join([_fingerprint(builder_class, files), *sorted(set(wanted))])
    builder = builder_class(cache_dir=cache_dir, data_dir=str(data_dir), hash=fingerprint, **options)
    if not set(wanted) <= set(builder.splits):
        raise ValueError(f"`split` of {name!r} must be of {list(builder.splits)} with these options, got {split!r}.")
    builder.wanted = wanted
    return builder


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    split: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Any:
    """The events of a source's files as a table whose rows are events.

    Args:
        name: "open-radar", ...: a key of `earthformer_hf.data.events.SOURCES`.
        data_dir: the folder of the source's files; EARTHFORMER_HF_DATA (default ../shared/data) if omitted.
        split: one split, in the notation of `datasets` ("train", "test[:10]"); all if omitted.
        streaming: list the events as they are asked for, and write no table.
        cache_dir: where tables are kept, `datasets`' own place if omitted. A table is made anew when the files change.
        options: fields of the source's configuration.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` when streaming; without `split`, a dict of them by split, of a
        `Dataset` those that have events. Frames are read when `values` is sliced. For
        [`~earthformer_hf.data.windows.windows`].

    Raises:
        ValueError: no such source, split or option; a file that is missing or crafted; an event that cannot be used,
            with its file and row.
    """
    builder = make_builder(name, data_dir, cache_dir, split, **options)
    if streaming:
        stream = builder.as_streaming_dataset(split)
        columns = [*FEATURES, "problem"]
        if split:
            return stream.map(as_event, remove_columns=columns)
        return {name: part.map(as_event, remove_columns=columns) for name, part in stream.items()}
    try:
        builder.download_and_prepare()
    except datasets.exceptions.DatasetGenerationError as failure:
        reason = failure.__cause__ or failure
        known = isinstance(reason, ValueError | OSError)
        words = str(reason) if known else f"{name!r} of {data_dir}: {type(reason).__name__}: {reason}"
        raise ValueError(words) from reason
    if split:
        return builder.as_dataset(split).with_transform(as_events)
    filled = [name for name, info in builder.info.splits.items() if info.num_examples]
    if not filled:
        raise ValueError(f"`data_dir`: {builder.config.data_dir} holds no events of {builder.NAME!r} and its options.")
    return datasets.DatasetDict({name: builder.as_dataset(name).with_transform(as_events) for name in filled})


def options_of(builder_class: type[EventBuilder]) -> set[str]:
    """Names of the options that a source takes."""
    names = [
        {field.name for field in fields(config)}
        for config in (builder_class.BUILDER_CONFIG_CLASS, datasets.BuilderConfig)
    ]
    return names[0] - names[1]


@lru_cache(1)
def digest_of_code() -> str:
    """SHA-256 of the modules of this folder, which read files."""
    digest = hashlib.sha256()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()


def _fingerprint(builder_class: type[EventBuilder], files: Iterator[str]) -> str:
    """What a kept table depends on: the code that reads files, and names, sizes and times of the files."""
    digest = hashlib.sha256(inspect.getsource(inspect.getmodule(builder_class)).encode())  # type: ignore[arg-type]
    digest.update(hashlib.sha256(key()).digest())  # under which references were made
    digest.update(digest_of_code().encode())
    for path in sorted(files):
        status = os.stat(path) if os.path.exists(path) else os.lstat(path)  # a link to nowhere
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


__all__ = [
    "ARRAYS",
    "CACHE",
    "EventBuilder",
    "EventConfig",
    "Events",
    "FIELDS",
    "Facts",
    "HOSTED_FEATURES",
    "SOURCES",
    "as_event",
    "as_events",
    "builder_of",
    "check_origin",
    "digest_of_code",
    "find_data_dir",
    "is_source",
    "load_dataset",
    "make_builder",
    "options_of",
    "place_of",
    "usable",
]
