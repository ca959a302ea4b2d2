"""Options of the original PreDiff -> arguments of the denoiser, the alignment network, the VAE and the scheduler.

The tables say for each option what becomes of it; the defaults are those of the original's training script, which read
the configuration files. The functions before them make several options into arguments together, or refuse what does
not fit.
"""

from typing import Any

from common import (
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
    level_channels,
    refuse,
)


# ---------------------------------------------------------------------------------------------------------------------
# Options of the denoiser and the alignment network
# ---------------------------------------------------------------------------------------------------------------------


def has_global_vectors(options: Options) -> bool:
    return options["num_global_vectors"] != 0


def unet_shapes(options: Options) -> dict[str, Any]:
    """`input_shape` of the context and `target_shape` of the forecast: [time, height, width, channels]."""
    context_length, *size, channels = time_height_width_channels(options)
    target = options["target_shape"]
    if target[1:] != [*size, channels]:
        refuse("target_shape", target, f"it must end like input_shape, {[*size, channels]}")
    return {
        "context_length": context_length,
        "prediction_length": target[0],
        "sample_size": size,
        "in_channels": channels,
    }


def alignment_shapes(options: Options) -> dict[str, Any]:
    """`input_shape` of the forecast, and of how many of its last frames the original reads the quantity."""
    prediction_length, *size, channels = time_height_width_channels(options)
    if options["out_len"] not in (None, prediction_length):
        refuse("out_len", options["out_len"], f"only all frames, {prediction_length}")
    return {"prediction_length": prediction_length, "sample_size": size, "in_channels": channels}


def time_height_width_channels(options: Options) -> list[int]:
    if len(options["input_shape"]) != 4:
        refuse("input_shape", options["input_shape"], "it must be [time, height, width, channels]")
    return options["input_shape"]


def block_out_channels(options: Options) -> dict[str, Any]:
    return {"block_out_channels": level_channels(options, len(options["depth"]))}


def attention_pattern(options: Options) -> dict[str, Any]:
    patterns, label = options["block_attn_patterns"], "block_attn_patterns (self_pattern)"
    if patterns is None:
        refuse(label, patterns, "only named patterns")
    patterns = [patterns] * len(options["depth"]) if isinstance(patterns, str) else patterns
    return {"attention_pattern": [convert_pattern(label, name) for name in patterns]}


def dropout(options: Options) -> dict[str, Any]:
    probabilities = {options[name] for name in ("attn_drop", "proj_drop", "ffn_drop")}
    if len(probabilities) != 1:
        refuse("attn_drop / proj_drop / ffn_drop", sorted(probabilities), "only one value for all")
    return {"dropout": probabilities.pop()}


OF_TRAINING = Ignore("it changes how the original trains, not what a trained model computes")
OF_START = Ignore("it says how untrained weights are drawn")
OF_CUBOIDS = Ignore("it is read where no pattern is named, which is refused")
OF_A_DECODER = Ignore("it is of Earthformer's decoder, which this network does not have")
OF_GLOBAL_VECTORS = Ignore("it is of global vectors, which are refused in the alignment network")

