"""Sharing: folders and hub repositories that load with this package, and without it by `trust_remote_code`.

```
model + feature extractor   config.json  preprocessor_config.json  *.safetensors  README.md  code for transformers
pipeline                    model_index.json  vae/ unet/ scheduler/ ...            README.md  code for diffusers
```

With this package imported, transformers' Auto classes and [`PreDiffPipeline`] load its own classes and run no code of
the folder. Without it, transformers runs that code, and with or without it `DiffusionPipeline` does, both only if they
are told to trust it. Sources: the documentation of custom models in transformers (`auto_map`) and of custom components
in diffusers (a module's name in `model_index.json`).
"""

import ast
import filecmp
import json
import math
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import CommitInfo, HfApi, ModelCard, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoFeatureExtractor
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .configuration_earthformer import EarthformerConfig
from .feature_extraction_earthformer import EarthformerFeatureExtractor
from .modeling_earthformer import EarthformerForPrediction, EarthformerModel
from .pipeline_prediff import PreDiffPipeline
from .unet_earthformer import EarthformerAlignmentModel, EarthformerUNetModel


logger = logging.get_logger(__name__)

PACKAGE = Path(__file__).parent
EXTRACTOR = "feature_extraction_earthformer.EarthformerFeatureExtractor"
AUTO_MAP = {
    "AutoConfig": "configuration_earthformer.EarthformerConfig",
    "AutoModel": "modeling_earthformer.EarthformerModel",
    "AutoModelForTimeSeriesPrediction": "modeling_earthformer.EarthformerForPrediction",
}
NETWORKS = {"vae": AutoencoderKL, "unet": EarthformerUNetModel, "alignment": EarthformerAlignmentModel}
# The files that say what a folder holds, with the entry of each that says it is of this package.
CONFIGURATIONS = {
    "model_index.json": ("_class_name", ("PreDiffPipeline", ["pipeline_prediff", "PreDiffPipeline"])),
    "config.json": ("model_type", ("earthformer",)),
    "preprocessor_config.json": ("feature_extractor_type", ("EarthformerFeatureExtractor",)),
}
# What an export writes, besides the pictures of the card.
WRITTEN = re.compile(
    r"README\.md|scores\.json|((vae|unet|alignment|scheduler|feature_extractor)/)?"
    r"(((preprocessor_|scheduler_)?config|model_index)\.json"
    r"|(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    r"|((configuration|modeling|feature_extraction|unet)_earthformer|pipeline_prediff|cuboid|guidance|schedules)\.py)"
)

Shareable = EarthformerModel | EarthformerForPrediction | PreDiffPipeline | EarthformerFeatureExtractor


# ---------------------------------------------------------------------------------------------------------------------
# Writing a folder
# ---------------------------------------------------------------------------------------------------------------------


