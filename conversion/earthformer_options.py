"""Options of the original Earthformer -> fields of `EarthformerConfig`.

`OPTIONS` says what becomes of each option of the original constructor, and of the keys that only the official
configuration files have; the defaults are those of the constructor. Of several options that are refused, the first of
the table is named. The functions before it make several options into fields together, or refuse what does not fit.
"""

from collections.abc import Collection
from typing import Any

from common import (
    LEFT_OUT,
    PADDING,
    REQUIRED,
    Alias,
    Compute,
    Ignore,
    Only,
    Options,
    Rename,
    Rule,
    Translate,
    convert_options,
    convert_pattern,
    is_like,
    level_channels,
    options_named_in,
    refuse,
)

from earthformer_hf import EarthformerConfig
from earthformer_hf.cuboid import CROSS_ATTENTION_PATTERNS, SELF_ATTENTION_PATTERNS


def has_global_vectors(options: Options) -> bool:
    return options["num_global_vectors"] != 0


def has_no_covariates(options: Options) -> bool:
    return options["auxiliary_channels"] == 0


def shapes(options: Options) -> dict[str, Any]:
    """`input_shape` and `target_shape`: [time, height, width, channels]."""
    for name in ("input_shape", "target_shape"):
        if len(options[name]) != 4:
            refuse(name, options[name], "it must be [time, height, width, channels]")
    context_length, *image_size, channels = options["input_shape"]
    prediction_length, *target_size, output_channels = options["target_shape"]
    if image_size != target_size:
        refuse("target_shape", options["target_shape"], f"only height and width of input_shape, {image_size}")
    if options.get("data_channels", channels) != channels:
        refuse("data_channels", options["data_channels"], "it must be the last number of input_shape")
    return {
        "context_length": context_length,
        "prediction_length": prediction_length,
        "image_size": image_size,
        "num_channels": channels,
        "num_output_channels": output_channels,
    }


def cross_mode(options: Options) -> dict[str, Any]:
    """The option is of the original's model with covariates, whose default, "up", is not supported."""
    mode = options.get("unet_dec_cross_mode", "up")
    if options["auxiliary_channels"] and mode != "both":
        refuse("unet_dec_cross_mode", mode, "only 'both', where auxiliary_channels are given")
    if "unet_dec_cross_mode" in options and not options["auxiliary_channels"]:
        refuse("unet_dec_cross_mode", mode, "only where auxiliary_channels are given")
    return {}


def hidden_sizes(options: Options) -> dict[str, Any]:
    return {"hidden_sizes": level_channels(options, len(options["enc_depth"]))}


def decoder_depths(options: Options) -> dict[str, Any]:
    if len(options["dec_depth"]) != len(options["enc_depth"]):
        refuse("dec_depth (enc_depth, dec_depth)", options["dec_depth"], "both must have one number per level")
    return {"decoder_depths": options["dec_depth"]}


def dropout(options: Options) -> dict[str, Any]:
    if options["proj_drop"] != options["ffn_drop"]:
        refuse("proj_drop", options["proj_drop"], f"only the value of ffn_drop, {options['ffn_drop']!r}")
    return {"dropout": options["ffn_drop"]}


def self_attention(options: Options) -> dict[str, Any]:
    """One pattern for encoder and decoder: named, or by its cuboids where no name is given."""
    encoder = named_patterns(options, "enc_attn_patterns", "self_pattern", SELF_ATTENTION_PATTERNS)
    encoder = encoder or cuboids(options, "enc_cuboid_size", "enc_cuboid_strategy", "enc_shift_size")
    decoder_option = "dec_self_attn_patterns"
    decoder = named_patterns(options, decoder_option, "cross_self_pattern", SELF_ATTENTION_PATTERNS)
    if decoder is None:
        decoder_option = "dec_self_cuboid_size"
        decoder = cuboids(options, decoder_option, "dec_self_cuboid_strategy", "dec_self_shift_size")
    levels = len(options["enc_depth"])
    of_levels = [[pattern] * levels if isinstance(pattern, str) else pattern for pattern in (encoder, decoder)]
    if of_levels[0] != of_levels[1]:
        refuse(f"cross_self_pattern ({decoder_option})", options[decoder_option], "only the pattern of the encoder")
    return {"self_attention_pattern": encoder}