SHARED_OPTIONS: dict[str, Rule] = {
    # levels
    "base_units": Compute(block_out_channels, default=REQUIRED, example=256),
    "block_units": Compute(block_out_channels, default=None, example=[256, 256]),
    "scale_alpha": Compute(block_out_channels, default=1.0),
    "depth": Rename("layers_per_block", default=REQUIRED, example=[4, 4]),
    "downsample": Only(2, also=([1, 2, 2],)),
    "downsample_type": Only("patch_merge"),
    # layers
    "block_attn_patterns": Compute(attention_pattern, default=None, example="axial", or_list=True),
    "self_pattern": Alias("block_attn_patterns"),
    "block_cuboid_size": OF_CUBOIDS,
    "block_cuboid_strategy": OF_CUBOIDS,
    "block_cuboid_shift_size": OF_CUBOIDS,
    "num_heads": Rename("num_attention_heads", default=REQUIRED, example=4),
    "ffn_activation": Only("gelu"),
    "gated_ffn": Only(False),
    "use_inter_ffn": Only(True),
    "norm_layer": Only("layer_norm"),
    "padding_type": Translate("mask_padding", PADDING, default="zeros"),
    "pos_embed_type": Only("t+h+w"),
    "hierarchical_pos_embed": Only(False),
    "use_relative_pos": Only(True),
    "self_attn_use_final_proj": Only(True),
    # embedding of the diffusion step
    "time_embed_channels_mult": Only(4),
    "time_embed_dropout": Only(0.0),
    "time_embed_use_scale_shift_norm": Translate(
        "resnet_time_scale_shift", {False: "default", True: "scale_shift"}, default=False
    ),
    # training
    "checkpoint_level": OF_TRAINING,
    "attn_linear_init_mode": OF_START,
    "attn_proj_linear_init_mode": OF_START,
    "ffn_linear_init_mode": OF_START,
    "ffn2_linear_init_mode": OF_START,
    "conv_init_mode": OF_START,
    "down_linear_init_mode": OF_START,
    "global_proj_linear_init_mode": OF_START,
    "norm_init_mode": OF_START,
}
UNET_OPTIONS = SHARED_OPTIONS | {
    "attn_drop": Compute(dropout, default=0.1),
    "proj_drop": Compute(dropout, default=0.1),
    "ffn_drop": Compute(dropout, default=0.1),
    "input_shape": Compute(unet_shapes, default=REQUIRED, example=[7, 16, 16, 64]),
    "target_shape": Compute(unet_shapes, default=REQUIRED, example=[6, 16, 16, 64]),
    "upsample_type": Only("upsample"),
    "upsample_kernel_size": Only(3),
    "unet_res_connect": Only(True),
    "num_global_vectors": Rename("num_global_vectors", default=0),
    "use_global_vector_ffn": Only(False, when=has_global_vectors),
    "use_global_self_attn": Only(True, when=has_global_vectors),
    "separate_global_qkv": Only(True, when=has_global_vectors),
    "global_dim_ratio": Only(1, when=has_global_vectors),
    "use_dec_self_global": OF_A_DECODER,
    "use_dec_cross_global": OF_A_DECODER,
    "dec_self_update_global": OF_A_DECODER,
    "up_linear_init_mode": OF_START,
    "down_up_linear_init_mode": OF_START,
}
ALIGNMENT_OPTIONS = SHARED_OPTIONS | {
    "attn_drop": Compute(dropout, default=0.0),
    "proj_drop": Compute(dropout, default=0.0),
    "ffn_drop": Compute(dropout, default=0.0),
    "input_shape": Compute(alignment_shapes, default=REQUIRED, example=[6, 16, 16, 64]),
    "out_len": Compute(alignment_shapes, default=None, example=6),
    "out_channels": Rename("out_channels", default=1),
    "pool": Only("attention"),
    "readout_seq": Only(True),
    "num_global_vectors": Only(0),
    "use_global_vector_ffn": OF_GLOBAL_VECTORS,
    "use_global_self_attn": OF_GLOBAL_VECTORS,
    "separate_global_qkv": OF_GLOBAL_VECTORS,
    "global_dim_ratio": OF_GLOBAL_VECTORS,
}


def convert_network(options: dict[str, Any], block: str) -> dict[str, Any]:
    """Our arguments for the denoiser or the alignment network.

    Args:
        block: "latent_model" or "align", as in the original's configuration.

    Raises:
        ValueError: an option is unknown, or has a value that this package does not have; the message names it.
    """
    rules = {"latent_model": UNET_OPTIONS, "align": ALIGNMENT_OPTIONS}[block]
    return convert_options(options, rules, f"{block}.")


