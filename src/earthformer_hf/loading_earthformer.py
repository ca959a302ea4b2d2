"""Checkpoints of Earthformer: loading leaves no weight random, on another grid either; a failed save changes nothing.

The tables of a model that depend on its grid (`image_size`, `context_length`, `prediction_length`) are its position
embeddings, with a row per frame, height, width or place, its position biases, with a row per offset between two tokens
of a cuboid, and the patterns and lead times of its linear forecast. The library converts the tensors of a checkpoint
one by one as it loads them; the conversion registered below carries these tables over to the grid of the model.

One rule serves every grid: position embeddings are interpolated, frames keep their distance from the present, and
biases keep the offsets that both grids have. Squared errors (1e-3) on validation windows of the two models in
`model_cards` (MRMS of 10 June 2019; Kaplan, 1977-1990), with this rule and with others:

| model, its new grid | this rule | other rules |
|---|---|---|
| radar, 7 context frames | 1.91 | 2.00 no delay, 2.18 offsets rescaled, 2.24 new, 1.94 frames interpolated, 2.54 new |
| radar, 18 forecast frames | 2.96 | 2.90 offsets rescaled, 2.97 new, 3.28 frames interpolated, 3.91 new |
| radar, 96 pixels | 2.18 | 2.18 offsets rescaled, 2.18 places cropped, 2.14 both new |
| radar, 160 pixels | 1.61 | 1.60 offsets rescaled, 1.64 places repeated, 1.58 both new |
| ocean, twice as fine | 24.3 | 23.2 offsets rescaled, 23.8 new, 26.7 places repeated, 52.6 new |

No other rule is more than 5 % better anywhere, and each is 14 % worse or more somewhere: rescaled offsets for fewer
frames, new tables for the ocean. The radar model learnt next to nothing about places, which are another region's in
every window, so that new ones serve it as well.
"""

import copy
import math
import os
import re
import tempfile
from collections.abc import Sequence
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils import logging

from .cuboid import CuboidAttentionBase, CuboidCrossAttention
from .linear_forecast import LinearForecast


logger = logging.get_logger(__name__)

GRID = ("image_size", "context_length", "prediction_length")
BY_LEAD = ("correction_weights", "calibration")  # what was fitted for each lead time, and shapes no weight


# ---------------------------------------------------------------------------------------------------------------------
# Tables on another grid
# ---------------------------------------------------------------------------------------------------------------------


