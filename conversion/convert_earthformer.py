"""Convert a checkpoint of the original Earthformer (amazon-science/earth-forecasting-transformer) to this package.

    python conversion/convert_earthformer.py --checkpoint_path X.pt --config_path X.yaml --output_dir DIR
    python conversion/convert_earthformer.py --checkpoint_path X.pt --preset sevir --output_dir DIR

X.pt is a state dict, or has one as `state_dict`: everything else in it becomes an inert placeholder, and a file that
asks for anything unusual is refused before it is loaded. X.yaml has a `model:` block with the original's options;
options it leaves out take the defaults of the original constructor. A preset is a recipe in `examples/configs`; it
also knows the range of the data, and brings the model card of a released setting. Every option and every tensor is
translated, dropped by a rule below, or refused. The folder's card says which tensor became which.
"""

import argparse
import hashlib
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple, TypeVar

import torch
import yaml
from checkpoints import load_tensors
from safetensors import SafetensorError
from yaml import YAMLError

from earthformer_hf import (
    EarthformerConfig,
    EarthformerFeatureExtractor,
    EarthformerForPrediction,
    PreDiffPipeline,
    sharing,
)
from earthformer_hf.cuboid import CROSS_ATTENTION_PATTERNS, SELF_ATTENTION_PATTERNS


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: regular expression -> name. The first rule that matches is applied.
# ---------------------------------------------------------------------------------------------------------------------

WHERE = [
    (r"^initial_encoder\.conv_block_list\.(\d+)\.", r"model.stem.stages.\1.layers."),
    (r"^initial_encoder\.patch_merge_list\.(\d+)\.", r"model.stem.merges.\1."),
    (r"^initial_encoder\.conv_block\.", r"model.stem.stages.0.layers."),
    (r"^initial_encoder\.patch_merge\.", r"model.stem.merges.0."),
    (r"^initial_aux_encoder\.conv_block_list\.(\d+)\.", r"model.covariate_stem.stages.\1.layers."),
    (r"^initial_aux_encoder\.patch_merge_list\.(\d+)\.", r"model.covariate_stem.merges.\1."),
    (r"^initial_aux_encoder\.conv_block\.", r"model.covariate_stem.stages.0.layers."),
    (r"^initial_aux_encoder\.patch_merge\.", r"model.covariate_stem.merges.0."),
    (r"^enc_pos_embed\.", r"model.encoder.position_embedding."),
    (r"^init_global_vectors$", r"model.encoder.global_vectors"),
    (r"^encoder\.blocks\.(\d+)\.(\d+)\.", r"model.encoder.levels.\1.\2."),
    (r"^encoder\.down_layers\.(\d+)\.", r"model.encoder.merges.\1."),
    (r"^encoder\.down_layer_global_proj\.(\d+)\.", r"model.encoder.global_projections.\1."),
    (r"^dec_pos_embed\.", r"model.decoder.position_embedding."),
    (r"^z_proj\.", r"model.decoder.start_proj."),
    (r"^decoder\.(up_)?self_blocks\.(\d+)\.(\d+)\.", r"model.decoder.self_blocks.\2.\3."),
    (r"^decoder\.(up_)?cross_blocks\.(\d+)\.(\d+)\.", r"model.decoder.cross_blocks.\2.\3."),
    (r"^decoder\.down_self_blocks\.(\d+)\.(\d+)\.", r"model.decoder.down_self_blocks.\1.\2."),
    (r"^decoder\.down_cross_blocks\.(\d+)\.(\d+)\.", r"model.decoder.down_cross_blocks.\1.\2."),
    (r"^decoder\.downsample_layers\.(\d+)\.", r"model.decoder.merges.\1."),
    (r"^decoder\.upsample_layers\.(\d+)\.", r"model.decoder.upsamples.\1."),
    (r"^final_decoder\.conv_block_list\.(\d+)\.", r"head.stages.\1.layers."),
    (r"^final_decoder\.upsample_list\.(\d+)\.", r"head.upsamples.\1."),
    (r"^final_decoder\.conv_block\.", r"head.stages.0.layers."),
    (r"^final_decoder\.upsample\.", r"head.upsamples.0."),
    (r"^dec_final_proj\.", r"head.out_proj."),
]
WHAT = [
    (r"\.T_embed\.", r".time."),
    (r"\.H_embed\.", r".height."),
    (r"\.W_embed\.", r".width."),
    (r"\.HW_embed\.", r".place."),
    (r"\.ffn_l\.(\d+)\.ffn_1\.", r".feed_forwards.\1.up."),
    (r"\.ffn_l\.(\d+)\.ffn_2\.", r".feed_forwards.\1.down."),
    (r"\.ffn_l\.(\d+)\.layer_norm\.", r".feed_forwards.\1.norm."),
    (r"\.attn_l\.(\d+)\.relative_position_bias_table$", r".attentions.\1.relative_position_bias"),
    (r"\.attn_l\.(\d+)\.proj\.", r".attentions.\1.out_proj."),
    (r"\.attn_l\.(\d+)\.q_proj\.", r".attentions.\1.query."),
    (r"\.attn_l\.(\d+)\.kv_proj\.", r".attentions.\1.key_value."),
    (r"\.attn_l\.(\d+)\.global_vec_norm\.", r".attentions.\1.global_norm."),
    (r"\.attn_l\.(\d+)\.global_proj\.", r".attentions.\1.global_out_proj."),
    (r"\.attn_l\.(\d+)\.l2g_q_net\.", r".attentions.\1.read_query."),
    (r"\.attn_l\.(\d+)\.l2g_global_kv_net\.", r".attentions.\1.read_global_key_value."),
    (r"\.attn_l\.(\d+)\.g2l_global_q_net\.", r".attentions.\1.update_global_query."),
    (r"\.attn_l\.(\d+)\.g2l_k_net\.", r".attentions.\1.update_key."),
    (r"\.attn_l\.(\d+)\.g2l_v_net\.", r".attentions.\1.update_value."),
    (r"\.attn_l\.(\d+)\.g2g_global_qkv_net\.", r".attentions.\1.update_global_qkv."),
    (r"\.attn_l\.(\d+)\.", r".attentions.\1."),  # norm, qkv, global_qkv
]
# Tensors that have no place here, under the names they would have, and the reason.
INDEX = (r"\.relative_position_index$", "an index that is computed where it is used")
READ_BY_NOTHING = "updates global vectors that nothing reads, and never received a gradient"
STARTS_FROM_COVARIATES = "another start of the decoder, which never received a gradient"
UPDATES = r"\.attentions\.\d+\.(update_\w+|global_out_proj)\.(weight|bias)$"
START = r"^model\.decoder\.(position_embedding|start_proj)\."
# What Lightning, DistributedDataParallel and torch.compile put before every name.
WRAPPERS = re.compile(r"((module|torch_nn_module|_orig_mod)\.)*")