def export(
    model_or_pipeline: Shareable,
    folder: str | Path,
    feature_extractor: EarthformerFeatureExtractor | None = None,
    card: str | Path | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a folder that loads with this package, and without it by `trust_remote_code=True`.

    The same model gives the same bytes. The folder appears when it is complete: after a failure, nothing is left.

    Args:
        model_or_pipeline: a model, a [`PreDiffPipeline`], or a feature extractor alone.
        folder: where to write. If it holds exactly this already, nothing happens.
        feature_extractor: to put beside a model; a pipeline brings its own.
        card: the model card, a Markdown file; a `scores.json` beside it and the pictures that it shows come along. If
            omitted, a short one that claims nothing is written.
        overwrite: replace what `folder` holds, all of it, if that is a model of this package and nothing beside it.
        max_shard_size: of a file of weights, such as "5GB".

    Returns:
        The folder.

    Raises:
        ValueError: something else than the above, or `folder` holds something else.
        OSError: the disk is full or cannot be written.
    """
    folder = Path(folder).resolve()
    extractor = _extractor(model_or_pipeline, feature_extractor)
    if folder.exists():
        _refuse_to_replace(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        if isinstance(model_or_pipeline, PreDiffPipeline):
            _write_pipeline(model_or_pipeline, draft, max_shard_size)
        elif not isinstance(model_or_pipeline, EarthformerFeatureExtractor):
            _write_model(model_or_pipeline, draft, max_shard_size)
        if extractor is not None:
            _write_extractor(extractor, draft)
        _write_card(model_or_pipeline, card, draft)
        _put(draft, folder, overwrite)
    except SafetensorError as reason:
        raise OSError(f"{folder} was not written: {reason}") from reason
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _extractor(thing: Any, feature_extractor: Any) -> EarthformerFeatureExtractor | None:
    """What lies in the folder itself, not in a pipeline's subfolder; refuses what cannot be exported."""
    if isinstance(thing, PreDiffPipeline):
        expected = NETWORKS | {"feature_extractor": EarthformerFeatureExtractor}
        for name, kind in expected.items():
            part = getattr(thing, name)
            optional = part is None and name in PreDiffPipeline._optional_components
            if not optional and not isinstance(part, kind):
                raise ValueError(f"`model_or_pipeline`: its {name} must be a {kind.__name__}, got {type(part)}.")
        if feature_extractor is not None:
            raise ValueError("`feature_extractor`: a pipeline brings its own, set `pipeline.feature_extractor`.")
        return None
    if isinstance(thing, EarthformerFeatureExtractor):
        if feature_extractor is not None:
            raise ValueError("`feature_extractor` goes beside a model, and `model_or_pipeline` is one itself.")
        return thing
    if not isinstance(thing, (EarthformerModel, EarthformerForPrediction)):
        raise ValueError(
            "`model_or_pipeline` must be an EarthformerForPrediction, EarthformerModel, PreDiffPipeline or "
            f"EarthformerFeatureExtractor of this package, got {type(thing).__module__}.{type(thing).__name__}."
        )
    if not isinstance(feature_extractor, EarthformerFeatureExtractor | None):
        raise ValueError(f"`feature_extractor` must be an EarthformerFeatureExtractor, got {type(feature_extractor)}.")
    return feature_extractor


def _write_model(model: Any, folder: Path, max_shard_size: int | str):
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _edit(folder / "config.json", auto_map=AUTO_MAP)
    _copy_code("modeling_earthformer", folder)


def _write_extractor(extractor: EarthformerFeatureExtractor, folder: Path):
    extractor.save_pretrained(folder)
    _edit(folder / "preprocessor_config.json", auto_map={"AutoFeatureExtractor": EXTRACTOR})
    _copy_code("feature_extraction_earthformer", folder)


def _write_pipeline(pipeline: PreDiffPipeline, folder: Path, max_shard_size: int | str):
    """diffusers looks for a component's class in the component's folder, and downloads one file of code for it."""
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    index: dict[str, Any] = {"_class_name": ["pipeline_prediff", "PreDiffPipeline"]}
    for name in ("unet", "alignment"):
        network = getattr(pipeline, name)
        if network is not None:
            index[name] = ["unet_earthformer", type(network).__name__]
            (folder / name / "unet_earthformer.py").write_text(self_contained("unet_earthformer"), encoding="utf-8")
    if pipeline.feature_extractor is not None:
        index["feature_extractor"] = EXTRACTOR.split(".")
        _write_extractor(pipeline.feature_extractor, folder / "feature_extractor")
    _edit(folder / "model_index.json", **index)
    for name in ("vae", "unet", "alignment"):
        if (folder / name).is_dir():
            _edit(folder / name / "config.json")
    for module in ("pipeline_prediff", "guidance"):
        _copy_code(module, folder)
    (folder / "cuboid.py").unlink()
    (folder / "unet_earthformer.py").write_text(self_contained("unet_earthformer"), encoding="utf-8")


def _edit(path: Path, **entries):
    """Set entries of a JSON file, and drop where the object was loaded from."""
    stored = json.loads(path.read_text(encoding="utf-8")) | entries
    stored.pop("_name_or_path", None)
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_code(module: str, folder: Path):
    """A module of this package and the siblings that it imports, directly or not."""
    path = PACKAGE / f"{module}.py"
    for source in {path, *map(Path, get_relative_import_files(path))}:
        shutil.copyfile(source, folder / source.name)


def self_contained(module: str) -> str:
    """The source of a module of this package, with the siblings that it imports at its top written in their place."""
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            sibling = (PACKAGE / f"{node.module}.py").read_text(encoding="utf-8").splitlines()
            begin, end = f"# -- {node.module}.py begins --", f"# -- {node.module}.py ends --"
            lines[node.lineno - 1 : node.end_lineno] = [begin, *sibling, end]
    return "\n".join(lines) + "\n"


def _refuse_to_replace(folder: Path, overwrite: bool):
    if not folder.is_dir():
        raise ValueError(f"`folder`: {folder} is a file.")
    if overwrite and any(folder.iterdir()):
        foreign = _foreign(folder)
        if foreign is not None:
            raise ValueError(
                f"`folder`: {folder} is replaced as a whole only if it holds a model of this package and nothing "
                f"beside it, but {foreign}; empty it yourself, or choose another."
            )


def _foreign(folder: Path) -> str | None:
    """Why a folder is not just an export, or None."""
    if Path.cwd().is_relative_to(folder):
        return "the working directory is in it"
    if (folder / ".git").exists():
        return "it is a git checkout"
    configurations = [folder / name for name in CONFIGURATIONS if (folder / name).is_file()]
    if not configurations:
        return "it has no configuration of one"
    for path in configurations:
        key, ours = CONFIGURATIONS[path.name]
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            stored = None
        if not isinstance(stored, dict) or stored.get(key) not in ours:
            return f"{path.name} is of something else"
    card = folder / "README.md"
    shown = _pictures(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []
    pictures = [name for name in shown if _beside(card, name)]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and not WRITTEN.fullmatch(name) and name not in pictures:
            return f"{name} is no file of an export"
    return None


def _put(draft: Path, folder: Path, overwrite: bool):
    """Move a finished draft to its place; what was there goes only when the draft is in."""
    if not folder.exists():
        draft.rename(folder)
    elif not any(folder.iterdir()):  # it stays, since the working directory may be in it
        for path in list(draft.iterdir()):
            path.rename(folder / path.name)
    elif _same(draft, folder):
        return
    elif not overwrite:
        raise ValueError(f"`folder`: {folder} holds something else; overwrite=True (--overwrite) replaces all of it.")
    else:
        old = draft.with_name(f"{draft.name}-old")
        folder.rename(old)
        try:
            draft.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old)


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    files = [sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file()) for root in (one, other)]
    return files[0] == files[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in files[0])