def cross_attention(options: Options) -> dict[str, Any]:
    """As for self-attention; the original gives height and width of a cuboid and the number of cuboids along time."""
    pattern = named_patterns(options, "dec_cross_attn_patterns", "cross_pattern", CROSS_ATTENTION_PATTERNS)
    if pattern is not None:
        return {"cross_attention_pattern": pattern}
    levels = cuboids(options, "dec_cross_cuboid_hw", "dec_cross_cuboid_strategy", "dec_cross_shift_hw")
    counts = one_per_level(options, "dec_cross_n_temporal")
    for level, level_counts in zip(levels, counts):
        if len(level_counts) != len(level):
            refuse("dec_cross_n_temporal", options["dec_cross_n_temporal"], "only one number for each cuboid")
        for cuboid, count in zip(level, level_counts):
            cuboid["cuboids_along_time"] = count
    return {"cross_attention_pattern": levels}


def named_patterns(options: Options, option: str, file_option: str, known: Collection[str]) -> str | list[str] | None:
    """Our names for one pattern, or for one per level; None if none is given."""
    patterns, label = options[option], f"{file_option} ({option})"
    if isinstance(patterns, list):
        return [convert_pattern(label, name, known) for name in patterns]
    return patterns if patterns is None else convert_pattern(label, patterns, known)


def one_per_level(options: Options, option: str) -> list:
    """A list for each level; one list alone is that of every level, as in the original."""
    value, levels = options[option], len(options["enc_depth"])
    if is_like(value, OPTIONS[option].default):
        return [value] * levels
    if len(value) != levels:
        refuse(option, value, f"only one list, or one for each of {levels} levels")
    return value


def cuboids(options: Options, size: str, strategy: str, shift: str) -> list[list[dict[str, Any]]]:
    """The cuboids of each level from three options, which the arguments name."""
    levels = []
    for sizes, strategies, shifts in zip(*(one_per_level(options, option) for option in (size, strategy, shift))):
        if not len(sizes) == len(strategies) == len(shifts):
            refuse(size, options[size], f"only as many cuboids as {strategy} and {shift} have")
        if not STRATEGIES.keys() >= {letter for letters in strategies for letter in letters}:
            refuse(strategy, options[strategy], f"only {list(STRATEGIES)}")
        levels.append(
            [
                {
                    "size": list(one_size),
                    "strategy": [STRATEGIES[letter] for letter in letters],
                    "shift": list(one_shift),
                }
                for one_size, letters, one_shift in zip(sizes, strategies, shifts)
            ]
        )
    return levels


def stem(options: Options) -> dict[str, Any]:
    """Both kinds of the original's stem, one convolutional block or several, as stages of ours."""
    stem_type = options["initial_downsample_type"]
    if stem_type not in ("conv", "stack_conv"):
        refuse("initial_downsample_type", stem_type, "only 'conv' and 'stack_conv'")
    return one_stage_stem(options) if stem_type == "conv" else stacked_stem(options)


def one_stage_stem(options: Options) -> dict[str, Any]:
    scale = options["initial_downsample_scale"]
    scale = [scale, scale] if isinstance(scale, int) else scale
    if len(scale) == 3 and scale[0] == 1:
        scale = scale[1:]
    if len(scale) != 2:
        refuse("initial_downsample_scale", options["initial_downsample_scale"], "only height and width are reduced")
    convs = options["initial_downsample_conv_layers"], options["final_upsample_conv_layers"]
    if min(convs) < 1:
        refuse("initial_downsample_conv_layers / final_upsample_conv_layers", convs, "only 1 and more")
    return {
        "stem_channels": [options["base_units"]],
        "stem_strides": [scale[0] if scale[0] == scale[1] else scale],
        "stem_num_convs": convs[0],
        "stem_norm_groups": 16,
        "head_num_convs": convs[1],
    }