class Conversion(NamedTuple):
    """Tensors under our names; name there -> name here; name there -> why it is dropped."""

    tensors: dict[str, torch.Tensor]
    renamed: dict[str, str]
    dropped: dict[str, str]


def rename(name: str) -> str:
    """The name here of a tensor of the original.

    Raises:
        ValueError: no rule knows the name.
    """
    for rules, needed in ((WHERE, True), (WHAT, False)):
        for pattern, replacement in rules:
            if re.search(pattern, name):
                name = re.sub(pattern, replacement, name)
                break
        else:
            if needed:
                raise ValueError(f"checkpoint: no rule for tensor {name!r}; is this a checkpoint of Earthformer?")
    return name


def convert_state_dict(original: dict[str, torch.Tensor], model: EarthformerForPrediction) -> Conversion:
    """The original's tensors under our names.

    Raises:
        ValueError: a tensor is unknown, missing, used twice, not finite, or of another shape or kind of number than
            the configuration says.
    """
    config = model.config
    last_block = rf"^model\.encoder\.levels\.{len(config.hidden_sizes) - 1}\.{config.encoder_depths[-1] - 1}"
    dropped = [INDEX, (last_block + UPDATES, READ_BY_NOTHING), (START, STARTS_FROM_COVARIATES)]
    prefixes = Counter(WRAPPERS.match(name)[0] for name in original)
    if len(prefixes) > 1:
        names = [f"{prefix + '*'!r} ({number} tensors)" for prefix, number in prefixes.items()]
        raise ValueError(f"checkpoint: it holds more than one network: {', '.join(names)}.")
    prefix = next(iter(prefixes), "")
    triples = ((name, rename(name.removeprefix(prefix)), tensor) for name, tensor in original.items())
    return fitted(triples, model.state_dict(), dropped)