# ---------------------------------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------------------------------


def _write_card(thing: Any, card: str | Path | None, folder: Path):
    if card is None:
        (folder / "README.md").write_text(_plain_card(thing), encoding="utf-8")
        return
    card = Path(card)
    if not card.is_file():
        raise ValueError(f"`card` must be a Markdown file, got {str(card)!r}.")
    shutil.copyfile(card, folder / "README.md")
    for name in _pictures(card.read_text(encoding="utf-8")):
        if not _beside(card, name):
            raise ValueError(f"`card`: {card} shows {name!r}, which must be a file beside it.")
        shutil.copyfile(card.parent / name, folder / name)
    if (card.parent / "scores.json").is_file():
        shutil.copyfile(card.parent / "scores.json", folder / "scores.json")


def _pictures(text: str) -> list[str]:
    """The pictures that a card shows, but for those of other sites."""
    return [name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) if "://" not in name]


def _beside(card: Path, name: str) -> bool:
    return Path(name).name == name and (card.parent / name).is_file()


def _plain_card(thing: Any) -> str:
    """A card that says what follows from the configuration, and that nothing else is known."""
    note = "With the package earthformer_hf imported, its own classes are loaded and no code of this folder is run."
    if isinstance(thing, PreDiffPipeline):
        unet, vae = thing.unet.config, thing.vae.config
        size = [n * 2 ** (len(vae.block_out_channels) - 1) for n in unet.sample_size]
        given = f"(B, {unet.context_length}, {size[0]}, {size[1]}, {vae.in_channels})"
        result = f"(B, E, {unet.prediction_length}, {size[0]}, {size[1]}, {vae.out_channels})"
        extractor, header = thing.feature_extractor, {"library_name": "diffusers", "tags": ["prediff"]}
        load, kind = "from earthformer_hf import PreDiffPipeline", "PreDiff ensemble forecasts"
        load += "\n\npipeline = PreDiffPipeline.from_pretrained(folder)"
        note = (
            "This runs no code of this folder. Without the package, the code in this folder is run by\n"
            "`diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`."
        )
    elif isinstance(thing, EarthformerFeatureExtractor):
        given, result, extractor = "(B, T, H, W, C)", "(B, T, H, W, C)", thing
        header = {"library_name": "transformers", "tags": ["earthformer"]}
        load, kind = "from transformers import AutoFeatureExtractor", "A feature extractor of Earthformer"
        load += "\n\nextractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)"
    else:
        config = thing.config
        height, width = config.image_size
        given = f"(B, {config.context_length}, {height}, {width}, {config.num_channels})"
        result = f"(B, {config.prediction_length}, {height}, {width}, {config.num_output_channels})"
        extractor, header = None, {"library_name": "transformers", "pipeline_tag": "time-series-forecasting"}
        header |= {"tags": ["earthformer"]}
        load, kind = "from transformers import AutoModelForTimeSeriesPrediction", "An Earthformer"
        load += "\n\nmodel = AutoModelForTimeSeriesPrediction.from_pretrained(folder, trust_remote_code=True)"
    raw = "not stated" if extractor is None else f"the model's; raw values are {extractor.variable}, {extractor.units}"
    return (
        f"---\nlicense: other\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {kind}\n\n"
        "No evaluation yet. Training data, licence and limits are not stated.\n\n"
        "| name | shape | range |\n|---|---|---|\n"
        f"| `past_values` | {given} float32 | {raw} |\n| `predictions` | {result} float32 | as `past_values` |\n\n"
        f"```python\n{load}\n```\n\n{note}\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loading and pushing
# ---------------------------------------------------------------------------------------------------------------------


def load(source: str | Path, revision: str | None = None, token: str | bool | None = None) -> tuple[Path, Any, Any]:
    """What a folder or hub repository holds, by the classes of this package, in the precision that it is stored in.

    Args:
        source: a folder or a hub id.
        revision, token: of a hub id.

    Returns:
        The folder (of the cache for a hub id), the model or pipeline, and the model's feature extractor or None.

    Raises:
        ValueError: the folder holds no weights or no model.
    """
    folder = Path(source)
    if not folder.is_dir():
        patterns = ["*.json", "*.safetensors", "README.md"]
        folder = Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns))
    if not has_weights(folder):
        raise ValueError(f"{source}: no weights (*.safetensors).")
    if (folder / "model_index.json").is_file():
        dtypes = {name: _stored_dtype(folder / name) for name in NETWORKS if (folder / name).is_dir()}
        return folder, PreDiffPipeline.from_pretrained(folder, torch_dtype=dtypes), None
    extractor = None
    if (folder / "preprocessor_config.json").is_file():
        extractor = EarthformerFeatureExtractor.from_pretrained(folder)
    named = EarthformerConfig.from_pretrained(folder).architectures or []
    kind = EarthformerModel if named == ["EarthformerModel"] else EarthformerForPrediction
    return folder, kind.from_pretrained(folder), extractor


