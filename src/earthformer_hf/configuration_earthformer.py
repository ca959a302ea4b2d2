"""Configuration of Earthformer. The defaults are the released SEVIR setting, with masked padding."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import cast

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from .advection import FIRST_GUESSES
from .calibration import is_calibration
from .cuboid import (
    CROSS_ATTENTION_PATTERNS,
    MAX_LAYERS,
    MAX_LEVELS,
    MAX_SIZE,
    SELF_ATTENTION_PATTERNS,
    CrossCuboid,
    Cuboid,
    CuboidLayerConfig,
    build_activation,
    check_layers,
    pattern_cuboids,
    reduced_size,
)


logger = logging.get_logger(__name__)

MAX_CONVS = 100  # of a stage of the stem or the head


@strict
class EarthformerConfig(PreTrainedConfig):
    r"""
    Shapes and layers of an [`EarthformerModel`] (Gao et al., NeurIPS 2022, https://arxiv.org/abs/2207.05833).

    ```
    past_values | future_values        context_length frames | prediction_length frames, each image_size x num_channels
    stem -> level 0 -> level 1 ...     hidden_sizes[i] channels on a grid halved from level to level
    ```

    Args:
        context_length (`int`): frames given.
        prediction_length (`int`): frames forecast.
        image_size (`list[int]`): height and width of a frame; one number for a square.
        num_channels (`int`): channels of a given frame.
        num_output_channels (`int`, *optional*): channels of a forecast frame; as `num_channels` if omitted.
        num_covariates (`int`): known drivers per pixel and frame of context and forecast, such as weather and
            elevation; 0 for none. With covariates the decoder starts from those of the forecast (EarthNet2021).
        first_guess (`str`, *optional*): a forecast without a network that the model's own is added to, and that the
            decoder starts from: "persistence", or "advection", the last frame carried along the motion of the last
            three, see `advection.py`. It is one of the first `num_output_channels` channels; untrained, the model
            forecasts just this. None for none, as published.
        correction_weights (`list[float]`, *optional*): how much of what the network adds to the first guess counts
            at each lead time: trained on few storms it is surer than it is right. Fitted, as the next, by
            `examples/calibrate_earthformer.py`; None for all of it.
        calibration (`list[list[float]]`, *optional*): what is forecast instead of the network's own values, so that
            intensities are as frequent as the observed ones: a rising row of values, and for each lead time a rising
            row of what the network says where they are meant; linear in between. A squared error makes heavy rain
            rarer with each lead time. None for none, as published.
        linear_components (`int`): patterns of a linear forecast that the network's is added to, see
            `linear_forecast.py`; 0 for none, as published. Fitted by `examples/fit_linear_forecast.py`.
        linear_lags (`int`): frames of the context that it looks at, the last ones.
        num_time_features (`int`): numbers that tell the season of a frame, on which its coefficients depend; 0 for
            coefficients that are always the same.
        hidden_sizes (`list[int]`): channels of each level.
        encoder_depths, decoder_depths (`list[int]`): blocks of each level.
        num_attention_heads (`int`): heads of every attention.
        num_global_vectors (`int`): global vectors of the encoder; 0 for none.
        separate_global_qkv (`bool`): whether the exchange with global vectors has its own projections.
        self_attention_pattern, cross_attention_pattern (`str` or `list`): how attention cuts its grid: a pattern's
            name ("axial", "divided_st", "full", "video_swin_2x8", "spatial_lg_4", "axial_space_dilate_2"; "cross_1x1",
            "cross_2x2_lg", "cross_4x4_heter"), a name per level, or explicit cuboids: one list of
            [`~earthformer_hf.Cuboid`] (of cross-attention [`~earthformer_hf.CrossCuboid`]), or of dicts of its fields,
            for all levels, or one such list per level. A configuration file holds them as dicts:
            `{"size": [2, 8, 8], "strategy": ["local", "local", "local"], "shift": [1, 4, 4]}` for self-attention, and
            `{"size": [8, 8], "strategy": ["local", "local", "local"], "shift": [4, 4], "cuboids_along_time": 2}` for
            cross-attention. All but `size` may be left out.
        stem_channels (`list[int]`): channels of each stage of convolutions before level 0; the last must equal
            `hidden_sizes[0]`. The head mirrors the stem.
        stem_strides (`list`): by how much each stage reduces the frame: a number, or height and width.
        stem_num_convs (`int`): convolutions of a stage.
        stem_norm_groups (`int`, *optional*): groups of the stages' group norms; a quarter of the channels if omitted.
        head_num_convs (`int`): convolutions of a stage of the head.
        mask_padding (`bool`): whether tokens added to fill the last cuboid are hidden from attention. The published
            settings let them take part (false).
        position_embedding_type (`str`): "t+h+w" or "t+hw": learned embeddings added per axis, or per time and place.
        hidden_act (`str`): activation of the feed-forward layers.
        dropout, attention_dropout (`float`): probabilities.
        layer_norm_eps (`float`): epsilon of the layer norms.

    Raises:
        ValueError: a value that cannot work, or a keyword that neither this class nor `PreTrainedConfig` knows.
    """

    model_type = "earthformer"

    context_length: int = 13
    prediction_length: int = 12
    image_size: list[int] | tuple[int, ...] | int = (384, 384)
    num_channels: int = 1
    num_output_channels: int | None = None
    num_covariates: int = 0
    first_guess: str | None = None
    correction_weights: list[float] | None = None
    calibration: list[list[float]] | None = None
    linear_components: int = 0
    linear_lags: int = 1
    num_time_features: int = 0
    hidden_sizes: list[int] | tuple[int, ...] = (128, 256)
    encoder_depths: list[int] | tuple[int, ...] = (1, 1)
    decoder_depths: list[int] | tuple[int, ...] = (1, 1)
    num_attention_heads: int = 4
    num_global_vectors: int = 8
    separate_global_qkv: bool = True
    self_attention_pattern: str | list | tuple = "axial"
    cross_attention_pattern: str | list | tuple = "cross_1x1"
    stem_channels: list[int] | tuple[int, ...] = (16, 64, 128)
    stem_strides: list | tuple = (3, 2, 2)
    stem_num_convs: int = 2
    stem_norm_groups: int | None = None
    head_num_convs: int = 2
    mask_padding: bool = True
    position_embedding_type: str = "t+h+w"
    hidden_act: str = "gelu"
    dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    is_encoder_decoder: bool = True

    def __post_init__(self, **kwargs):
        self._refuse_unknown(kwargs)
        self._check_values()
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value):
        """A field takes its stored form (lists, a pair for `image_size`) and is checked, also after construction.

        Raises:
            ValueError: a value that cannot work with the others; the configuration is as before.
        """
        if name not in EarthformerConfig.__annotations__:
            return super().__setattr__(name, value)
        before = getattr(self, name)
        if name == "image_size" and isinstance(value, int):
            value = (value, value)
        if name == "num_output_channels" and value is None:
            value = self.num_channels
        super().__setattr__(name, _as_json(value))
        if self.__dict__.get("_post_init_done"):
            try:
                self._check_values()
            except ValueError:
                super().__setattr__(name, before)
                raise

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As [`~transformers.PreTrainedConfig.from_dict`], but fields given as keywords are checked as well.

        Raises:
            ValueError: a keyword without effect that resembles a field. One that resembles none may be meant for
                another part of the library, as in `pipeline(model_kwargs=...)`: it only warns, or is returned if
                `return_unused_kwargs`.
        """
        names = {field.name for field in fields(cls)} - {"dtype"}
        return_unused = kwargs.pop("return_unused_kwargs", False)
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        fitted = _fitted_elsewhere(config_dict, given.get("prediction_length"))
        config, unused = super().from_dict(config_dict | fitted | given, return_unused_kwargs=True, **kwargs)
        for name in unused:
            if close := nearest_name(name, names):
                raise ValueError(f"{cls.__name__}: unknown argument {name!r}; did you mean {close!r}?")
            if not return_unused:
                logger.warning(f"{cls.__name__}: the argument {name!r} has no effect.")
        return (config, unused) if return_unused else config

    # -- what follows from the fields -----------------------------------------------------------------------------

    @property
    def hidden_size(self) -> int:
        """Channels of level 0, under the name that the library's tools look for; set `hidden_sizes`."""
        return self.hidden_sizes[0]

    @hidden_size.setter
    def hidden_size(self, value: int):
        raise NotImplementedError("EarthformerConfig: `hidden_size` follows from `hidden_sizes`.")

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the encoder, under the name that the library's tools look for; set `encoder_depths`."""
        return sum(self.encoder_depths)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        raise NotImplementedError("EarthformerConfig: `num_hidden_layers` follows from `encoder_depths`.")

    @property
    def stem_sizes(self) -> list[tuple[int, int]]:
        """Height and width before the stem, then after each of its stages."""
        height, width = cast(list[int], self.image_size)
        sizes = [(height, width)]
        for stride in self.stem_strides:
            sizes.append(reduced_size(sizes[-1], (stride, stride) if isinstance(stride, int) else stride))
        return sizes

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """Height and width of each level."""
        sizes = [self.stem_sizes[-1]]
        for _ in self.hidden_sizes[1:]:
            sizes.append(reduced_size(sizes[-1], (2, 2)))
        return sizes

    def self_attention_cuboids(self) -> list[list[Cuboid]]:
        """The cuboids of each level's self-attention, in the encoder and in the decoder."""
        return _cuboids_of_levels(self, "self_attention_pattern", SELF_ATTENTION_PATTERNS, Cuboid)

    def cross_attention_cuboids(self) -> list[list[CrossCuboid]]:
        """The cuboids of each level's cross-attention."""
        return _cuboids_of_levels(self, "cross_attention_pattern", CROSS_ATTENTION_PATTERNS, CrossCuboid)

    def layer_config(self) -> CuboidLayerConfig:
        """What all attention and feed-forward layers have in common."""
        return CuboidLayerConfig(**{field.name: getattr(self, field.name) for field in fields(CuboidLayerConfig)})

    # -- checks ---------------------------------------------------------------------------------------------------

    def _refuse_unknown(self, kwargs: dict):
        """Typos are refused; a file written by a newer version (its `transformers_version` is set) only warns."""
        known = {field.name for field in fields(self)}
        unknown = [name for name in kwargs if name not in known and not _is_of_the_library(type(self), name)]
        if self.transformers_version is not None:
            # A dict is what a tool of the library stores beside the fields: auto_map, quantization_config, ...
            unknown = [name for name in unknown if not isinstance(kwargs[name], dict)]
            if unknown:
                logger.warning(
                    f"EarthformerConfig: unknown entries of a stored configuration have no effect: {unknown}."
                )
        elif unknown:
            close = nearest_name(unknown[0], known, cutoff=0.0)
            raise ValueError(f"EarthformerConfig: unknown argument {unknown[0]!r}; did you mean {close!r}?")

    def _check_values(self):
        _check_limits(self)
        levels = len(self.hidden_sizes)
        for name in ("context_length", "prediction_length", "num_channels", "num_output_channels"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("num_attention_heads", "stem_num_convs", "head_num_convs"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("num_covariates", "num_global_vectors", "linear_components", "num_time_features"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        two = len(self.image_size) == 2 and min(self.image_size) >= 1
        self._require(two, "image_size", "a positive height and width")
        self._require(levels >= 1 and min(self.hidden_sizes) >= 1, "hidden_sizes", "positive numbers, one per level")
        for name in ("encoder_depths", "decoder_depths"):
            depths = getattr(self, name)
            self._require(
                len(depths) == levels and min(depths) >= 1, name, f"{levels} positive numbers, one per level"
            )
        heads = self.num_attention_heads
        divided = all(size % heads == 0 for size in self.hidden_sizes)
        self._require(divided, "hidden_sizes", f"multiples of num_attention_heads={heads}")
        _check_first_guess(self)
        _check_linear_forecast(self)
        if self.calibration is not None:
            fits = is_calibration(self.calibration, self.prediction_length)
            self._require(fits, "calibration", f"{self.prediction_length + 1} rising rows of one length")
        self._check_stem()
        for name in ("dropout", "attention_dropout"):
            self._require(0 <= getattr(self, name) <= 1, name, "a probability")
        self._require(self.layer_norm_eps > 0, "layer_norm_eps", "a positive number")
        self._require(
            self.position_embedding_type in ("t+h+w", "t+hw"), "position_embedding_type", "'t+h+w' or 't+hw'"
        )
        try:
            build_activation(self.hidden_act)
        except KeyError:
            self._require(False, "hidden_act", "the name of an activation in transformers")
        _check_cuboids(self)

    def _check_stem(self):
        stages = len(self.stem_channels)
        self._require(stages >= 1 and min(self.stem_channels) >= 1, "stem_channels", "positive numbers")
        last = f"hidden_sizes[0]={self.hidden_sizes[0]} at its end"
        self._require(self.stem_channels[-1] == self.hidden_sizes[0], "stem_channels", last)
        self._require(len(self.stem_strides) == stages, "stem_strides", f"{stages} entries, one per stage of the stem")
        for stride in self.stem_strides:
            pair = [stride, stride] if isinstance(stride, int) else stride
            fits = len(pair) == 2 and all(isinstance(n, int) and n >= 1 for n in pair)
            self._require(fits, "stem_strides", "a positive number, or height and width, per stage")
        if self.stem_norm_groups is not None:
            groups = self.stem_norm_groups
            fits = groups >= 1 and all(channels % groups == 0 for channels in self.stem_channels)
            self._require(fits, "stem_norm_groups", f"a divisor of stem_channels={self.stem_channels}")
        else:
            fits = all(channels % max(1, channels // 4) == 0 for channels in self.stem_channels)
            self._require(fits, "stem_channels", "multiples of a quarter of themselves (or set stem_norm_groups)")

    def _require(self, fulfilled: bool, name: str, expected: str):
        if not fulfilled:
            raise ValueError(f"EarthformerConfig: `{name}` must be {expected}, got {getattr(self, name)!r}.")


def _check_limits(config: EarthformerConfig):
    """Refuse at once what would take minutes to build."""
    lists = ("hidden_sizes", "encoder_depths", "decoder_depths", "stem_channels", "stem_strides")
    patterns = ("self_attention_pattern", "cross_attention_pattern")
    for name in (*lists, *patterns):
        longest, value = MAX_LEVELS if name in lists else MAX_LAYERS, getattr(config, name)
        length = max([len(value), *(len(entry) for entry in value if isinstance(entry, list))])
        if length > longest:
            raise ValueError(f"EarthformerConfig: `{name}` must have at most {longest:,} entries, got {length:,}.")
    lengths = ("context_length", "prediction_length", "num_channels", "num_output_channels", "num_covariates")
    for name in (*lengths, "num_attention_heads", "num_global_vectors", "linear_components", "num_time_features"):
        config._require(getattr(config, name) <= MAX_SIZE, name, f"at most {MAX_SIZE:,}")
    for name in ("stem_num_convs", "head_num_convs"):
        config._require(getattr(config, name) <= MAX_CONVS, name, f"at most {MAX_CONVS}")
    for name in ("image_size", "hidden_sizes", "stem_channels"):
        largest = max(getattr(config, name), default=0)
        config._require(largest <= MAX_SIZE, name, f"numbers of at most {MAX_SIZE:,}")


def _fitted_elsewhere(stored: dict, leads: int | None) -> dict:
    """What a stored configuration has for each lead time, for so many of them: beyond its last one as there."""
    found: dict = {}
    if not isinstance(leads, int) or not 1 <= leads <= MAX_SIZE:
        return found
    weights, calibration = stored.get("correction_weights"), stored.get("calibration")
    if isinstance(weights, list) and weights:
        found["correction_weights"] = [weights[min(lead, len(weights) - 1)] for lead in range(leads)]
    if isinstance(calibration, list) and len(calibration) > 1:
        said = calibration[1:]
        found["calibration"] = [calibration[0], *(said[min(lead, len(said) - 1)] for lead in range(leads))]
    return found


def _check_first_guess(config: EarthformerConfig):
    kind = config.first_guess
    if kind is not None:
        config._require(kind in FIRST_GUESSES, "first_guess", f"one of {tuple(FIRST_GUESSES)} or None")
        frames, words = FIRST_GUESSES[kind], f"for first_guess={kind!r}"
        config._require(config.context_length >= frames, "context_length", f"at least {frames} {words}")
        known = cast(int, config.num_output_channels) <= config.num_channels
        config._require(known, "num_output_channels", f"at most num_channels={config.num_channels} {words}")
    weights = config.correction_weights
    if weights is not None:
        frames = config.prediction_length
        fits = kind is not None and len(weights) == frames and all(map(math.isfinite, weights))
        config._require(fits, "correction_weights", f"{frames} finite numbers, of a model with a first guess")


def _check_linear_forecast(config: EarthformerConfig):
    length = config.context_length
    config._require(1 <= config.linear_lags <= length, "linear_lags", f"1 to context_length={length}")
    if config.linear_components:
        same = config.num_output_channels == config.num_channels
        config._require(same, "num_output_channels", f"num_channels={config.num_channels} with a linear forecast")
    else:
        config._require(config.num_time_features == 0, "num_time_features", "0 without linear_components")


def _check_cuboids(config: EarthformerConfig):
    within, across = config.self_attention_cuboids(), config.cross_attention_cuboids()
    frames = min(config.context_length, config.prediction_length)
    for level, cuboids in enumerate(across):
        possible = all(cuboid.cuboids_along_time <= frames for cuboid in cuboids)
        wanted = f"cuboids of which at most {frames} lie along time (level {level})"
        config._require(possible, "cross_attention_pattern", wanted)
    grids = [(max(config.context_length, config.prediction_length), *size) for size in config.level_sizes]
    try:
        check_layers(config.encoder_depths, within, grids)
        check_layers(config.decoder_depths, [[*one, *two] for one, two in zip(within, across)], grids)
    except ValueError as reason:
        raise ValueError(f"EarthformerConfig: {reason}") from reason


def _cuboids_of_levels(
    config: EarthformerConfig, name: str, patterns: dict, cuboid_class: type[Cuboid] | type[CrossCuboid]
) -> list[list]:
    """Each level's cuboids as the field `name` has them: a pattern or cuboids, for all levels or one per level."""
    value, levels = getattr(config, name), len(config.hidden_sizes)
    if isinstance(value, str) or all(isinstance(entry, dict) for entry in value):
        value = [value] * levels
    config._require(len(value) == levels, name, f"a name, explicit cuboids, or {levels} of either (one per level)")
    known = [field.name for field in fields(cuboid_class)]
    wanted = f"a pattern's name or a list of {cuboid_class.__name__} with {', '.join(known)}"
    result = []
    for entry, size in zip(value, config.level_sizes):
        if not isinstance(entry, str):
            good = isinstance(entry, list) and entry and all(isinstance(cuboid, dict) for cuboid in entry)
            config._require(bool(good), name, wanted)
            config._require(all({"size"} <= set(cuboid) <= set(known) for cuboid in entry), name, wanted)
        try:
            if isinstance(entry, str):
                cuboids = pattern_cuboids(entry, (config.context_length, *size), patterns)
            else:
                cuboids = [cuboid_class(**cuboid) for cuboid in entry]
        except ValueError as reason:
            raise ValueError(f"EarthformerConfig: `{name}`: {reason}") from reason
        result.append(cuboids)
    return result


def _is_of_the_library(cls: type, name: str) -> bool:
    """Whether `PreTrainedConfig` takes a keyword that is no field.

    It keeps such a value as an attribute of the class, some behind an underscore (`attn_implementation`), or discards
    it as a setting of text generation.
    """
    attribute = name.startswith("_") or hasattr(cls, name) or hasattr(cls, f"_{name}")
    return attribute or name in GenerationConfig().to_dict()


def nearest_name(name: str, names: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The one of `names` that resembles `name` most, or None where none reaches `cutoff` (0 to 1).

    Of those that do, the one that has the most words in common, then the one that is spelt most alike.
    """
    names, words = list(names), set(name.split("_"))
    alike = difflib.get_close_matches(name, names, n=max(1, len(names)), cutoff=cutoff)
    return max(alike, key=lambda candidate: len(words & set(candidate.split("_"))), default=None)


def _as_json(value):
    """A field as a configuration file holds it: cuboids as dicts, tuples as lists."""
    if isinstance(value, Cuboid | CrossCuboid):
        return _as_json(asdict(value))
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    return value


__all__ = ["EarthformerConfig", "nearest_name"]