def fitted(
    triples: Iterable[tuple[str, str, torch.Tensor]],
    expected: dict[str, torch.Tensor],
    dropped: Iterable[tuple[str, str]],
    where: str = "checkpoint",
) -> Conversion:
    """Every tensor, once, where it belongs.

    Args:
        triples: name there, name here, tensor.
        expected: our state dict.
        dropped: pattern of names here and reason; of what may be dropped where we do not have it.
        where: begins every message.

    Raises:
        ValueError: a tensor is unknown, missing, used twice, of another shape or kind of number, or not finite.
    """
    converted, renamed, without = {}, {}, {}
    for name, target, tensor in triples:
        if target not in expected:
            reasons = [reason for pattern, reason in dropped if re.search(pattern, target)]
            if not reasons:
                raise ValueError(f"{where}: tensor {name!r} has no place in a model of this configuration ({target}).")
            without[name] = reasons[0]
            continue
        if target in converted:
            raise ValueError(f"{where}: two tensors become {target!r}, the second is {name!r}.")
        if tensor.shape != expected[target].shape:
            raise ValueError(
                f"{where}: tensor {name!r} must have shape {tuple(expected[target].shape)} in this configuration, "
                f"got {tuple(tensor.shape)}."
            )
        if tensor.is_floating_point() != expected[target].is_floating_point():
            raise ValueError(f"{where}: tensor {name!r} must be of {expected[target].dtype}, got {tensor.dtype}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: tensor {name!r} holds values that are infinite or not a number.")
        converted[target] = tensor
        renamed[name] = target
    missing = sorted(set(expected) - set(converted))
    if missing:
        raise ValueError(f"{where}: {len(missing)} tensors are missing, the first is {missing[0]!r} (our name).")
    return Conversion(converted, renamed, without)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

# The defaults of the original constructor, except `input_shape` and `target_shape`, which have none.
DEFAULTS = {
    "base_units": 128, "block_units": None, "scale_alpha": 1.0, "num_heads": 4,
    "attn_drop": 0.0, "proj_drop": 0.0, "ffn_drop": 0.0,
    "downsample": 2, "downsample_type": "patch_merge", "upsample_type": "upsample", "upsample_kernel_size": 3,
    "enc_depth": [4, 4, 4], "enc_attn_patterns": None, "enc_cuboid_size": [[4, 4, 4], [4, 4, 4]],
    "enc_cuboid_strategy": [["l", "l", "l"], ["d", "d", "d"]], "enc_shift_size": [[0, 0, 0], [0, 0, 0]],
    "enc_use_inter_ffn": True,
    "dec_depth": [2, 2], "dec_cross_start": 0, "dec_self_attn_patterns": None,
    "dec_self_cuboid_size": [[4, 4, 4], [4, 4, 4]], "dec_self_cuboid_strategy": [["l", "l", "l"], ["d", "d", "d"]],
    "dec_self_shift_size": [[1, 1, 1], [0, 0, 0]], "dec_cross_attn_patterns": None,
    "dec_cross_cuboid_hw": [[4, 4], [4, 4]], "dec_cross_cuboid_strategy": [["l", "l", "l"], ["d", "l", "l"]],
    "dec_cross_shift_hw": [[0, 0], [0, 0]], "dec_cross_n_temporal": [1, 2], "dec_cross_last_n_frames": None,
    "dec_use_inter_ffn": True, "dec_hierarchical_pos_embed": False,
    "num_global_vectors": 4, "use_dec_self_global": True, "dec_self_update_global": True,
    "use_dec_cross_global": True, "use_global_vector_ffn": True, "use_global_self_attn": False,
    "separate_global_qkv": False, "global_dim_ratio": 1,
    "z_init_method": "nearest_interp",
    "initial_downsample_type": "conv", "initial_downsample_activation": "leaky", "initial_downsample_scale": 1,
    "initial_downsample_conv_layers": 2, "final_upsample_conv_layers": 2,
    "initial_downsample_stack_conv_num_layers": 1, "initial_downsample_stack_conv_dim_list": None,
    "initial_downsample_stack_conv_downscale_list": [1], "initial_downsample_stack_conv_num_conv_list": [2],
    "ffn_activation": "leaky", "gated_ffn": False, "norm_layer": "layer_norm", "padding_type": "ignore",
    "pos_embed_type": "t+hw", "checkpoint_level": True, "use_relative_pos": True, "self_attn_use_final_proj": True,
    "dec_use_first_self_attn": False,
    "attn_linear_init_mode": "0", "ffn_linear_init_mode": "0", "conv_init_mode": "0", "down_up_linear_init_mode": "0",
    "norm_init_mode": "0",
    # Only of the original's model with covariates, where the first has another default.
    "auxiliary_channels": 0, "unet_dec_cross_mode": "up",
}  # fmt: skip