def resize_places(table: torch.Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> torch.Tensor:
    """Embeddings of rows, columns or places, interpolated (bi)linearly: (prod(old), C) -> (prod(new), C)."""
    grid = table.float().T.reshape(1, -1, *old)
    grid = F.interpolate(grid, size=new, mode="linear" if len(new) == 1 else "bilinear")
    return grid.flatten(2)[0].T.to(table.dtype).contiguous()


def resize_frames(table: torch.Tensor, length: int, keep_last: bool) -> torch.Tensor:
    """Embeddings of frames: the last or the first stay, the farthest is repeated. (T, C) -> (length, C)."""
    first = len(table) - length if keep_last else 0
    frames = torch.arange(first, first + length, device=table.device)
    return table[frames.clamp(0, len(table) - 1)]


def resize_patterns(table: torch.Tensor, new: Sequence[int]) -> torch.Tensor:
    """Patterns of maps, interpolated bilinearly, of the same norm: (H, W, C, K) -> (*new, C, K)."""
    old = table.shape[:2]
    if tuple(old) == tuple(new):
        return table
    resized = resize_places(table.flatten(0, 1).flatten(1), tuple(old), tuple(new))
    return (math.sqrt(math.prod(old) / math.prod(new)) * resized).reshape(*new, *table.shape[2:])


def resize_bias(table: torch.Tensor, old: tuple[int, ...], new: tuple[int, ...], delay: int = 0) -> torch.Tensor:
    """Position biases of a cuboid of size `old` (time, height, width), for one of size `new`.

    An offset that both have keeps its row; an offset that only the new one has takes the row of the nearest that the
    old one has. An offset in time of the new cuboid is one of `delay` more in the old.

    (prod(2 * old - 1), heads) -> (prod(2 * new - 1), heads)
    """
    grid = table.reshape(*(2 * n - 1 for n in old), -1)
    for axis, (before, after) in enumerate(zip(old, new)):
        offsets = torch.arange(1 - after, after, device=table.device) + (delay if axis == 0 else 0)
        grid = grid.index_select(axis, offsets.clamp(1 - before, before - 1) + before - 1)
    return grid.flatten(0, 2)


class _Adaptation:
    """The grid of a checkpoint and that of the model it is loaded into, and which tables differ for it."""

    def __init__(self, stored: PreTrainedConfig):
        self.stored = stored
        self.model: PreTrainedModel | None = None  # of the checkpoint's configuration, on the meta device
        self.adapted: list[str] = []

    def adapt(self, model: PreTrainedModel, name: str, table: torch.Tensor) -> torch.Tensor:
        """A table of the checkpoint for the grid of `model`; one that the checkpoint's grid does not give stays."""
        changed = [key for key in GRID if getattr(self.stored, key) != getattr(model.config, key)]
        if not changed:
            return table
        if self.model is None:
            config = copy.deepcopy(model.config)
            for key in BY_LEAD:
                setattr(config, key, None)
            for key in changed:
                setattr(config, key, getattr(self.stored, key))
            with torch.device("meta"):
                self.model = type(model)(config)
        if table.shape != self.model.get_parameter(name).shape:
            return table
        new = self._resized(model, name, table)
        if new is not table:
            self.adapted.append(f"{name} {tuple(table.shape)} -> {tuple(new.shape)}")
        return new

    def _resized(self, model: PreTrainedModel, name: str, table: torch.Tensor) -> torch.Tensor:
        path, _, _ = name.rpartition(".")
        stored: Any = self.model
        before, after = stored.get_submodule(path), model.get_submodule(path)
        if isinstance(after, LinearForecast):
            if table.ndim == 3:  # a row per lead time
                leads = resize_frames(table.flatten(1), len(after.weight), keep_last=False)
                return leads.unflatten(1, table.shape[1:])
            return resize_patterns(table, after.patterns.shape[:2])
        if isinstance(after, CuboidAttentionBase):
            delay = 0
            if isinstance(after, CuboidCrossAttention):  # offsets count from the starts of context and forecast
                delay = model.config.context_length - self.stored.context_length
            if before.max_size == after.max_size and not delay:
                return table
            return resize_bias(table, before.max_size, after.max_size, delay)
        path, _, axis = path.rpartition(".")
        before, after = stored.get_submodule(path), model.get_submodule(path)
        if axis == "time":
            length = len(after.get_submodule("time").weight)
            return table if length == len(table) else resize_frames(table, length, keep_last="encoder" in path)
        places = {"height": slice(0, 1), "width": slice(1, 2), "place": slice(0, 2)}[axis]
        old, new = before.size[places], after.size[places]
        return table if old == new else resize_places(table, old, new)

    def stored_grid(self) -> str:
        """In words, for a message."""
        return ", ".join(f"{key}={getattr(self.stored, key)}" for key in GRID)


# Of the `from_pretrained` that is running, if it may adapt tables.
_running: ContextVar[_Adaptation | None] = ContextVar("running", default=None)


class AdaptToGrid(ConversionOps):
    """Asks the model that is loaded for its version of a table; tables that are saved stay as they are."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, Any]:
        """A table by the pattern of its name -> the table by its name."""
        (table,) = input_dict.values()
        table = table[0] if isinstance(table, list) else table
        name = kwargs["full_layer_name"]
        return {name: kwargs["model"].table_on_this_grid(name, table)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


register_checkpoint_conversion_mapping(
    "earthformer",
    [
        WeightConverter(name, name, operations=[AdaptToGrid()])
        for name in (
            "relative_position_bias",
            "position_embedding.time.weight",
            "position_embedding.height.weight",
            "position_embedding.width.weight",
            "position_embedding.place.weight",
            "linear_forecast.patterns",
            "linear_forecast.weight",
        )
    ],
    overwrite=True,  # code of a hub repository may have registered its own, which does the same
)


# ---------------------------------------------------------------------------------------------------------------------
# Loading and saving
# ---------------------------------------------------------------------------------------------------------------------


class CheckpointModel(PreTrainedModel):
    """Loading leaves no weight random, a failed save leaves the folder as it was, a push brings the code along."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As [`~transformers.PreTrainedModel.from_pretrained`], but never with a part of the weights left random.

        The head as a whole may be missing (it is then initialised, with a warning) or not wanted.

        With another `image_size`, `context_length` or `prediction_length` than the checkpoint's, given here or by
        `config`, the tables that depend on them are adapted, and one warning names them:

        - embeddings of frames: the last of the context and the first of the forecast keep theirs, and the farthest
          one's is repeated;
        - embeddings of rows, columns and places, and patterns of a linear forecast: linear interpolation;
        - position biases: an offset keeps its value, and the farthest one's is repeated; in cross-attention, it is the
          lag from a context frame to a forecast frame that keeps its value.

        Raises:
            ValueError: a folder's name is mistyped; the checkpoint lacks other tensors, or holds tensors that this
                model does not have, or some of another shape for another reason. With `ignore_mismatched_sizes=True`
                none is adapted, and those of another shape are initialised.
        """
        path, adaptation = pretrained_model_name_or_path, None
        if path is not None and not Path(path).is_dir() and find_spec(f"{__package__}.sharing") is not None:
            import_module(f"{__package__}.sharing.loading").refuse_mistyped(path)
        if path is not None and not ignore_mismatched_sizes and (config is not None or kwargs.keys() & set(GRID)):
            stored = _stored_config(cls.config_class, path, kwargs)
            adaptation = None if stored is None else _Adaptation(stored)
        before = _running.set(adaptation)
        try:
            model, info = super().from_pretrained(
                path, *model_args, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
        finally:
            _running.reset(before)
        _refuse_random_weights(model, info, path, check_shapes=not ignore_mismatched_sizes)
        if adaptation is not None and adaptation.adapted:
            tables = ", ".join(adaptation.adapted)
            logger.warning(
                f"{cls.__name__}: {path} has {adaptation.stored_grid()}; adapted to the grid of this model: {tables}."
            )
        return (model, info) if output_loading_info else model

    def table_on_this_grid(self, name: str, table: torch.Tensor) -> torch.Tensor:
        """A table of the checkpoint that is being loaded, or of this model when it is saved, for this model's grid."""
        adaptation = _running.get()
        return table if adaptation is None else adaptation.adapt(self, name, table)

    @wraps(PreTrainedModel.save_pretrained, assigned=())
    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):  # type: ignore[override]
        """As [`~transformers.PreTrainedModel.save_pretrained`]; if it fails, the folder is as it was before.

        In its signature too: a pipeline of diffusers passes on the arguments that it finds there.

        The files are written to a folder inside `save_directory`, hence on the same disk, and moved when all are
        complete. Weights of the same `variant` that an earlier save wrote in other shards are removed.
        """
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        folder = Path(save_directory)
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        kwargs.setdefault("repo_id", folder.absolute().name)
        try:
            with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
                super().save_pretrained(unfinished, is_main_process, *args, **kwargs)
                written = [path.name for path in Path(unfinished).iterdir()]
                for name in written:
                    os.replace(Path(unfinished) / name, folder / name)
        except BaseException:
            if is_new:
                folder.rmdir()
            raise
        variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
        weights = re.compile(
            rf"model{re.escape(variant)}(-\d{{5}}-of-\d{{5}})?\.safetensors"
            rf"|model\.safetensors\.index{re.escape(variant)}\.json"
        )
        if any(weights.fullmatch(name) for name in written):
            for path in folder.iterdir():
                if weights.fullmatch(path.name) and path.name not in written:
                    path.unlink()

    @wraps(PreTrainedModel.push_to_hub, assigned=())
    def push_to_hub(self, repo_id: str, **options):  # type: ignore[override]
        """As [`~transformers.PreTrainedModel.push_to_hub`], but with the code of the model, and its card first.

        Args:
            feature_extractor, card, tag, variant: as for [`earthformer_hf.sharing.push`].
        """
        if find_spec(f"{__package__}.sharing") is None:  # this file was downloaded with a model
            return super().push_to_hub(repo_id, **options)
        return import_module(f"{__package__}.sharing").push(self, repo_id, **options)


