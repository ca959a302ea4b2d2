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
import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from safetensors import SafetensorError
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..modeling_earthformer import EarthformerForPrediction, EarthformerModel
from ..pipeline_prediff import PreDiffPipeline
from ..unet_earthformer import EarthformerAlignmentModel, EarthformerUNetModel
from .card_text import read_card, shown_pictures
from .cards import Shareable, copy_card, plain_card
from .drafts import draft_for, publish
from .files import MODEL_FILES, is_picture_beside


PACKAGE = Path(__file__).parents[1]


NETWORKS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "unet": EarthformerUNetModel,
    "alignment": EarthformerAlignmentModel,
    "forecaster": EarthformerForPrediction,
}


# Where transformers finds the code of a folder: name of an Auto class -> module and class.
FEATURE_EXTRACTOR_CLASS = "feature_extraction_earthformer.EarthformerFeatureExtractor"
AUTO_MAP = {
    "AutoConfig": "configuration_earthformer.EarthformerConfig",
    "AutoModel": "modeling_earthformer.EarthformerModel",
    "AutoModelForTimeSeriesPrediction": "modeling_earthformer.EarthformerForPrediction",
}


# Component of a pipeline -> the module of its code.
COMPONENT_MODULES = {
    "unet": "unet_earthformer",
    "alignment": "unet_earthformer",
    "forecaster": "modeling_earthformer",
}


# Configuration file -> the entry by which it belongs to a model of this package, and the values of that entry.
CONFIGURATION_ENTRIES = {
    "model_index.json": ("_class_name", ("PreDiffPipeline", ["pipeline_prediff", "PreDiffPipeline"])),
    "config.json": ("model_type", ("earthformer",)),
    "preprocessor_config.json": ("feature_extractor_type", ("EarthformerFeatureExtractor",)),
}


def export(
    model_or_pipeline: Shareable,
    folder: str | Path,
    feature_extractor: EarthformerFeatureExtractor | None = None,
    card: str | Path | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
) -> Path:
    """Write a folder that loads with this package, and without it by `trust_remote_code=True`.

    The same model gives the same bytes. The folder appears when it is complete: after a failure, what it held before
    is there again. See `drafts.py` for what a kill leaves.

    Args:
        model_or_pipeline: a model, a [`PreDiffPipeline`], or a feature extractor alone.
        folder: where to write; it may be a mount point or a link. If it holds exactly this already, nothing happens.
        feature_extractor: to put beside a model; a pipeline brings its own.
        card: the model card, a Markdown file; a `scores.json` beside it and the pictures that it shows come along,
            unless they are links out of its folder. If omitted, a short one that claims nothing is written.
        overwrite: replace what `folder` holds, all of it, if that is a model of this package and nothing beside it.
        max_shard_size: of a file of weights, such as "5GB".
        variant: part of the names of the files of weights, such as "fp16" in `model.fp16.safetensors`.

    Returns:
        The folder.

    Raises:
        ValueError: something else than the above, or `folder` holds something else.
        OSError: the disk is full or cannot be written.
    """
    folder = Path(folder).resolve()
    extractor = _checked_extractor(model_or_pipeline, feature_extractor)
    if folder.exists():
        _refuse_to_replace(folder, overwrite)
    with draft_for(folder) as draft:
        try:
            if isinstance(model_or_pipeline, PreDiffPipeline):
                _write_pipeline(model_or_pipeline, draft, max_shard_size, variant)
            elif not isinstance(model_or_pipeline, EarthformerFeatureExtractor):
                _write_model(model_or_pipeline, draft, max_shard_size, variant)
        except SafetensorError as reason:
            raise OSError(f"{folder} was not written: {reason}") from reason
        if extractor is not None:
            _write_extractor(extractor, draft)
        if card is None:
            (draft / "README.md").write_text(plain_card(model_or_pipeline, extractor), encoding="utf-8")
        else:
            copy_card(card, draft)
        publish(draft, folder, overwrite)
    return folder


def _checked_extractor(model_or_pipeline: Any, feature_extractor: Any) -> EarthformerFeatureExtractor | None:
    """The feature extractor that lies in the folder itself, as a pipeline's does not.

    Raises:
        ValueError: something that cannot be exported, or not together.
    """
    if isinstance(model_or_pipeline, PreDiffPipeline):
        expected = NETWORKS | {"feature_extractor": EarthformerFeatureExtractor}
        for name, component_class in expected.items():
            component = getattr(model_or_pipeline, name)
            optional = component is None and name in PreDiffPipeline._optional_components
            if not optional and not isinstance(component, component_class):
                raise ValueError(
                    f"`model_or_pipeline`: its {name} must be a {component_class.__name__}, got {type(component)}."
                )
        if feature_extractor is not None:
            raise ValueError("`feature_extractor`: a pipeline brings its own, set `pipeline.feature_extractor`.")
        return None
    if isinstance(model_or_pipeline, EarthformerFeatureExtractor):
        if feature_extractor is not None:
            raise ValueError("`feature_extractor` goes beside a model, and `model_or_pipeline` is one itself.")
        return model_or_pipeline
    if not isinstance(model_or_pipeline, (EarthformerModel, EarthformerForPrediction)):
        given = type(model_or_pipeline)
        raise ValueError(
            "`model_or_pipeline` must be an EarthformerForPrediction, EarthformerModel, PreDiffPipeline or "
            f"EarthformerFeatureExtractor of this package, got {given.__module__}.{given.__name__}."
        )
    if not isinstance(feature_extractor, EarthformerFeatureExtractor | None):
        raise ValueError(f"`feature_extractor` must be an EarthformerFeatureExtractor, got {type(feature_extractor)}.")
    return feature_extractor