# What the values are like where the default does not show it, and the options that may be lists of what they are like:
# of one entry per level, of cuboids per level, or (downsample, initial_downsample_scale) per axis.
LIKE = DEFAULTS | {
    "input_shape": [13, 384, 384, 1], "target_shape": [12, 384, 384, 1], "block_units": [128, 256, 256],
    "enc_attn_patterns": "axial", "dec_self_attn_patterns": "axial", "dec_cross_attn_patterns": "cross_1x1",
    "initial_downsample_stack_conv_dim_list": [16, 64, 128],
}  # fmt: skip
OR_LISTS = {
    "downsample", "initial_downsample_scale", "enc_attn_patterns", "dec_self_attn_patterns", "dec_cross_attn_patterns",
    "enc_cuboid_size", "enc_cuboid_strategy", "enc_shift_size", "dec_self_cuboid_size", "dec_self_cuboid_strategy",
    "dec_self_shift_size", "dec_cross_cuboid_hw", "dec_cross_cuboid_strategy", "dec_cross_shift_hw",
    "dec_cross_n_temporal",
}  # fmt: skip

# Keys of the official files for constructor arguments of another name.
ALIASES = {
    "self_pattern": "enc_attn_patterns",
    "cross_self_pattern": "dec_self_attn_patterns",
    "cross_pattern": "dec_cross_attn_patterns",
}
# Keys that stand in official files and that the original never reads; accepted with the value they have there.
NEVER_READ = {"cross_last_n_frames": None, "initial_final_sample_num_conv": 2}

# Options that change how the original starts or trains, not what a trained model computes: any value is accepted.
NO_EFFECT = {
    "checkpoint_level", "attn_linear_init_mode", "ffn_linear_init_mode", "conv_init_mode", "down_up_linear_init_mode",
    "norm_init_mode", "dec_self_update_global",  # the last: of global vectors in the decoder, which are refused
}  # fmt: skip
# Options with one published value, which is built in.
BUILT_IN = {
    "downsample_type": "patch_merge", "upsample_type": "upsample", "upsample_kernel_size": 3,
    "enc_use_inter_ffn": True, "dec_use_inter_ffn": True, "dec_cross_start": 0, "dec_cross_last_n_frames": None,
    "dec_hierarchical_pos_embed": False, "z_init_method": "zeros", "initial_downsample_activation": "leaky",
    "gated_ffn": False, "norm_layer": "layer_norm", "use_relative_pos": True, "self_attn_use_final_proj": True,
    "dec_use_first_self_attn": False,
}  # fmt: skip
BUILT_IN_WITH_GLOBAL_VECTORS = {
    "use_dec_self_global": False, "use_dec_cross_global": False, "use_global_vector_ffn": False,
    "use_global_self_attn": True, "global_dim_ratio": 1,
}  # fmt: skip
THEIR_NAMES = {
    "context_length": "input_shape", "image_size": "input_shape", "num_channels": "input_shape",
    "prediction_length": "target_shape", "num_output_channels": "target_shape", "hidden_sizes": "base_units",
    "encoder_depths": "enc_depth", "decoder_depths": "dec_depth", "num_attention_heads": "num_heads",
    "num_global_vectors": "num_global_vectors", "separate_global_qkv": "separate_global_qkv",
    "self_attention_pattern": "enc_cuboid_size", "cross_attention_pattern": "dec_cross_cuboid_hw",
    "num_covariates": "auxiliary_channels",
    "position_embedding_type": "pos_embed_type", "attention_dropout": "attn_drop", "`dropout": "ffn_drop",
    "stem_channels": "initial_downsample_stack_conv_dim_list", "stem_norm_groups": "base_units",
    "stem_strides": "initial_downsample_stack_conv_downscale_list / initial_downsample_scale",
}  # fmt: skip
PATTERN_NAMES = {"spatial_lg_v1": "spatial_lg_4", "video_swin": "video_swin_2x4"}
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "leaky": "leaky_relu"}
STRATEGIES = {"l": "local", "d": "dilated"}


def refuse(option: str, value, supported: str):
    raise ValueError(f"{option}={value!r} is not supported; {supported}.")


def alike(value, example) -> bool:
    """Whether a value is of an example's kind; a list is not empty, and each entry is like the example's first."""
    if isinstance(example, list):
        return isinstance(value, list) and bool(value) and all(alike(entry, example[0]) for entry in value)
    return type(value) is type(example) or (type(value) is int and type(example) is float)


def refuse_unlike(option: str, value, example, or_list: bool = False):
    """Refuse a value that is not of an example's kind, nor, where it may be, a list of such."""
    if not alike(value, example) and not (or_list and alike(value, [example])):
        refuse(option, value, f"it must be like {example!r}{' or a list of such' if or_list else ''}")


def known_pattern(option: str, name: str, known: Collection[str] = SELF_ATTENTION_PATTERNS) -> str:
    """Our name of a pattern."""
    name = PATTERN_NAMES.get(name, name)
    if re.sub(r"\d+", "#", name) not in known:
        refuse(option, name, f"only {', '.join(known)} ('#' is a number)")
    return name