def stacked_stem(options: Options) -> dict[str, Any]:
    stages = options["initial_downsample_stack_conv_num_layers"]
    channels = options["initial_downsample_stack_conv_dim_list"] or [options["base_units"]] * stages
    convs = options["initial_downsample_stack_conv_num_conv_list"]
    if len(set(convs)) != 1 or min(convs) < 1:  # the original's stem reads it from its start, the head from its end
        refuse("initial_downsample_stack_conv_num_conv_list", convs, "only one number for all stages, at least 1")
    return {
        "stem_channels": channels[:stages],
        "stem_strides": options["initial_downsample_stack_conv_downscale_list"][:stages],
        "stem_num_convs": convs[0],
        "stem_norm_groups": None,
        "head_num_convs": convs[0],
    }


ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "leaky": "leaky_relu"}
STRATEGIES = {"l": "local", "d": "dilated"}
OF_TRAINING = Ignore("it changes how the original trains, not what a trained model computes")
OF_START = Ignore("it says how untrained weights are drawn")

OPTIONS: dict[str, Rule] = {
    # shapes
    "input_shape": Compute(shapes, default=REQUIRED, example=[13, 384, 384, 1]),
    "target_shape": Compute(shapes, default=REQUIRED, example=[12, 384, 384, 1]),
    "data_channels": Compute(shapes, default=LEFT_OUT, example=1),  # the original's scripts make the shapes from it
    "auxiliary_channels": Rename("num_covariates", default=0),
    "unet_dec_cross_mode": Compute(cross_mode, default=LEFT_OUT, example="both"),
    # layers
    "num_heads": Rename("num_attention_heads", default=4),
    "attn_drop": Rename("attention_dropout", default=0.0),
    "proj_drop": Compute(dropout, default=0.0),
    "ffn_drop": Compute(dropout, default=0.0),
    "enc_use_inter_ffn": Only(True),
    "dec_use_inter_ffn": Only(True),
    "ffn_activation": Translate("hidden_act", ACTIVATIONS, default="leaky"),
    "gated_ffn": Only(False),
    "norm_layer": Only("layer_norm"),
    "padding_type": Translate("mask_padding", PADDING, default="ignore"),
    "pos_embed_type": Rename("position_embedding_type", default="t+hw"),
    "use_relative_pos": Only(True),
    "self_attn_use_final_proj": Only(True),
    # decoder
    "dec_cross_start": Only(0),
    "dec_cross_last_n_frames": Only(None),
    "cross_last_n_frames": Only(None),  # in official files, but never read there
    "dec_use_first_self_attn": Only(False),
    "dec_hierarchical_pos_embed": Only(False),
    "z_init_method": Only("zeros", default="nearest_interp", when=has_no_covariates),
    # global vectors
    "num_global_vectors": Rename("num_global_vectors", default=4),
    "separate_global_qkv": Rename("separate_global_qkv", default=False),
    "use_dec_self_global": Only(False, default=True, when=has_global_vectors),
    "use_dec_cross_global": Only(False, default=True, when=has_global_vectors),
    "use_global_vector_ffn": Only(False, default=True, when=has_global_vectors),
    "use_global_self_attn": Only(True, default=False, when=has_global_vectors),
    "global_dim_ratio": Only(1, when=has_global_vectors),
    "dec_self_update_global": Ignore("it is read where use_dec_self_global is true, which is refused"),
    # levels
    "base_units": Compute(hidden_sizes, default=128),
    "block_units": Compute(hidden_sizes, default=None, example=[128, 256, 256]),
    "scale_alpha": Compute(hidden_sizes, default=1.0),
    "enc_depth": Rename("encoder_depths", default=[4, 4, 4]),
    "dec_depth": Compute(decoder_depths, default=[2, 2]),
    "downsample": Only(2, also=([1, 2, 2],)),
    "downsample_type": Only("patch_merge"),
    "upsample_type": Only("upsample"),
    "upsample_kernel_size": Only(3),
    # attention: the names of patterns, under those of the official files too, and the cuboids where none is named
    "enc_attn_patterns": Compute(self_attention, default=None, example="axial", or_list=True),
    "self_pattern": Alias("enc_attn_patterns"),
    "enc_cuboid_size": Compute(self_attention, default=[[4, 4, 4], [4, 4, 4]], or_list=True),
    "enc_cuboid_strategy": Compute(self_attention, default=[["l", "l", "l"], ["d", "d", "d"]], or_list=True),
    "enc_shift_size": Compute(self_attention, default=[[0, 0, 0], [0, 0, 0]], or_list=True),
    "dec_self_attn_patterns": Compute(self_attention, default=None, example="axial", or_list=True),
    "cross_self_pattern": Alias("dec_self_attn_patterns"),
    "dec_self_cuboid_size": Compute(self_attention, default=[[4, 4, 4], [4, 4, 4]], or_list=True),
    "dec_self_cuboid_strategy": Compute(self_attention, default=[["l", "l", "l"], ["d", "d", "d"]], or_list=True),
    "dec_self_shift_size": Compute(self_attention, default=[[1, 1, 1], [0, 0, 0]], or_list=True),
    "dec_cross_attn_patterns": Compute(cross_attention, default=None, example="cross_1x1", or_list=True),
    "cross_pattern": Alias("dec_cross_attn_patterns"),
    "dec_cross_cuboid_hw": Compute(cross_attention, default=[[4, 4], [4, 4]], or_list=True),
    "dec_cross_cuboid_strategy": Compute(cross_attention, default=[["l", "l", "l"], ["d", "l", "l"]], or_list=True),
    "dec_cross_shift_hw": Compute(cross_attention, default=[[0, 0], [0, 0]], or_list=True),
    "dec_cross_n_temporal": Compute(cross_attention, default=[1, 2], or_list=True),
    # stem and head
    "initial_downsample_type": Compute(stem, default="conv"),
    "initial_downsample_activation": Only("leaky"),
    "initial_downsample_scale": Compute(stem, default=1, or_list=True),
    "initial_downsample_conv_layers": Compute(stem, default=2),
    "final_upsample_conv_layers": Compute(stem, default=2),
    "initial_final_sample_num_conv": Only(2),  # in official files, but never read there
    "initial_downsample_stack_conv_num_layers": Compute(stem, default=1),
    "initial_downsample_stack_conv_dim_list": Compute(stem, default=None, example=[16, 64, 128]),
    "initial_downsample_stack_conv_downscale_list": Compute(stem, default=[1]),
    "initial_downsample_stack_conv_num_conv_list": Compute(stem, default=[2]),
    # training
    "checkpoint_level": OF_TRAINING,
    "attn_linear_init_mode": OF_START,
    "ffn_linear_init_mode": OF_START,
    "conv_init_mode": OF_START,
    "down_up_linear_init_mode": OF_START,
    "norm_init_mode": OF_START,
}


def convert_config(model: dict[str, Any]) -> EarthformerConfig:
    """The `model:` block of an original configuration file (or the constructor's arguments) as our configuration.

    Raises:
        ValueError: an option is unknown, or has a value that this package does not have; the message names it.
    """
    arguments = convert_options(model, OPTIONS)
    try:
        return EarthformerConfig(**arguments)
    except Exception as reason:  # of the configuration or of the library's type checks, whose errors have no one class
        options = " / ".join(options_named_in(str(reason), model, OPTIONS)) or "model"
        raise ValueError(f"{options}: {' '.join(str(reason).split())}") from reason


__all__ = ["OPTIONS", "convert_config"]