def has_weights(folder: Path) -> bool:
    """Whether weights lie in a folder or one below it."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*/*.safetensors"))


def _stored_dtype(folder: Path) -> torch.dtype:
    """The one of the first tensor in a network's folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                return file.get_tensor(name).dtype
    return torch.float32


def push(
    model_or_pipeline: Shareable,
    repo_id: str,
    feature_extractor: EarthformerFeatureExtractor | None = None,
    card: str | Path | None = None,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    max_shard_size: int | str = "5GB",
) -> CommitInfo:
    """Export to a hub repository, which is created if need be: the card first, then all else in one commit.

    A repository's card is kept if none is given. An interrupted upload leaves the repository's files as they were.

    Args:
        model_or_pipeline, feature_extractor, card, max_shard_size: as for [`export`].
        repo_id: "name" or "namespace/name".
        commit_message, private, token: as everywhere on the hub.
        revision: a branch, created if need be; the main one if omitted.
        tag: a name for the resulting commit.

    Returns:
        The commit.

    Raises:
        ValueError: as for [`export`].
        huggingface_hub.errors.HfHubHTTPError: what the hub refuses.
    """
    with TemporaryDirectory() as place:
        folder = export(model_or_pipeline, Path(place) / "export", feature_extractor, card, False, max_shard_size)
        message = commit_message or f"Upload {type(model_or_pipeline).__name__}"
        keep = card is None
        return upload(folder, repo_id, message, private, token, revision, tag, keep_card=keep)