def convert_config(model: dict) -> EarthformerConfig:
    """The `model:` block of an original configuration file (or the constructor's arguments) as our configuration.

    Raises:
        ValueError: an option is unknown, or has a value that this package does not have; the message names it.
    """
    original = dict(DEFAULTS)
    for key, value in model.items():
        if key in NEVER_READ:
            if value != NEVER_READ[key]:
                refuse(key, value, f"only {NEVER_READ[key]!r}")
            continue
        if key == "data_channels":  # of the scripts, which derive the shapes from it
            shape = model.get("input_shape")
            if not alike(shape, LIKE["input_shape"]) or value != shape[-1]:
                refuse(key, value, "it must be the last number of input_shape")
            continue
        name = ALIASES.get(key, key)
        if name != key and name in model:
            refuse(key, value, f"{name} is given too")
        if name not in DEFAULTS and name not in ("input_shape", "target_shape"):
            refuse(key, value, "it is no option of the original model")
        if name not in BUILT_IN.keys() | NO_EFFECT and value != DEFAULTS.get(name):
            refuse_unlike(key, value, LIKE[name], name in OR_LISTS)
        original[name] = value
    for name in ("input_shape", "target_shape"):
        if len(original.get(name) or ()) != 4:
            refuse(name, original.get(name), "it must be [time, height, width, channels]")
    covariates = original["auxiliary_channels"]
    if covariates and original["unet_dec_cross_mode"] != "both":
        refuse(
            "unet_dec_cross_mode", original["unet_dec_cross_mode"], "only 'both', where auxiliary_channels are given"
        )
    if "unet_dec_cross_mode" in model and not covariates:
        refuse("unet_dec_cross_mode", model["unet_dec_cross_mode"], "only where auxiliary_channels are given")
    if covariates:
        original["z_init_method"] = BUILT_IN["z_init_method"]  # there, it is never read
    global_vectors = BUILT_IN_WITH_GLOBAL_VECTORS if original["num_global_vectors"] else {}
    for name, built_in in (BUILT_IN | global_vectors).items():
        if original[name] != built_in:
            refuse(name, original[name], f"only {built_in!r}")
    if original["downsample"] not in (2, [1, 2, 2]):
        refuse("downsample", original["downsample"], "only 2")
    if original["padding_type"] not in ("zeros", "ignore"):
        refuse("padding_type", original["padding_type"], "only 'zeros' and 'ignore'")
    if original["ffn_activation"] not in ACTIVATIONS:
        refuse("ffn_activation", original["ffn_activation"], f"only {list(ACTIVATIONS)}")
    if original["proj_drop"] != original["ffn_drop"]:
        refuse("proj_drop", original["proj_drop"], f"only the value of ffn_drop, {original['ffn_drop']!r}")

    (context, *image_size, channels), (prediction, *target_size, out_channels) = (
        original["input_shape"],
        original["target_shape"],
    )
    if image_size != target_size:
        refuse("target_shape", original["target_shape"], f"only height and width of input_shape, {image_size}")
    for name in ("enc_depth", "dec_depth"):
        depth = original[name]
        if not isinstance(depth, list) or len(depth) != len(original["enc_depth"]):
            refuse(f"{name} (enc_depth, dec_depth)", depth, "both must be lists, with one number per level")
    if original["block_units"] and original["block_units"][0] != original["base_units"]:
        refuse("block_units", original["block_units"], f"the first must be base_units, {original['base_units']}")
    levels = len(original["enc_depth"])
    growth = 2 ** original["scale_alpha"]
    hidden_sizes = original["block_units"] or [original["base_units"] * int(growth**i) for i in range(levels)]
    self_pattern, cross_pattern = convert_patterns(original, levels)
    options = dict(
        context_length=context,
        prediction_length=prediction,
        image_size=image_size,
        num_channels=channels,
        num_output_channels=out_channels,
        num_covariates=covariates,
        hidden_sizes=hidden_sizes,
        encoder_depths=original["enc_depth"],
        decoder_depths=original["dec_depth"],
        num_attention_heads=original["num_heads"],
        num_global_vectors=original["num_global_vectors"],
        separate_global_qkv=original["separate_global_qkv"],
        self_attention_pattern=self_pattern,
        cross_attention_pattern=cross_pattern,
        mask_padding=original["padding_type"] == "ignore",
        position_embedding_type=original["pos_embed_type"],
        hidden_act=ACTIVATIONS[original["ffn_activation"]],
        dropout=original["ffn_drop"],
        attention_dropout=original["attn_drop"],
        **convert_stem(original),
    )
    try:
        return EarthformerConfig(**options)
    except Exception as reason:  # its own errors and those of the library's type checks, under the original's names
        named = [name for ours, name in THEIR_NAMES.items() if ours in str(reason)]
        raise ValueError(f"{' / '.join(named) or 'model'}: {' '.join(str(reason).split())}") from reason