# ---------------------------------------------------------------------------------------------------------------------
# Options of the autoencoder and the diffusion, which become those of diffusers' AutoencoderKL and DDPMScheduler
# ---------------------------------------------------------------------------------------------------------------------

VAE_OPTIONS: dict[str, Rule] = {
    "in_channels": Rename("in_channels", example=1),
    "out_channels": Rename("out_channels", example=1),
    "down_block_types": Rename("down_block_types", example=["DownEncoderBlock2D"]),
    "up_block_types": Rename("up_block_types", example=["UpDecoderBlock2D"]),
    "block_out_channels": Rename("block_out_channels", example=[128, 256]),
    "layers_per_block": Rename("layers_per_block", example=2),
    "act_fn": Rename("act_fn", example="silu"),
    "latent_channels": Rename("latent_channels", example=64),
    "norm_num_groups": Rename("norm_num_groups", example=32),
    "data_channels": Ignore("the original's scripts make in_channels and out_channels from it"),
    "sample_size": Ignore("nothing reads it"),
    "scaling_factor": Ignore("nothing reads it: the original scales by scale_factor of the diffusion"),
    "pretrained_ckpt_path": Ignore("the checkpoint is given to the command"),
}

SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample"}
OF_SHAPES = Ignore("it follows from the networks")
OF_CONTEXT = Ignore("it is of training a network for the context, where the autoencoder is supported only")

DIFFUSION_OPTIONS: dict[str, Rule] = {
    "timesteps": Rename("num_train_timesteps", default=1000),
    "beta_schedule": Translate("beta_schedule", SCHEDULES, default="linear"),
    "linear_start": Rename("beta_start", default=1e-4),
    "linear_end": Rename("beta_end", default=2e-2),
    "cosine_s": Only(8e-3),
    "given_betas": Only(None),
    "parameterization": Translate("prediction_type", PREDICTION_TYPES, default="eps"),
    "v_posterior": Only(0.0),
    "clip_denoised": Only(False),
    "scale_by_std": Only(False),
    "scale_factor": Only(1.0),  # by which the original scales nothing but the context
    "cond_stage_model": Only("__is_first_stage__"),
    "cond_stage_forward": Only(None),
    "cond_stage_trainable": OF_CONTEXT,
    "num_timesteps_cond": OF_CONTEXT,
    "data_shape": OF_SHAPES,
    "layout": OF_SHAPES,
    "latent_shape": OF_SHAPES,
    "latent_cond_shape": OF_SHAPES,
    "loss_type": OF_TRAINING,
    "monitor": OF_TRAINING,
    "use_ema": OF_TRAINING,
    "log_every_t": OF_TRAINING,
    "original_elbo_weight": OF_TRAINING,
    "l_simple_weight": OF_TRAINING,
    "learn_logvar": OF_TRAINING,
    "logvar_init": OF_TRAINING,
}
DIFFUSION_NUMBERS = ("linear_start", "linear_end", "cosine_s", "v_posterior", "scale_factor")


def convert_vae(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL.

    Raises:
        ValueError: an option is unknown or of another type.
    """
    return convert_options(options, VAE_OPTIONS, "vae.")


def convert_scheduler(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of diffusers' DDPMScheduler: the original's chain.

    Raises:
        ValueError: an option is unknown, or has a value that this package does not have.
    """
    options = dict(options)
    for name in DIFFUSION_NUMBERS:
        if isinstance(options.get(name), str):  # YAML takes 1e-4 for text
            try:
                options[name] = float(options[name])
            except ValueError:
                refuse(f"diffusion.{name}", options[name], "it must be a number")
    arguments = convert_options(options, DIFFUSION_OPTIONS, "diffusion.")
    return arguments | {"variance_type": "fixed_small", "clip_sample": False}


__all__ = [
    "ALIGNMENT_OPTIONS", "DIFFUSION_OPTIONS", "UNET_OPTIONS", "VAE_OPTIONS", "convert_network", "convert_scheduler",
    "convert_vae",
]  # fmt: skip
