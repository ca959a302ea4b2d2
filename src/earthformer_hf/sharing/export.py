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
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from safetensors import SafetensorError
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..modeling_earthformer import EarthformerForPrediction, EarthformerModel
from ..pipeline_prediff import PreDiffPipeline
from ..unet_earthformer import EarthformerAlignmentModel, EarthformerUNetModel
from .cards import beside, copy_card, pictures_of


logger = logging.get_logger(__name__)


PACKAGE = Path(__file__).parents[1]


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
        copy_card(model_or_pipeline, card, draft)
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
    shown = pictures_of(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []
    pictures = [name for name in shown if beside(card, name)]
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