def convert_stem(original: dict) -> dict:
    """Both kinds of the original's stem as stages of ours."""
    kind = original["initial_downsample_type"]
    if kind == "conv":
        scale = original["initial_downsample_scale"]
        scale = [scale, scale] if isinstance(scale, int) else list(scale)
        if len(scale) == 3 and scale[0] == 1:
            scale = scale[1:]
        convs = original["initial_downsample_conv_layers"], original["final_upsample_conv_layers"]
        if len(scale) != 2:
            refuse(
                "initial_downsample_scale", original["initial_downsample_scale"], "only height and width are reduced"
            )
        if min(convs) < 1:
            refuse("initial_downsample_conv_layers / final_upsample_conv_layers", convs, "only 1 and more")
        return {
            "stem_channels": [original["base_units"]],
            "stem_strides": [scale[0] if scale[0] == scale[1] else scale],
            "stem_num_convs": convs[0],
            "stem_norm_groups": 16,
            "head_num_convs": convs[1],
        }
    if kind == "stack_conv":
        stages = original["initial_downsample_stack_conv_num_layers"]
        channels = original["initial_downsample_stack_conv_dim_list"] or [original["base_units"]] * stages
        # The original's head reads the list of convolutions from its end, its stem from its start.
        convs = original["initial_downsample_stack_conv_num_conv_list"]
        if len(set(convs)) != 1 or min(convs) < 1:
            refuse("initial_downsample_stack_conv_num_conv_list", convs, "only one number for all stages, at least 1")
        return {
            "stem_channels": channels[:stages],
            "stem_strides": original["initial_downsample_stack_conv_downscale_list"][:stages],
            "stem_num_convs": convs[0],
            "stem_norm_groups": None,
            "head_num_convs": convs[0],
        }
    return refuse("initial_downsample_type", kind, "only 'conv' and 'stack_conv'")


def convert_patterns(original: dict, levels: int) -> tuple[str | list, str | list]:
    """Named patterns, or the explicit cuboids that count where no name is given."""

    def named(option, known=SELF_ATTENTION_PATTERNS):
        patterns = original[option]
        yaml_key = next(key for key, argument in ALIASES.items() if argument == option)
        option = f"{yaml_key} ({option})"
        if not isinstance(patterns, str):
            return [known_pattern(option, name, known) for name in patterns]
        return known_pattern(option, patterns, known)

    def per_level(name):
        """The original repeats a list for one level for every level."""
        value = original[name]
        if alike(value, LIKE[name]):
            return [value] * levels
        if len(value) != levels:
            refuse(name, value, f"only one list, or one for each of {levels} levels")
        return value

    def explicit(size, strategy, shift, number=None):
        result = []
        for level in range(levels):
            cuboids = []
            lists = [per_level(name)[level] for name in (size, strategy, shift)]
            numbers = per_level(number)[level] if number else [None] * len(lists[0])
            if len({len(entry) for entry in [*lists, numbers]}) != 1:
                refuse(size, original[size], f"only as many cuboids as {strategy} and {shift} have")
            for cuboid, kinds, shifts, count in zip(*lists, numbers):
                if not STRATEGIES.keys() >= set(kinds):
                    refuse(strategy, original[strategy], f"only {list(STRATEGIES)}")
                cuboids.append(
                    {"size": list(cuboid), "strategy": [STRATEGIES[kind] for kind in kinds], "shift": list(shifts)}
                )
                if number is not None:
                    cuboids[-1]["cuboids_along_time"] = count
            result.append(cuboids)
        return result

    if original["enc_attn_patterns"] is not None:
        encoder = named("enc_attn_patterns")
    else:
        encoder = explicit("enc_cuboid_size", "enc_cuboid_strategy", "enc_shift_size")
    if original["dec_self_attn_patterns"] is not None:
        decoder, option = named("dec_self_attn_patterns"), "dec_self_attn_patterns"
    else:
        decoder, option = explicit("dec_self_cuboid_size", "dec_self_cuboid_strategy", "dec_self_shift_size"), None
    spread = [[pattern] * levels if isinstance(pattern, str) else pattern for pattern in (encoder, decoder)]
    if spread[0] != spread[1]:
        value = original[option or "dec_self_cuboid_size"]
        refuse(f"cross_self_pattern ({option or 'dec_self_cuboid_size'})", value, "only the pattern of the encoder")
    if original["dec_cross_attn_patterns"] is not None:
        cross = named("dec_cross_attn_patterns", CROSS_ATTENTION_PATTERNS)
    else:
        cross = explicit(
            "dec_cross_cuboid_hw", "dec_cross_cuboid_strategy", "dec_cross_shift_hw", "dec_cross_n_temporal"
        )
    return encoder, cross


