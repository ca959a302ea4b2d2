"""Tables that hold their frames: parquet to share and to stream, and memory maps to train from.

```
prepare  <folder>/data/<split>-00000-of-00012.parquet   rows of `HOSTED_FEATURES`: each frame compressed on its own
                  README.md, SHA256SUMS                 the data set's card, and the checksums of the shards
cached   <folder>/<fingerprint>/00000/values.npy        the frames of many events, one after another, as they are
```

A shard is complete or absent, and depends on its rows alone: an interrupted run goes on where it stopped.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from huggingface_hub import DatasetCardData, HfApi
from huggingface_hub.hf_api import CommitInfo
from transformers.utils import logging

from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from .events import (
    ARRAYS,
    CACHE,
    HOSTED_FEATURES,
    Facts,
    as_event,
    builder_of,
    is_source,
    load_dataset,
    place_of,
    usable,
)
from .frames import compressed
from .references import signed, verified


logger = logging.get_logger(__name__)
_ROW_GROUP = 8 * 2**20  # bytes of frames that a reader of a stream holds at once
_MARK = "<!-- Written by `earthformer-hf data prepare`; remove this line to keep what you change. -->"


def event_in_memory(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table as an event whose frames are arrays.

    Raises:
        ValueError: the event cannot be used: what its `problem` says, frames that cannot be read, that are no numbers
            or of another number or shape than stated.
    """
    event, length = as_event(row), row["length"]
    for name in ARRAYS:
        if name in event:
            array = np.asarray(event[name][:])
            if array.ndim not in (3, 4) or len(array) != length or array.dtype.kind not in "buif":
                raise ValueError(
                    f"{place_of(row)}: `{name}` must be numbers ({length}, H, W) or ({length}, H, W, C), "
                    f"got {array.dtype} {array.shape}."
                )
            event[name] = array
    for name, series in event.get("series", {}).items():
        if len(series) != length:
            raise ValueError(f"{place_of(row)}: the series {name!r} must have {length} values, got {len(series)}.")
    return event


def missing_values(event: dict[str, Any], extractor: EarthformerFeatureExtractor) -> int:
    """How many of an event's values were not observed."""
    observed = extractor.observed(event["values"])
    if "observed" in event:
        given = event["observed"]
        observed = observed & (given if given.ndim == observed.ndim else given[..., None])
    return int(observed.size - np.count_nonzero(observed))


def open_table(name: str, data_dir: str | Path | None, split: str, **options: Any) -> datasets.Dataset:
    """The usable events of a source, or of a data set that was prepared.

    Args:
        name: of a source, of a folder of `prepare`, or an id on a hub, "namespace/name".
        data_dir, split, options: as for [`load_dataset`]; a prepared data set has no options.

    Raises:
        ValueError: see [`load_dataset`]; or options of a prepared data set.
    """
    if is_source(name):
        return usable(load_dataset(name, data_dir, split, **options), name)
    if options:
        raise ValueError(f"`options` are those of a source, {name!r} is a data set that was prepared.")
    return datasets.load_dataset(name, split=split)


# ---------------------------------------------------------------------------------------------------------------------
# Hosted
# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    tables: Mapping[str, datasets.Dataset],
    folder: str | Path,
    facts: Facts | None = None,
    max_shard_size: int | str = "500MB",
    num_proc: int = 1,
) -> list[str]:
    """Write tables as a folder that `datasets.load_dataset(folder)` reads, and, once pushed to a hub, anywhere.

    Args:
        tables: split -> table, as of `earthformer_hf.load_dataset(name, keep_bad=True)`.
        folder: where to write; shards in it that are finished and whole are kept.
        facts: for the card and the missing values; those of the tables' source if omitted.
        max_shard_size: of the frames before compression.
        num_proc: processes that write shards.

    Returns:
        What is wrong with the events that were left out, each with its file and row: empty if none was.

    Raises:
        ValueError: the folder holds other shards, or there are no events.
    """
    folder = Path(folder)
    tables = {split: table.with_format(None) for split, table in tables.items() if len(table)}
    if not tables:
        raise ValueError("`tables` holds no events.")
    facts = facts or _facts_of(next(iter(tables.values())))
    shards = []
    for split, table in tables.items():
        parts = list(_parts(table, max_shard_size))
        names = [f"{split}-{index:05d}-of-{len(parts):05d}.parquet" for index in range(len(parts))]
        shards += [(part, folder / "data" / name) for part, name in zip(parts, names)]
    others = set((folder / "data").glob("*.parquet")) - {path for _, path in shards}
    if others:
        raise ValueError(f"`folder` holds shards of other tables or of another size, such as {min(others)}.")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write = partial(_write_shard, feature_extractor=facts.feature_extractor)
    records = _each(write, shards, num_proc, f"write {folder}")
    (folder / "SHA256SUMS").write_text("".join(f"{record['sha256']}  data/{record['name']}\n" for record in records))
    card = folder / "README.md"
    if card.exists() and _MARK not in card.read_text():
        logger.warning(f"{card} was written by hand, and is kept as it is.")
    else:
        card.write_text(_card(folder.resolve().name, facts, records))
    return [problem for record in records for problem in record["problems"]]


