"""What is wrong with a model folder, before it is pushed."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoFeatureExtractor

from ..configuration_earthformer import EarthformerConfig
from ..modeling_earthformer import EarthformerForPrediction, EarthformerModel
from ..pipeline_prediff import PreDiffPipeline
from .cards import is_file_beside, shown_pictures
from .export import NETWORKS
from .push import has_weights


# The name of a score, alone or with what follows it: CSI-74, csi_74, CSI74. The bias of a layer (`proj.bias`) is none.
METRIC_NAME = re.compile(
    r"(?<![\w.])(csim?|pod|far|hss|ets|fss|bias|crpss?|mse|mae|rmse|ssim|psnr|lpips|fvd|fid|pearsonr?|corr(elation)?"
    r"|skill|earthnetscore)(?![a-z])",
    re.IGNORECASE,
)


# A Markdown table: lines with a |, the second of them of dashes; a | at their ends is optional.
TABLE = re.compile(r"^.*\|.*\n(?=.*\|)[-:| \t]*-[-:| \t]*$(?:\n.*\|.*)*", re.MULTILINE)


def check(folder: str | Path) -> list[str]:
    """What is wrong with a folder of a model or pipeline; empty if nothing is.

    Card: metadata; a score in a table has a source, that is, a column `source` or the measuring command in its section
    (scores in prose or HTML are not looked for); `model-index` states only what `scores.json` holds. Configuration:
    every network can be built from it, and stored weights have its names and shapes. Without weights, the card gives
    the conversion command. A feature extractor alone is neither model nor pipeline, and does not pass.
    """
    folder = Path(folder)
    problems = [f"README.md: {problem}" for problem in _card_problems(folder)]
    try:
        for path, network in networks_of(folder).items():
            problems += [f"{path.relative_to(folder)}: {problem}" for problem in _weight_problems(path, network)]
        for path in folder.rglob("preprocessor_config.json"):
            AutoFeatureExtractor.from_pretrained(path.parent)
    except (ValueError, TypeError, OSError, KeyError, StrictDataclassError) as reason:
        problems.append(f"configuration: {' '.join(str(reason).split())}")
    return problems


def networks_of(folder: Path) -> dict[Path, torch.nn.Module]:
    """The networks of a folder, built from their configurations without memory for weights."""
    if (folder / "model_index.json").is_file():
        index = PreDiffPipeline.load_config(folder)
        stored = [n for n in NETWORKS if (index.get(n) or [None])[0] is not None]
        with torch.device("meta"):
            return {folder / n: NETWORKS[n].from_config(NETWORKS[n].load_config(folder / n)) for n in stored}
    if not (folder / "config.json").is_file():
        raise ValueError("neither config.json nor model_index.json")
    config = EarthformerConfig.from_pretrained(folder)
    with torch.device("meta"):
        headless = config.architectures == ["EarthformerModel"]
        return {folder: EarthformerModel(config) if headless else EarthformerForPrediction(config)}


def _weight_problems(folder: Path, network: torch.nn.Module) -> Iterator[str]:
    stored: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        try:
            file = safe_open(path, "pt")
        except SafetensorError as reason:
            yield f"{path.name} cannot be read: {reason}"
            return
        with file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if stored and stored != expected:
        different = sorted(name for name in stored.keys() | expected if stored.get(name) != expected.get(name))
        yield f"the weights do not fit the configuration in {len(different)} tensors, such as {different[:3]}"


def _card_problems(folder: Path) -> Iterator[str]:
    path = folder / "README.md"
    if not path.is_file():
        yield "missing"
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as reason:
        yield f"it is no UTF-8: {reason}"
        return
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        data = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError as reason:
        yield f"its metadata are no YAML: {' '.join(str(reason).split())}"
        return
    if not isinstance(data, dict):
        yield "it does not begin with metadata between lines of ---"
        return
    library = "diffusers" if (folder / "model_index.json").is_file() else "transformers"
    if not isinstance(data.get("license"), str):
        yield f"`license` must be a licence's short name, got {data.get('license')!r}"
    if data.get("library_name") != library:
        yield f"`library_name` must be {library!r}, got {data.get('library_name')!r}"
    if library == "transformers" and data.get("pipeline_tag") != "time-series-forecasting":
        yield f"`pipeline_tag` must be 'time-series-forecasting', got {data.get('pipeline_tag')!r}"
    for name in ("tags", "datasets", "metrics"):
        value = data.get(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            yield f"`{name}` must be a list of names, got {value!r}"
        elif name == "tags" and not {"earthformer", "prediff"} & {*value}:
            yield f"`tags` must name earthformer or prediff, got {value!r}"
    if "model-index" in data:
        yield from _index_problems(path)
    for name in shown_pictures(text):
        if not is_file_beside(path, name):
            yield f"it shows {name!r}, which is no file beside it"
    yield from _table_problems(text[header.end() :] if header else text)
    if not has_weights(folder) and "conversion/convert_" not in text:
        yield "the folder holds no weights, so the card must give the conversion command (conversion/convert_...)"


def _index_problems(card: Path) -> Iterator[str]:
    """A `model-index` states only values that `scores.json` holds, and says where each is from."""
    try:
        results = ModelCard.load(card).data.eval_results or []
    except (ValueError, KeyError, TypeError) as reason:
        yield f"`model-index`: {' '.join(str(reason).split())}"
        return
    path = card.with_name("scores.json")
    try:
        our_scores = _numbers(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
    except ValueError as reason:
        yield f"scores.json is no JSON: {reason}"
        return
    for result in results:
        value = result.metric_value
        if not any(isinstance(value, int | float) and math.isclose(value, n, rel_tol=1e-3) for n in our_scores):
            yield f"`model-index`: {result.metric_type} {value} is not in scores.json, where our own scores are"
        if result.source_name is None:
            yield f"`model-index`: {result.metric_type} {value} has no source"


def _numbers(stored: Any) -> list[float]:
    """All numbers in a JSON document."""
    if isinstance(stored, dict | list):
        return [n for entry in (stored.values() if isinstance(stored, dict) else stored) for n in _numbers(entry)]
    return [stored] if isinstance(stored, int | float) else []


def _table_problems(text: str) -> Iterator[str]:
    """Tables of scores need a source: a column of that name, or the command that measured them in the same section."""
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        title = section.splitlines()[0].lstrip("# ") if section.startswith("#") else "the beginning"
        measured = re.search(r"^```[^`]*^(?:python|earthformer-hf) [^`]*^```", section, re.MULTILINE)
        for table in TABLE.findall(section):
            rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
            if measured or not (METRIC_NAME.search(table) or "score" in title.lower()):
                continue
            names = [name.lower() for name in rows[0]]
            if "source" not in names:
                yield f"a score without a source: {title!r} has a table without a column `source`, and no command"
                continue
            for row in rows[2:]:
                if len(row) != len(names) or not re.search(r"\w", row[names.index("source")]):
                    yield f"a score without a source: {' | '.join(row)} in {title!r}"


__all__ = ["check", "networks_of"]