# ---------------------------------------------------------------------------------------------------------------------


ROOT = Path(__file__).parents[1]
PRESETS = (
    "sevir", "sevir-lr", "icar-enso", "earthnet2021", "nbody-mnist", "moving-mnist",
    "sevir-paper", "sevir-paper-noglobal", "icar-enso-paper",
)  # fmt: skip


def read_config(path: Path) -> EarthformerConfig:
    """The configuration that a file of the original describes.

    Raises:
        ValueError: the file has no `model:` block, or `convert_config` refuses it.
    """
    document = yaml.safe_load(Path(path).read_text())
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError(f"config_path: {path} has no top-level `model:` block.")
    return convert_config(document["model"])


def recipe(name: str) -> dict:
    """A file of `examples/configs`."""
    return yaml.safe_load((ROOT / f"examples/configs/{name.replace('-', '_')}.yaml").read_text())


def preset_config(name: str) -> EarthformerConfig:
    """The configuration of a published setting."""
    return EarthformerConfig(**recipe(f"earthformer_{name}")["model"])


def released_card(name: str, conversion_report: str) -> str | None:
    """The card of `model_cards/NAME`, if there is one, and where these weights come from."""
    path = ROOT / "model_cards" / name / "README.md"
    if not path.is_file():
        return None
    unchecked = "We know no SHA-256 of the released files, so it was not checked whether these are the ones."
    return f"{path.read_text(encoding='utf-8')}\n{conversion_report}\n{unchecked}\n"


def report(command: str, sources: Iterable[tuple[Path, Conversion]]) -> str:
    """The card's section on where the weights come from."""
    lines = ["## Conversion", "", "```", command, "```", ""]
    tables = []
    for path, conversion in sources:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines += [f"`{path.name}`, SHA-256 `{digest}`:", "", f"- {len(conversion.renamed)} tensors were renamed."]
        for reason, number in Counter(conversion.dropped.values()).items():
            lines.append(f"- {number} were dropped: {reason}.")
        lines.append("")
        tables += ["<details>", f"<summary>Every tensor of {path.name}</summary>", "", "| there | here |", "|---|---|"]
        tables += [f"| `{name}` | `{target}` |" for name, target in conversion.renamed.items()]
        tables += [f"| `{name}` | dropped: {reason} |" for name, reason in conversion.dropped.items()]
        tables += ["", "</details>", ""]
    lines += ["The weights were saved and loaded again; outputs on a fixed input are those from before.", ""]
    return "\n".join(lines + tables)


CARD = """---
license: other
library_name: transformers
pipeline_tag: time-series-forecasting
tags: [earthformer]
---

# {name}

An [Earthformer](https://arxiv.org/abs/2207.05833) of {parameters:,} parameters, converted from a checkpoint of the
[original](https://github.com/amazon-science/earth-forecasting-transformer). It has not been scored since.
The licence of the weights is not known here: it is whatever their owner gave them.

## Inputs and outputs

| name | shape | unit, range |
|---|---|---|
{inputs}

{range}

## Use

```python
from transformers import AutoModelForTimeSeriesPrediction

import earthformer_hf  # registers the classes

model = AutoModelForTimeSeriesPrediction.from_pretrained("{name}")
predictions = model({arguments}).predictions
```

{report}"""


def card(
    name: str,
    model: EarthformerForPrediction,
    extractor: EarthformerFeatureExtractor | None,
    conversion_report: str,
) -> str:
    """The model card: metadata, shapes, use, and where the weights come from."""
    config, size = model.config, ", ".join(map(str, model.config.image_size))
    rows = [("past_values", config.context_length, config.num_channels)]
    if config.num_covariates:
        rows.append(("past_covariates", config.context_length, config.num_covariates))
        rows.append(("future_covariates", config.prediction_length, config.num_covariates))
    arguments = ", ".join(f"{row[0]}={row[0]}" for row in rows)
    rows.append(("predictions", config.prediction_length, config.num_output_channels))
    unit = "as the original was trained on" if extractor is None else "as the feature extractor gives it"
    inputs = "\n".join(f"| `{n}` | (B, {time}, {size}, {channels}) float32 | {unit} |" for n, time, channels in rows)
    if extractor is None:
        stated_range = "The range of the data is the original's; the file and its configuration do not state it."
    else:
        stated_range = (
            f"The feature extractor gives (raw - {extractor.offset}) x {extractor.scale}; raw values are "
            f"{extractor.variable}, in units of {extractor.units}."
        )
    return CARD.format(
        name=name, parameters=model.num_parameters(), inputs=inputs, arguments=arguments, range=stated_range,
        report=conversion_report,
    )  # fmt: skip