def _facts_of(table: datasets.Dataset) -> Facts:
    good = (row for row in table if not row.get("problem"))
    row = next(good, table[0])
    reference = verified(row["reference"]) if row.get("reference") else {}
    if reference.get("source", CACHE) == CACHE:
        raise ValueError("`facts` must be given for tables that do not refer to a source.")
    return builder_of(reference["source"]).facts_of(reference)


def _parts(table: datasets.Dataset, max_shard_size: int | str) -> Iterator[datasets.Dataset]:
    """The table cut into parts of about that many bytes of frames, judged by its first event that can be read."""
    size = 0
    for row in table:
        try:
            event = as_event(row)
            size = sum(math.prod(event[name].shape) * event[name].dtype.itemsize for name in ARRAYS if name in event)
            break
        except ValueError:  # is listed when its shard is written
            continue
    most = datasets.utils.py_utils.convert_file_size_to_int(max_shard_size)
    events_per_part = max(1, most // max(size, 1))
    for start in range(0, len(table), events_per_part):
        yield table.select(range(start, min(start + events_per_part, len(table))))


def _each(function: Callable, tasks: list[tuple], num_proc: int, description: str) -> list:
    """The function of every task, in parallel, with a progress bar."""
    with ProcessPoolExecutor(num_proc) if num_proc > 1 else nullcontext() as pool:
        results = pool.map(function, *zip(*tasks)) if pool else map(function, *zip(*tasks))
        return list(logging.tqdm(results, total=len(tasks), desc=description, unit="shard"))


def _write_shard(table: datasets.Dataset, path: Path, feature_extractor: dict[str, Any]) -> dict[str, Any]:
    """Write a shard, if it is not there, and return its record: counts, checksum, and what is wrong with events."""
    record_path = path.parents[1] / ".prepare" / f"{path.name}.json"
    made_of = f"{table._fingerprint} {json.dumps(feature_extractor, sort_keys=True)}"  # which says what is missing
    if path.exists() and record_path.exists():
        record = json.loads(record_path.read_text())
        if record["made_of"] == made_of and record["sha256"] == _checksum(path):
            return record
    extractor = EarthformerFeatureExtractor(**feature_extractor)
    record = {"name": path.name, "split": path.name.split("-")[0], "made_of": made_of, "problems": []}
    record |= {"events": 0, "frames": 0, "values": 0, "missing": 0}
    part = path.with_suffix(".part")
    rows: list[dict] = []
    waiting = 0  # bytes of frames in `rows`
    schema = HOSTED_FEATURES.arrow_schema
    with pq.ParquetWriter(part, schema, compression="none", use_dictionary=False) as writer:
        for row in table:
            for part_row, event in _usable_parts(row, record):
                try:
                    missing = missing_values(event, extractor)
                    if missing == event["values"].size:
                        raise ValueError(f"{place_of(part_row)}: none of its values was observed.")
                except ValueError as reason:
                    record["problems"].append(f"{record['split']}, {reason}")
                    continue
                rows.append(_hosted_row(part_row, event, missing))
                record["events"] += 1
                record["frames"] += part_row["length"]
                record["values"] += event["values"].size
                record["missing"] += missing
                waiting += event["values"].nbytes
            if waiting >= _ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, waiting = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    record["sha256"] = _checksum(part)
    record["bytes"] = part.stat().st_size
    part.replace(path)
    record_path.parent.mkdir(exist_ok=True)
    record_path.write_text(json.dumps(record))
    return record


def _usable_parts(row: dict[str, Any], record: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row and its event in memory; where a file of it is damaged, those of what is left."""
    try:
        yield row, event_in_memory(row)
        return
    except ValueError as reason:
        problem = str(reason)
    parts: list[dict[str, Any]] = []
    problems: list[str] = []
    with suppress(ValueError):  # not of this machine
        reference = verified(row.get("reference"))
        if reference["source"] != CACHE and not row.get("problem"):
            parts, problems = builder_of(reference["source"]).without_damage(row)
    record["problems"] += [f"{record['split']}, {text}" for text in problems or [problem]]
    for part in parts if problems else []:
        yield from _usable_parts(part, record)


def _hosted_row(row: dict[str, Any], event: dict[str, Any], missing: int) -> dict[str, Any]:
    series = {name: np.asarray(values).tolist() for name, values in event.get("series", {}).items()}
    return {
        **{name: row[name] for name in ("id", "length", "time", "geo")},
        **{name: compressed(event[name]) if name in event else None for name in ARRAYS},
        "series": json.dumps(series) if series else None,
        "missing": missing,
    }


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _card(name: str, facts: Facts, records: list[dict[str, Any]]) -> str:
    splits = list(dict.fromkeys(record["split"] for record in records))
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    header = DatasetCardData(
        license="other", license_name="see-below", license_link="README.md", pretty_name=name,
        tags=["earthformer_hf", "spatio-temporal"], configs=[{"config_name": "default", "data_files": files}],
    )  # fmt: skip
    lines = ["---", header.to_yaml(), "---", _MARK, "", f"# {name}", ""]
    lines += ["| split | events | frames | missing values | MB |", "|---|---|---|---|---|"]
    for split in splits:
        total = {
            key: sum(record[key] for record in records if record["split"] == split)
            for key in ("events", "frames", "missing", "values", "bytes")
        }
        missing = f"{total['missing'] / max(total['values'], 1):.3%}"
        lines.append(f"| {split} | {total['events']} | {total['frames']} | {missing} | {total['bytes'] / 1e6:.1f} |")
    lines += ["", "| | |", "|---|---|"]
    for field in fields(facts):
        value = str(getattr(facts, field.name)).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {field.name.replace('_', ' ')} | {value} |")
    lines += [
        "", "```python", "import datasets", "from earthformer_hf import EarthformerFeatureExtractor, windows", "",
        f'events = datasets.load_dataset("<namespace>/{name}", split="{splits[0]}", streaming=True)',
        f"extractor = EarthformerFeatureExtractor(**{facts.feature_extractor})",
        "items = windows(events, extractor.encode, context_length, prediction_length)", "```", "",
        "A row is an event. A frame is compressed on its own: zstd of the bytes of an array of `shape` and `dtype`.",
    ]  # fmt: skip
    problems = [problem for record in records for problem in record["problems"]]
    if problems:
        lines += [
            "",
            f"Left out, since they cannot be used ({len(problems)}):",
            "",
            *(f"- {text}" for text in problems),
        ]
    return "\n".join(lines) + "\n"


def push(folder: str | Path, repo_id: str, private: bool | None = None, token: str | None = None) -> CommitInfo:
    """Upload a folder of [`prepare`] in one commit; shards that the hub has are not sent again.

    Raises:
        ValueError: the folder is not finished, or a shard differs from its checksum.
    """
    folder = Path(folder)
    if not (folder / "SHA256SUMS").is_file() or not (folder / "README.md").is_file():
        raise ValueError(f"`folder` {folder} must hold SHA256SUMS and README.md, as `prepare` writes them at its end.")
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        checksum, name = line.split("  ")
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise ValueError(f"`folder`: {folder / name} is missing or differs from its checksum: prepare it again.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message="Upload the data set",
        allow_patterns=["README.md", "SHA256SUMS", "data/*.parquet"], delete_patterns="data/*.parquet",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Cached
# ---------------------------------------------------------------------------------------------------------------------


def cached(
    table: datasets.Dataset, folder: str | Path, max_shard_size: int | str = "2GB", num_proc: int = 1
) -> datasets.Dataset:
    """The same events, whose frames are read from memory maps of plain arrays in a local folder.

    Args:
        table: of `earthformer_hf.load_dataset`, or hosted.
        folder: what is there already of this table is not written again. On several processes the first one writes.
        max_shard_size: of a folder of arrays.
        num_proc: processes that write.

    Returns:
        A table of the same rows; for [`~earthformer_hf.data.windows.windows`].

    Raises:
        ValueError: an event cannot be used, or differs from the others in shape, dtype or fields.
    """
    table = table.with_format(None)
    parts = list(_parts(table, max_shard_size))
    place = Path(folder).expanduser().resolve() / table._fingerprint
    place.mkdir(parents=True, exist_ok=True)
    tasks = [(part, place / f"{index:05d}") for index, part in enumerate(parts)]
    with PartialState().main_process_first():
        _each(_write_arrays, tasks, num_proc, f"cache {folder}")
    references = []
    for part, path in tasks:
        lengths = part["length"][:]
        for first, length in zip(np.cumsum([0, *lengths]).tolist(), lengths):
            references.append({"source": CACHE, "path": str(path), "first": first, "length": length})
    rows = table.select_columns(["id", "length", "time", "geo"])
    rows.info.builder_name = CACHE
    return rows.add_column("reference", [signed(reference) for reference in references])


def _write_arrays(table: datasets.Dataset, folder: Path) -> None:
    if folder.exists():
        return
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    arrays: dict[str, np.memmap] = {}
    total, first = sum(table["length"][:]), 0
    for row in table:
        event = event_in_memory(row)
        found = {name: event[name] for name in ARRAYS if name in event}
        found |= {f"series.{name}": np.asarray(series) for name, series in event.get("series", {}).items()}
        for name, array in found.items():
            if name not in arrays and first == 0:
                arrays[name] = np.lib.format.open_memmap(
                    part / f"{name}.npy", "w+", array.dtype, (total, *array.shape[1:])
                )
        kinds = [{name: (str(x.dtype), x.shape[1:]) for name, x in group.items()} for group in (found, arrays)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"`table`: {place_of(row)} holds {kinds[0]}, those before it {kinds[1]}.")
        for name, array in found.items():
            arrays[name][first : first + len(array)] = array
        first += row["length"]
    for array in arrays.values():
        array.flush()
    os.replace(part, folder)


__all__ = ["cached", "event_in_memory", "missing_values", "open_table", "prepare", "push"]