def upload(
    folder: Path,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """Upload a model folder as it is; arguments and result as for [`push`].

    Args:
        keep_card: leave a card that the repository has.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if not (keep_card and api.file_exists(repo_id, "README.md", revision=revision)):
        api.upload_file(
            path_or_fileobj=folder / "README.md", path_in_repo="README.md", repo_id=repo_id, revision=revision,
            commit_message="Upload the model card",
        )  # fmt: skip
    stale = ["*.safetensors", "*.safetensors.index.json"] if has_weights(folder) else None
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, ignore_patterns="README.md", delete_patterns=stale,
        commit_message=commit_message, revision=revision,
    )  # fmt: skip
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


# Code that travels to the hub cannot import this file, so its classes get their `push_to_hub` here.
kind: Any
for kind in (EarthformerModel, EarthformerForPrediction, EarthformerFeatureExtractor, PreDiffPipeline):
    kind.push_to_hub = push


# ---------------------------------------------------------------------------------------------------------------------
# Checking a folder before it is pushed
# ---------------------------------------------------------------------------------------------------------------------

METRIC = re.compile(
    r"(?<![\w.])(csim?|pod|far|hss|ets|fss|bias|crpss?|mse|mae|rmse|ssim|psnr|lpips|fvd|fid|pearsonr?|corr(elation)?"
    r"|skill|earthnetscore)(?![a-z])",  # with what follows: CSI-74, csi_74, CSI74; a tensor's name.bias is none
    re.IGNORECASE,
)
# Lines with a |, the second of them of dashes; a | at their ends is optional.
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
        found = _networks(folder)
        for place, network in found.items():
            problems += [f"{place.relative_to(folder)}: {problem}" for problem in _weight_problems(place, network)]
        for path in folder.rglob("preprocessor_config.json"):
            AutoFeatureExtractor.from_pretrained(path.parent)
    except (ValueError, TypeError, OSError, KeyError) as reason:
        problems.append(f"configuration: {' '.join(str(reason).split())}")
    return problems


def _networks(folder: Path) -> dict[Path, torch.nn.Module]:
    """The networks of a folder, built from their configurations without memory for weights."""
    if (folder / "model_index.json").is_file():
        index = PreDiffPipeline.load_config(folder)
        kinds = {folder / name: NETWORKS[name] for name in NETWORKS if (index.get(name) or [None])[0] is not None}
        with torch.device("meta"):
            return {place: kind.from_config(kind.load_config(place)) for place, kind in kinds.items()}
    if not (folder / "config.json").is_file():
        raise ValueError("neither config.json nor model_index.json")
    config = EarthformerConfig.from_pretrained(folder)
    with torch.device("meta"):
        headless = config.architectures == ["EarthformerModel"]
        return {folder: EarthformerModel(config) if headless else EarthformerForPrediction(config)}


def _weight_problems(place: Path, network: torch.nn.Module) -> Iterator[str]:
    stored: dict[str, tuple[int, ...]] = {}
    for path in place.glob("*.safetensors"):
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
    for name in _pictures(text):
        if not _beside(path, name):
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
        own = _numbers(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
    except ValueError as reason:
        yield f"scores.json is no JSON: {reason}"
        return
    for result in results:
        value = result.metric_value
        if not any(isinstance(value, int | float) and math.isclose(value, n, rel_tol=1e-3) for n in own):
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
            if measured or not (METRIC.search(table) or "score" in title.lower()):
                continue
            names = [name.lower() for name in rows[0]]
            if "source" not in names:
                yield f"a score without a source: {title!r} has a table without a column `source`, and no command"
                continue
            for row in rows[2:]:
                if len(row) != len(names) or not re.search(r"\w", row[names.index("source")]):
                    yield f"a score without a source: {' | '.join(row)} in {title!r}"


__all__ = ["check", "export", "has_weights", "load", "push", "self_contained", "upload"]