@torch.no_grad()
def outputs(model: EarthformerForPrediction) -> list[torch.Tensor]:
    """What a model makes of a fixed input."""
    config = model.config

    def ramp(time: int, channels: int) -> torch.Tensor:
        shape = (1, time, *config.image_size, channels)
        return torch.linspace(0, 1, torch.Size(shape).numel()).view(shape)

    covariates = {}
    if config.num_covariates:
        covariates["past_covariates"] = ramp(config.context_length, config.num_covariates)
        covariates["future_covariates"] = ramp(config.prediction_length, config.num_covariates)
    return [model(ramp(config.context_length, config.num_channels), **covariates).predictions]


Converted = TypeVar("Converted", EarthformerForPrediction, PreDiffPipeline)


def share(
    model: Converted,
    outputs: Callable[[Converted], list[torch.Tensor]],
    output_dir: Path,
    text: str,
    extractor: EarthformerFeatureExtractor | None = None,
    overwrite: bool = False,
) -> Converted:
    """Save, load again, compare, and export what was loaded, with `text` as its card; returns it.

    Raises:
        ValueError: the reloaded model computes something else, or `output_dir` holds something else.
    """
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        reloaded = type(model).from_pretrained(temporary)
        for one, other in zip(outputs(model), outputs(reloaded)):
            if not torch.allclose(one, other, rtol=0, atol=1e-6 * float(one.abs().max())):
                raise ValueError("checkpoint: what was saved and loaded again computes something else.")
        readme = Path(temporary) / "README.md"
        readme.write_text(text, encoding="utf-8")
        sharing.export(reloaded, output_dir, extractor, readme, overwrite)
    return reloaded


def convert(
    checkpoint_path: Path,
    config: EarthformerConfig,
    output_dir: Path,
    command: str = "",
    overwrite: bool = False,
    preset: str | None = None,
) -> EarthformerForPrediction:
    """Convert, compare and export; returns the reloaded model.

    Args:
        preset: the published setting that `config` is of, if any; it adds a feature extractor and its model card.

    Raises:
        ValueError: anything of the checkpoint has no place here, or `output_dir` holds something else.
    """
    model = EarthformerForPrediction(config).eval()
    conversion = convert_state_dict(load_tensors(checkpoint_path), model)
    model.load_state_dict(conversion.tensors)
    text = report(command, [(checkpoint_path, conversion)])
    extractor = released = None
    if preset is not None:
        extractor = EarthformerFeatureExtractor(**recipe(f"earthformer_{preset}")["feature_extractor"])
        released = released_card(f"earthformer-{preset}", text)
    text = released or card(Path(output_dir).resolve().name, model, extractor, text)
    return share(model, outputs, output_dir, text, extractor, overwrite)


def stated(script: str, arguments: argparse.Namespace) -> str:
    """The command as a card states it: paths without the folders of the machine it ran on."""
    parts = ["python", f"conversion/{script}"]
    for name, value in vars(arguments).items():
        if value is not None and name != "overwrite":
            parts += [f"--{name}", value.resolve().name if isinstance(value, Path) else value]
    return shlex.join(parts)


# What main() turns into one line.
ERRORS = (ValueError, TypeError, IndexError, OSError, RuntimeError, SafetensorError, YAMLError, UnpicklingError)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="checkpoint of the original (.pt, .ckpt)")
    configuration = parser.add_mutually_exclusive_group(required=True)
    configuration.add_argument("--config_path", type=Path, help="configuration of the original (.yaml)")
    configuration.add_argument("--preset", choices=PRESETS, help="a published setting instead")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that output_dir holds")
    arguments = parser.parse_args()
    try:
        config = preset_config(arguments.preset) if arguments.preset else read_config(arguments.config_path)
        command = stated("convert_earthformer.py", arguments)
        model = convert(
            arguments.checkpoint_path, config, arguments.output_dir, command, arguments.overwrite, arguments.preset
        )
    except ERRORS as reason:
        print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
        return 1
    print(f"{arguments.output_dir}: {model.num_parameters():,} parameters, reloaded and compared.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
