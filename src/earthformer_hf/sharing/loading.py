"""What a folder or hub repository holds, by the classes of this package, with every refusal naming its file."""

import difflib
import glob
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from ..configuration_earthformer import EarthformerConfig
from ..errors import one_line
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..modeling_earthformer import EarthformerForPrediction, EarthformerModel
from ..pipeline_hub import empty_network, scheduler_class
from ..pipeline_prediff import PreDiffPipeline
from .card_text import read_card, shown_pictures
from .export import NETWORKS
from .files import COMPONENTS, MODEL_FILES


MAX_CONFIGURATION = 10_000_000  # bytes
MAX_TIMESTEPS = 100_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5")  # weights of a kind that is never loaded
INFINITE = ("lambda_min_clipped",)  # entries of schedulers that diffusers itself writes as infinite


# -- loading ----------------------------------------------------------------------------------------------------------


def load(source: str | Path, revision: str | None = None, token: str | bool | None = None) -> tuple[Path, Any, Any]:
    """What a folder or hub repository holds, by the classes of this package, in the precision that it is stored in.

    Args:
        source: a folder or a hub id.
        revision, token: of a hub id.

    Returns:
        The folder (of the cache for a hub id), the model or pipeline, and the model's feature extractor or None.

    Raises:
        ValueError: the folder holds no weights or no model, or what [`check_configurations`] and [`check_weights`]
            refuse.
    """
    folder = Path(source)
    if not folder.is_dir():
        refuse_mistyped(folder)
        folder = _download(str(source), revision, token)
    if not has_weights(folder):
        raise ValueError(f"{source}: no weights (*.safetensors).")
    check_weights(folder, check_configurations(folder))
    extractor = _extractor(folder) if (folder / "preprocessor_config.json").is_file() else None
    with _naming(folder), _without_reports():
        if (folder / "model_index.json").is_file():
            dtypes = {name: _stored_dtype(folder / name) for name in NETWORKS if (folder / name).is_dir()}
            pipeline = PreDiffPipeline.from_pretrained(folder, torch_dtype=dtypes)
            for name in NETWORKS:
                _refuse_not_finite(folder / name, getattr(pipeline, name))
            return folder, pipeline, None
        model, info = _model_class(folder).from_pretrained(folder, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{len(info['missing_keys'])} tensors are missing {sorted(info['missing_keys'])[:3]}")
        _refuse_not_finite(folder, model)
    return folder, model, extractor


def refuse_mistyped(source: str | Path):
    """Refuse, before a hub is asked, the path of a folder that is none.

    Raises:
        ValueError: a path that is no folder, and no name of a hub repository: beside others in a folder, or deeper.
    """
    folder = Path(source)
    if folder.is_dir():
        return
    beside = sorted(path.parent.name for path in folder.parent.glob("*/*.json")) if len(folder.parts) > 1 else []
    if beside or len(folder.parts) > 2 or folder.exists():
        near = difflib.get_close_matches(folder.name, beside, 3, 0.3) or sorted(set(beside))[:3]
        hint = f"; there are {', '.join(str(folder.parent / name) for name in dict.fromkeys(near))}" if near else ""
        raise ValueError(f"`model`: no folder {folder}{hint}.")


def has_weights(folder: Path) -> bool:
    """Whether weights lie in a folder or one below it."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*/*.safetensors"))


def weight_patterns(variant: str | None) -> list[str]:
    """What matches the files of weights of a variant in a repository, whole or in shards."""
    part = "" if variant is None else f".{variant}"
    names = [f"model{part}.safetensors", f"model{part}-*-of-*.safetensors", f"model.safetensors.index{part}.json"]
    return [prefix + name for prefix in ("", "forecaster/", "*/diffusion_pytorch_") for name in names]


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """The card, then what belongs to it: configurations, scores, weights, and the pictures that it shows."""
    folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns="README.md"))
    card = folder / "README.md"
    pictures = shown_pictures(read_card(card)) if card.is_file() else []
    files = ["README.md", "*.json", *weight_patterns(variant=None)]
    files += [glob.escape(name) for name in pictures if "/" not in name]
    commit = folder.name  # that the card is of
    return Path(snapshot_download(repo_id, revision=commit, token=token, allow_patterns=files))


def _model_class(folder: Path) -> Any:
    with _naming(folder / "config.json"):
        headless = (EarthformerConfig.from_pretrained(folder).architectures or []) == ["EarthformerModel"]
    return EarthformerModel if headless else EarthformerForPrediction


def _extractor(folder: Path) -> EarthformerFeatureExtractor:
    with _naming(folder / "preprocessor_config.json"):
        return EarthformerFeatureExtractor.from_pretrained(folder)


def _stored_dtype(folder: Path) -> torch.dtype:
    """The precision of the first stored tensor of a network."""
    for path in sorted([*folder.glob("*model.safetensors"), *folder.glob("*model-*-of-*.safetensors")]):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                return file.get_tensor(name).dtype
    return torch.float32


def to_single_precision(model: torch.nn.Module | PreDiffPipeline, device: str | torch.device) -> None:
    """A model, or the networks of a pipeline, become float32 on a device: frames are, whatever the weights were saved
    in. Without diffusers' warning of modules that are none."""
    parts = [getattr(model, name) for name in NETWORKS] if isinstance(model, PreDiffPipeline) else [model]
    for network in parts:
        if network is not None:
            torch.nn.Module.to(network, device, torch.float32)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever a library says of a file, say of which."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as reason:  # of any kind, as hostile files have it
        text = one_line(reason)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from reason


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silence the library's tables of tensors: what does not fit is an error here, and says so itself. Its list of
    layers that are not sharded, which it makes at this level of the first logger, says nothing either."""
    names = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    before = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in before:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


# -- what is refused before anything is built -------------------------------------------------------------------------


def check_configurations(folder: Path) -> dict[Path, torch.nn.Module]:
    """Build everything of a folder but its weights: networks without memory, scheduler, feature extractor.

    Returns:
        The networks, of [`networks_of`].

    Raises:
        ValueError: names the file, and what of it cannot work.
    """
    for path in [folder, *(folder / name for name in COMPONENTS)]:
        if (path / "adapter_config.json").exists():  # which names another model to load in this one's place
            raise ValueError(f"{path}: it holds adapter_config.json, and adapters are not loaded")
        for file in sorted(path.glob("*.json")):
            if file.name != "scores.json" and MODEL_FILES.fullmatch(file.name):
                _refuse_entries(_read_configuration(file), file)
    if (folder / "preprocessor_config.json").is_file():
        _extractor(folder)
    networks = networks_of(folder)
    if not (folder / "model_index.json").is_file():
        return networks
    with _naming(folder / "model_index.json"):
        index = PreDiffPipeline.load_config(folder)
    stored = [name for name in ("scheduler", "feature_extractor") if (index.get(name) or [None])[0] is not None]
    if "feature_extractor" in stored:
        _extractor(folder / "feature_extractor")
    if "scheduler" in stored:
        with _naming(folder / "scheduler/scheduler_config.json"):
            loader: Any = scheduler_class(index["scheduler"][1])
            scheduler = loader.from_pretrained(folder, subfolder="scheduler")
            betas = getattr(scheduler, "betas", None)
            if betas is not None and not torch.isfinite(betas).all():
                raise ValueError("its noise levels are not finite")
    return networks


def networks_of(folder: Path) -> dict[Path, torch.nn.Module]:
    """The networks of a folder, built from their configurations without memory for weights.

    Raises:
        ValueError: names the file, and what of it cannot work.
    """
    if (folder / "model_index.json").is_file():
        with _naming(folder / "model_index.json"):
            index = PreDiffPipeline.load_config(folder)
        networks = {}
        for name in NETWORKS:
            if (index.get(name) or [None])[0] is not None:
                with _naming(folder / name / "config.json"):
                    networks[folder / name] = empty_network(NETWORKS[name], folder / name)
        return networks
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: neither config.json nor model_index.json")
    with _naming(folder / "config.json"):
        return {folder: empty_network(_model_class(folder), folder)}


def check_weights(folder: Path, networks: dict[Path, torch.nn.Module]):
    """Compare names and shapes of the stored tensors with the networks of a folder, of [`networks_of`].

    Raises:
        ValueError: names the file that cannot be read, or is no safetensors, or the tensors that do not fit.
    """
    for path, network in networks.items():
        stored: dict[str, tuple[int, ...]] = {}
        for file in sorted(file for file in path.glob("*.safetensors") if MODEL_FILES.fullmatch(file.name)):
            with _naming(file):
                try:
                    opened = safe_open(file, "pt")
                except Exception as reason:
                    raise ValueError(f"{file} cannot be read: {reason}") from reason
                with opened:
                    stored |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        others = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
        if not stored and (others or has_weights(folder)):
            raise ValueError(f"{path}: weights must be safetensors, got {others or 'none'}")
        if not stored or "quantization_config" in json.loads((path / "config.json").read_text(encoding="utf-8")):
            continue  # a quantized network has names of its own
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if stored != expected:
            different = sorted(name for name in stored.keys() | expected if stored.get(name) != expected.get(name))
            raise ValueError(
                f"{path}: the weights do not fit the configuration in {len(different)} tensors, such as "
                f"{different[:3]}"
            )


def _refuse_not_finite(path: Path, network: torch.nn.Module | None):
    for name, tensor in network.state_dict().items() if network is not None else ():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: the weights must be finite, got NaN or infinity in {name}")


def _read_configuration(path: Path) -> dict[str, Any]:
    with _naming(path):
        if path.stat().st_size > MAX_CONFIGURATION:
            raise ValueError(f"{path.stat().st_size:,} bytes, and a configuration may have {MAX_CONFIGURATION:,}")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as reason:
            raise ValueError(f"it is no JSON: {reason}") from reason
        if not isinstance(stored, dict):
            raise ValueError(f"it must be a JSON object, got {type(stored).__name__}")
        return stored


def _refuse_entries(stored: dict[str, Any], path: Path):
    """Refuse what a configuration holds and cannot work, or leads out of the folder."""
    with _naming(path):
        if path.name.endswith(".index.json"):
            shards = {*stored["weight_map"].values()}
            if not all(isinstance(name, str) and MODEL_FILES.fullmatch(name) and "/" not in name for name in shards):
                raise ValueError(
                    f"`weight_map` must name files of weights beside it, got {sorted(map(str, shards))[:3]}"
                )
        if "/" in f"{stored.get('attn_implementation')} {stored.get('_attn_implementation')}":
            raise ValueError("`attn_implementation` names code of a repository, which is not loaded")
        if path.name == "scheduler_config.json":
            large = [name for name, value in stored.items() if isinstance(value, int) and abs(value) > MAX_TIMESTEPS]
            if large and large[0] not in ("num_train_timesteps", "steps_offset"):
                raise ValueError(f"`{large[0]}` must be at most {MAX_TIMESTEPS:,}, got {stored[large[0]]!r:.60}")
        entries = list(stored.items())
        while entries:
            name, value = entries.pop()
            if isinstance(value, dict):
                entries += value.items()
            elif isinstance(value, list):
                entries += [(name, entry) for entry in value]
            elif isinstance(value, float) and not math.isfinite(value) and name not in INFINITE:
                raise ValueError(f"`{name}` must be finite, got {value}")
        for name in ("num_train_timesteps", "steps_offset"):
            value = stored.get(name, 1)
            lowest = 1 if name == "num_train_timesteps" else 0
            if not (isinstance(value, int) and lowest <= value <= MAX_TIMESTEPS):
                raise ValueError(f"`{name}` must be an integer of {lowest} to {MAX_TIMESTEPS:,}, got {value!r:.60}")
        if stored.get("num_labels", 0) not in range(1000):  # of which the library makes as many names
            raise ValueError(f"`num_labels` must be an integer below 1,000, got {stored['num_labels']!r:.60}")
        factor, shift = stored.get("scaling_factor", 1), stored.get("shift_factor") or 0
        if type(factor) not in (int, float) or not 1e-9 < abs(factor) < 1e9:
            raise ValueError(f"`scaling_factor` must be a number other than 0, got {factor!r:.60}")
        if type(shift) not in (int, float) or abs(shift) > 1e9:
            raise ValueError(f"`shift_factor` must be a number, got {shift!r:.60}")


__all__ = [
    "check_configurations",
    "check_weights",
    "has_weights",
    "load",
    "refuse_mistyped",
    "to_single_precision",
    "networks_of",
    "weight_patterns",
]