def _stored_config(config_class: Any, path: Any, options: dict[str, Any]) -> PreTrainedConfig | None:
    """The configuration beside the weights, or None if there is none."""
    names = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
    try:
        return config_class.from_pretrained(path, **{name: options[name] for name in names if name in options})
    except OSError:
        return None


def _refuse_random_weights(model: PreTrainedModel, info: dict[str, Any], path: Any, check_shapes: bool):
    """Raise if a checkpoint does not fill a model; only the head as a whole may be missing, or not wanted."""
    missing, unexpected = set(), set()
    if path is not None:  # a `state_dict` may hold a part
        head = {name for name in model.state_dict() if name.startswith("head.")}
        missing = set(info["missing_keys"])
        missing -= head if head <= missing else set()
        unexpected = {name for name in info["unexpected_keys"] if head or not name.startswith("head.")}
    shapes = sorted(
        f"{name} {tuple(found)} instead of {tuple(expected)}"
        for name, found, expected in info["mismatched_keys"]
        if check_shapes
    )
    if missing or unexpected or shapes:
        raise ValueError(
            f"{path}: the weights do not fit {type(model).__name__} as configured: "
            f"{len(missing)} tensors are missing {sorted(missing)[:3]}, "
            f"{len(unexpected)} are unknown {sorted(unexpected)[:3]}, "
            f"{len(shapes)} have another shape {shapes[:3]} (ignore_mismatched_sizes=True initialises these)."
        )


__all__ = ["AdaptToGrid", "CheckpointModel", "resize_bias", "resize_frames", "resize_patterns", "resize_places"]
