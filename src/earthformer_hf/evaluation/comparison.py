"""Score files side by side: only those of one protocol on the same data compare."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line
from ..sharing.tables import text_table
from .protocols import hash_of
from .reports import difference_rows
from .tally import differences


NAMED = 3  # events that a message names
MAX_FILE = 1_000_000_000  # bytes


def compare(paths: Sequence[str | Path]) -> str:
    """The headline scores of several score files as text; the fair CRPS alone where ensembles differ in size.

    Below them, the scores of the first system of the first file minus those of the first system of each other one,
    with intervals from the same draws of events, where both files hold draws.

    Raises:
        ValueError: a file that is no score file, or whose protocol is not the one that its hash is of; another
            protocol than the first file's, with its fields that differ; or other data, with what differs.
    """
    documents = [_read(path) for path in paths]
    first, notes = documents[0], []
    for path, document in zip(paths[1:], documents[1:]):
        if reason := _other_protocol(first, document) or _other_data(first, document):
            raise ValueError(f"{paths[0]} and {path} do not compare: {reason}.")
    if without := [str(path) for path, document in zip(paths, documents) if "scored" not in document]:
        notes.append(f"{', '.join(without)}: without a digest of the data; that these are the same is not known")
    rows = {
        f"{path}: {system}": scores["summary"]
        for path, document in zip(paths, documents)
        for system, scores in document["scores"].items()
    }
    left_out = set()
    if len({document.get("ensemble_size") for document in documents}) > 1:
        left_out = {"crps"}  # the plain CRPS depends on the ensemble size, the fair one does not
    rows = {label: {name: x for name, x in row.items() if name not in left_out} for label, row in rows.items()}
    for path, document in zip(paths, documents):
        for system, chosen in document.get("headline_thresholds", {}).items():
            for name, values in chosen.items():
                notes.append(f"{path}: {name} of {system} is over the thresholds {values} only")
    lines = [f"protocol {first['protocol']['name']}, {first['windows']} windows", "", text_table(rows)]
    pairs, without_draws = {}, []
    for path, document in zip(paths[1:], documents[1:]):
        if "draws" in first and "draws" in document:
            label, row = _difference(paths[0], first, path, document)
            pairs[label] = {name: entry for name, entry in row.items() if name not in left_out}
        else:
            without_draws.append(str(path))
    if without_draws:
        notes.append(
            f"no paired differences with {', '.join(without_draws)}: they need draws of 10 independent events or more "
            "in both files"
        )
    if cells := difference_rows(pairs):
        lines += ["", "paired differences with 95 % intervals, from the same draws of events", "", text_table(cells)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _read(path: str | Path) -> dict[str, Any]:
    """A score file, with the hash that follows from the fields of its protocol.

    Raises:
        ValueError: names the file, and what of it is no score file's.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError(f"it has more than {MAX_FILE:,} bytes")
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        _check(document)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as reason:
        raise ValueError(f"{path} is not a score file: {type(reason).__name__}: {one_line(reason)}") from reason
    return document


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _check(document: Any):
    """Raise if a document has not the structure of a score file, or another protocol than its hash says."""
    number = int | float
    _require(document, dict, "the file")
    _require(document["protocol"], dict, "protocol")
    _require(document["windows"], int, "windows")
    _require(document["scores"], dict, "scores")
    for system, scores in document["scores"].items():
        _require(scores, dict, system)
        _require(scores["summary"], dict, f"summary of {system}")
        for name, value in scores["summary"].items():
            _require(value, number | None, f"{name} of {system}")
    if not document["scores"]:
        raise ValueError("`scores` must hold a system")
    for name in ("headline_thresholds", "draws"):
        for system, entries in _require(document.get(name, {}), dict, name).items():
            for score, values in _require(entries, dict, f"{name} of {system}").items():
                for value in _require(values, list, f"{name} of {system}, {score}"):
                    _require(value, number | None, f"{name} of {system}, {score}")
    if "draws" in document and (missing := set(document["scores"]) - {*document["draws"]}):
        first = next(iter(document["scores"]))
        if first in missing:
            raise ValueError(f"`draws` must hold {first!r}")
    if "scored" in document:
        _require(document["data"], dict, "data")
        _require(_require(document["scored"], dict, "scored")["digest"], str, "digest")
        for event, entry in _require(document["scored"]["events"], dict, "events").items():
            if len(_require(entry, list, event)) != 4:
                raise ValueError(f"`events`: {event} must have 4 entries, got {len(entry)}")
    if hash_of(document["protocol"]) != document["protocol_hash"]:
        raise ValueError("its `protocol_hash` is not that of its `protocol`: one of them was changed")


def _require(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"`{name}` must be {getattr(kind, '__name__', kind)}, got {value!r:.60}")
    return value


def _other_protocol(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """In what two protocols differ, if they do."""
    if first["protocol_hash"] == second["protocol_hash"]:
        return None
    one, other = first["protocol"], second["protocol"]
    differing = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    names = f"{one.get('name')!r} and {other.get('name')!r}"
    return f"their protocols {names} differ in {', '.join(differing) or 'their hash'}"


def _other_data(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """In what the scored data of two files differ, if they do, as far as both say it."""
    if first["windows"] != second["windows"]:
        return f"{first['windows']} and {second['windows']} windows"
    if "scored" not in first or "scored" not in second:
        return None
    if first["data"] != second["data"]:
        pairs = [f"{name} {first['data'][name]} and {second['data'].get(name)}" for name in first["data"]]
        return f"their data have {', '.join(pairs)}"
    if first["scored"]["digest"] == second["scored"]["digest"]:
        return None
    one, other = first["scored"]["events"], second["scored"]["events"]
    both = [event for event in one if event in other]
    reasons = {
        "only in the first": [event for event in one if event not in other],
        "only in the second": [event for event in other if event not in one],
        "at other times": [event for event in both if one[event][:3] != other[event][:3]],
        "with other values": [e for e in both if one[e][:3] == other[e][:3] and one[e][3] != other[e][3]],
    }
    words = [
        f"{len(events)} events {reason} ({', '.join(events[:NAMED])}{', ...' if len(events) > NAMED else ''})"
        for reason, events in reasons.items()
        if events
    ]
    return f"other data were scored: {'; '.join(words) or 'in another order'}"


def _difference(
    path: str | Path, first: dict[str, Any], other_path: str | Path, second: dict[str, Any]
) -> tuple[str, dict[str, list[float | None]]]:
    """The first systems of two files: words for them, and their differences."""
    systems = [next(iter(document["scores"])) for document in (first, second)]
    both = list(zip((first, second), systems))
    summaries = [
        {name: math.nan if x is None else x for name, x in document["scores"][system]["summary"].items()}
        for document, system in both
    ]
    draws = [
        {name: np.array(values, dtype="float64") for name, values in document["draws"][system].items()}
        for document, system in both
    ]
    thresholds = [document.get("headline_thresholds", {}).get(system, {}) for document, system in both]
    return f"{path}: {systems[0]} - {other_path}: {systems[1]}", differences(summaries, draws, thresholds)


__all__ = ["compare"]
