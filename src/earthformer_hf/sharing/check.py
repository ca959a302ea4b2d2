"""What is wrong with a model folder, before it is pushed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..errors import one_line
from .card_text import card_metadata, read_card, sections, shown_pictures, tables
from .files import is_picture_beside, model_files
from .loading import check_configurations, check_weights, has_weights, load
from .words import without_local_paths


# The name of a score, alone or with what follows it: CSI-74, csi_74, CSI74. The bias of a layer (`proj.bias`) is none.
METRIC_NAME = re.compile(
    r"(?<![\w.])(csim?|pod|far|hss|ets|fss|bias|crpss?|mse|mae|rmse|ssim|psnr|lpips|fvd|fid|pearsonr?|corr(elation)?"
    r"|skill|earthnetscore)(?![a-z])",
    re.IGNORECASE,
)


MAX_SCORES = 100_000_000  # bytes of a score file


def check(folder: str | Path) -> list[str]:
    """What is wrong with a folder of a model or pipeline; empty if nothing is.

    Card: metadata; a score in a table has a source, that is, a column `source` or the measuring command in its section
    (scores in prose or HTML are not looked for); `model-index` states only what `scores.json` holds. Configuration and
    weights: [`load`] takes them, by the classes of this package and no code of the folder. Without weights, everything
    else can be built, and the card gives the conversion command. Files: none that is published is a link out of the
    folder. A feature extractor alone is neither model nor pipeline, and does not pass.
    """
    folder = Path(folder)
    problems = [f"README.md: {problem}" for problem in _card_problems(folder)]
    try:
        if folder.is_dir():
            model_files(folder)
        if has_weights(folder):
            load(folder)
        else:
            check_weights(folder, check_configurations(folder))
    except (ValueError, OSError) as reason:
        problems.append(f"configuration: {one_line(reason)}")
    return problems


def _card_problems(folder: Path) -> Iterator[str]:
    path = folder / "README.md"
    if not path.is_file():
        yield "missing"
        return
    try:
        text = read_card(path)
        data, body = card_metadata(text)
    except (ValueError, OSError) as reason:
        yield one_line(reason)
        return
    if data is None:
        yield "it does not begin with metadata between lines of ---"
        return
    library = "diffusers" if (folder / "model_index.json").is_file() else "transformers"
    if not isinstance(data.get("license"), str):
        yield f"`license` must be a licence's short name, got {_short(data.get('license'))}"
    if data.get("library_name") != library:
        yield f"`library_name` must be {library!r}, got {_short(data.get('library_name'))}"
    if library == "transformers" and data.get("pipeline_tag") != "time-series-forecasting":
        yield f"`pipeline_tag` must be 'time-series-forecasting', got {_short(data.get('pipeline_tag'))}"
    for name in ("tags", "datasets", "metrics"):
        value = data.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            yield f"`{name}` must be a list of names, got {_short(value)}"
        elif name == "tags" and not {"earthformer", "prediff"} & {*value}:
            yield f"`tags` must name earthformer or prediff, got {_short(value)}"
    if "model-index" in data:
        yield from _index_problems(data["model-index"], path.with_name("scores.json"))
    for name in shown_pictures(text):
        if not is_picture_beside(path, name):
            yield f"it shows {name!r}, which is no picture beside it"
    yield from _table_problems(body)
    if not has_weights(folder) and "conversion/convert_" not in text:
        yield "the folder holds no weights, so the card must give the conversion command (conversion/convert_...)"


def _index_problems(index: Any, path: Path) -> Iterator[str]:
    """A `model-index` states only values that `scores.json` holds, and says where each is from."""
    try:
        _, results = model_index_to_eval_results(index)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as reason:
        yield f"`model-index`: {type(reason).__name__}: {_short(str(reason))}"
        return
    our_scores = np.zeros(0)
    if path.is_file():
        try:
            if path.stat().st_size > MAX_SCORES:
                raise ValueError(f"more than {MAX_SCORES:,} bytes")
            text = path.read_text(encoding="utf-8")
            if without_local_paths(text) != text:
                yield "scores.json names folders of the machine that it was written on"
            our_scores = np.array(_numbers(json.loads(text)), dtype="float64")
        except (ValueError, RecursionError, OverflowError) as reason:
            yield f"scores.json is no JSON: {reason}"
            return
    for result in results:
        value = result.metric_value
        if not (isinstance(value, int | float) and np.isclose(our_scores, float(value), rtol=1e-3, atol=0).any()):
            yield f"`model-index`: {result.metric_type} {value} is not in scores.json, where our own scores are"
        if result.source_name is None:
            yield f"`model-index`: {result.metric_type} {value} has no source"


def _numbers(stored: Any) -> list[float]:
    """All numbers in a JSON document."""
    numbers, entries = [], [stored]
    while entries:
        entry = entries.pop()
        if isinstance(entry, dict | list):
            entries += entry.values() if isinstance(entry, dict) else entry
        elif isinstance(entry, int | float):
            numbers.append(float(entry))
    return numbers


def _short(value: Any) -> str:
    return f"{value!r:.200}"


def _table_problems(text: str) -> Iterator[str]:
    """Tables of scores need a source: a column of that name, or the command that measured them in the same section."""
    for title, lines, code in sections(text):
        if any(line.startswith(("python ", "earthformer-hf ")) for line in code):
            continue
        for table in tables(lines):
            if not (METRIC_NAME.search("\n".join(table)) or "score" in title.lower()):
                continue
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table]
            names = [name.lower() for name in rows[0]]
            if "source" not in names:
                yield f"a score without a source: {title!r} has a table without a column `source`, and no command"
                continue
            for row in rows[2:]:
                if len(row) != len(names) or not re.search(r"\w", row[names.index("source")]):
                    yield f"a score without a source: {' | '.join(row)} in {title!r}"


__all__ = ["check"]