# -- what is written --------------------------------------------------------------------------------------------------


def _write_model(model: Any, folder: Path, max_shard_size: int | str, variant: str | None):
    model.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
    # One configuration serves all variants: without a precision, each loads in that of its own weights.
    precision = {} if variant is None else {"dtype": None}
    _set_entries(folder / "config.json", auto_map=AUTO_MAP, **precision)
    _copy_code("modeling_earthformer", folder)


def _write_extractor(extractor: EarthformerFeatureExtractor, folder: Path):
    extractor.save_pretrained(folder)
    _set_entries(folder / "preprocessor_config.json", auto_map={"AutoFeatureExtractor": FEATURE_EXTRACTOR_CLASS})
    _copy_code("feature_extraction_earthformer", folder)


def _write_pipeline(pipeline: PreDiffPipeline, folder: Path, max_shard_size: int | str, variant: str | None):
    """diffusers looks for a component's class in the component's folder, and downloads one file of code for it."""
    pipeline.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
    index: dict[str, Any] = {"_class_name": ["pipeline_prediff", "PreDiffPipeline"]}
    for name, module in COMPONENT_MODULES.items():
        network = getattr(pipeline, name)
        if network is not None:
            index[name] = [module, type(network).__name__]
            (folder / name / f"{module}.py").write_text(self_contained(module), encoding="utf-8")
    if pipeline.feature_extractor is not None:
        index["feature_extractor"] = FEATURE_EXTRACTOR_CLASS.split(".")
        _write_extractor(pipeline.feature_extractor, folder / "feature_extractor")
    _set_entries(folder / "model_index.json", **index)
    for name in NETWORKS:
        if (folder / name).is_dir():
            _set_entries(folder / name / "config.json")
    code = {"pipeline_prediff", "guidance"}
    code |= {name for module in code for name in get_relative_imports(PACKAGE / f"{module}.py")}
    for module in code:
        whole = module in COMPONENT_MODULES.values()
        source = self_contained(module) if whole else (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        (folder / f"{module}.py").write_text(source, encoding="utf-8")


def _set_entries(path: Path, **entries):
    """Set entries of a JSON file, and drop the one that says where the object was loaded from."""
    stored = json.loads(path.read_text(encoding="utf-8")) | entries
    stored.pop("_name_or_path", None)
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_code(module: str, folder: Path):
    """A module of this package and the siblings that it imports, directly or not."""
    path = PACKAGE / f"{module}.py"
    for source in {path, *map(Path, get_relative_import_files(path))}:
        shutil.copyfile(source, folder / source.name)


def self_contained(module: str) -> str:
    """The source of a module of this package, with the siblings that it imports at its top, directly or not, written
    in the place of their first import."""
    return "\n".join(_with_siblings(module, set())) + "\n"


def _with_siblings(module: str, written: set[str]) -> list[str]:
    """Lines of a module and of those siblings that are not `written` yet."""
    source, found, after = (PACKAGE / f"{module}.py").read_text(encoding="utf-8"), list[str](), 0
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found += lines[after : node.lineno - 1]
            after = node.end_lineno or node.lineno
            name = str(node.module)
            if name not in written:
                written.add(name)
                found += [f"# -- {name}.py begins --", *_with_siblings(name, written), f"# -- {name}.py ends --"]
    return found + lines[after:]


# -- where it is written ----------------------------------------------------------------------------------------------


def _refuse_to_replace(folder: Path, overwrite: bool):
    if not folder.is_dir():
        raise ValueError(f"`folder`: {folder} is a file.")
    if overwrite and any(folder.iterdir()):
        reason = _not_an_export(folder)
        if reason is not None:
            raise ValueError(
                f"`folder`: {folder} is replaced as a whole only if it holds a model of this package and nothing "
                f"beside it, but {reason}; empty it yourself, or choose another."
            )


def _not_an_export(folder: Path) -> str | None:
    """Why a folder is not just an export, or None."""
    if Path.cwd().is_relative_to(folder):
        return "the working directory is in it"
    if (folder / ".git").exists():
        return "it is a git checkout"
    configurations = [folder / name for name in CONFIGURATION_ENTRIES if (folder / name).is_file()]
    if not configurations:
        return "it has no configuration of one"
    for path in configurations:
        entry, values = CONFIGURATION_ENTRIES[path.name]
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            stored = None
        if not isinstance(stored, dict) or stored.get(entry) not in values:
            return f"{path.name} is of something else"
    card = folder / "README.md"
    shown = shown_pictures(read_card(card)) if card.is_file() else []
    pictures = [name for name in shown if is_picture_beside(card, name)]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        file = path.is_symlink() or not path.is_dir()
        if file and not MODEL_FILES.fullmatch(name) and name not in pictures:
            return f"{name} is no file of an export"
    return None


__all__ = ["AUTO_MAP", "CONFIGURATION_ENTRIES", "NETWORKS", "PACKAGE", "export", "self_contained"]
