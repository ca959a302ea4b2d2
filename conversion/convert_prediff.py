"""Convert the three checkpoints of the original PreDiff (gaozhihan/PreDiff) to one pipeline folder.

    python conversion/convert_prediff.py --vae_checkpoint_path vae.pt --unet_checkpoint_path unet.pt \\
        --alignment_checkpoint_path alignment.pt --preset sevir-lr --output_dir DIR

Each checkpoint is a plain state dict or a Lightning checkpoint of which only the state dict is read: everything else
in it becomes an inert placeholder, and a file that asks for anything unusual is refused before it is loaded. Options
that a configuration (`--config_path` instead of `--preset`) leaves out take the original's defaults; what this package
does not have is refused by name. A preset also brings the feature extractor and the model card of the release.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from checkpoints import load_tensors
from convert_earthformer import (
    ERRORS,
    INDEX,
    NO_EFFECT,
    READ_BY_NOTHING,
    UPDATES,
    WHAT,
    Conversion,
    fitted,
    known_pattern,
    recipe,
    refuse,
    refuse_unlike,
    released_card,
    report,
    share,
    stated,
)
from diffusers import AutoencoderKL, DDPMScheduler

from earthformer_hf import (
    EarthformerAlignmentModel,
    EarthformerFeatureExtractor,
    EarthformerUNetModel,
    PreDiffPipeline,
)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: regular expression -> name. The first rule that matches is applied.
# ---------------------------------------------------------------------------------------------------------------------

NETWORK = [
    (r"^first_proj\.", r"down.in_block."),
    (r"^time_embed\.layer\.0\.", r"down.time_embedding.linear_1."),
    (r"^time_embed\.layer\.2\.", r"down.time_embedding.linear_2."),
    (r"^pos_embed\.", r"down.position_embedding."),
    (r"^init_global_vectors$", r"down.global_vectors"),
    (r"^down_time_embed_blocks\.", r"down.residuals."),
    (r"^down_self_blocks\.", r"down.levels."),
    (r"^downsample_layers\.", r"down.merges."),
    (r"^down_layer_global_proj\.", r"down.global_projections."),
    (r"^up_time_embed_blocks\.", r"up.residuals."),
    (r"^up_self_blocks\.", r"up.levels."),
    (r"^upsample_layers\.", r"up.upsamples."),
    (r"^up_layer_global_proj\.", r"up.global_projections."),
    (r"^final_proj\.", r"out_proj."),
    (r"^out\.0\.", r"norm_out."),
    (r"^out\.2\.positional_embedding$", r"pool.position_embedding"),
    (r"^out\.2\.qkv_proj\.", r"pool.qkv."),
    (r"^out\.2\.c_proj\.", r"pool.out_proj."),
]
RESIDUAL = [
    (r"\.in_layers\.0\.", r".norm1."),
    (r"\.in_layers\.2\.", r".conv1."),
    (r"\.emb_layers\.1\.", r".time_proj."),
    (r"\.out_layers\.0\.", r".norm2."),
    (r"\.out_layers\.3\.", r".conv2."),
    (r"\.skip_connection\.", r".shortcut."),
]
VAE = [
    (r"\.attentions\.0\.query\.", r".attentions.0.to_q."),
    (r"\.attentions\.0\.key\.", r".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", r".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", r".attentions.0.to_out.0."),
]
# Where a network lies in a Lightning checkpoint; a plain state dict has no prefix.
PREFIXES = {
    "vae": ("first_stage_model.", "torch_nn_module."),
    "unet": ("torch_nn_module.",),
    "alignment": ("torch_nn_module.", "alignment_model.", "model."),
}
# What lies beside the network there: the VAE (twice), the schedule, averaged weights, the discriminator.
BESIDE = re.compile(
    r"(first_stage_model|cond_stage_model|alignment_model|torch_nn_module|\w*ema|loss|logger)\b.*|logvar|betas|\w*alphas_cumprod\w*"
    r"|posterior_\w+|lvlb_weights|log_one_minus_\w+|sqrt_\w+"
)
DROPPED = [INDEX, (r"^up\.levels\.0\.\d+" + UPDATES, READ_BY_NOTHING)]


def select(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The tensors of one network, without their prefix.

    Raises:
        ValueError: a tensor that is neither of the network nor known to lie beside it.
    """
    for prefix in PREFIXES[part]:
        chosen = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if chosen:
            others = [name for name in tensors if not name.startswith(prefix) and not BESIDE.fullmatch(name)]
            if others:
                raise ValueError(f"{part} checkpoint: unknown tensor {others[0]!r} beside {prefix}*.")
            return chosen
    averaged = re.compile(r"\w*ema\..*")
    return {name: tensor for name, tensor in tensors.items() if not averaged.fullmatch(name)}


def rename(name: str, part: str) -> str:
    """The name here of a tensor of the original."""
    for rules in (VAE,) if part == "vae" else (NETWORK, RESIDUAL + WHAT):
        for pattern, replacement in rules:
            if re.search(pattern, name):
                name = re.sub(pattern, replacement, name)
                break
    return name


def convert_state_dict(tensors: dict[str, torch.Tensor], model: torch.nn.Module, part: str) -> Conversion:
    """The original's tensors under our names and in our shapes.

    Raises:
        ValueError: a tensor is unknown, missing, or of another shape than the configuration says.
    """

    def triples():
        for name, tensor in tensors.items():
            target = rename(name, part)
            if target == "pool.position_embedding":
                tensor = tensor.T.contiguous()  # channels first there
            elif target.startswith("pool.") and tensor.ndim == 3:
                tensor = tensor.flatten(1)  # a convolution of width 1 there
            yield name, target, tensor

    return fitted(triples(), model.state_dict(), DROPPED, f"{part} checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

# The networks' options: the value that is built in where there is only one; an example where any is converted.
BUILT_IN = {
    "downsample": 2, "downsample_type": "patch_merge", "upsample_type": "upsample", "upsample_kernel_size": 3,
    "ffn_activation": "gelu", "gated_ffn": False, "norm_layer": "layer_norm", "use_inter_ffn": True,
    "hierarchical_pos_embed": False, "pos_embed_type": "t+h+w", "use_relative_pos": True,
    "self_attn_use_final_proj": True, "time_embed_channels_mult": 4, "time_embed_dropout": 0.0,
    "unet_res_connect": True, "pool": "attention", "readout_seq": True,
}  # fmt: skip
BUILT_IN_WITH_GLOBAL_VECTORS = {
    "use_global_vector_ffn": False, "use_global_self_attn": True, "separate_global_qkv": True, "global_dim_ratio": 1,
}  # fmt: skip
CONVERTED = {
    "input_shape": [7, 16, 16, 64], "target_shape": [6, 16, 16, 64], "base_units": 256, "block_units": [256, 256],
    "scale_alpha": 1.0, "depth": [4, 4], "num_heads": 4, "attn_drop": 0.1, "proj_drop": 0.1, "ffn_drop": 0.1,
    "block_attn_patterns": "axial", "padding_type": "zeros", "num_global_vectors": 0, "out_channels": 1, "out_len": 6,
    "time_embed_use_scale_shift_norm": False,
}  # fmt: skip
# Read only where no pattern is named, or of a decoder that this network does not have.
WITHOUT_EFFECT = NO_EFFECT | {
    "block_cuboid_size", "block_cuboid_strategy", "block_cuboid_shift_size", "use_dec_self_global",
    "use_dec_cross_global", "ffn2_linear_init_mode", "attn_proj_linear_init_mode", "down_linear_init_mode",
    "up_linear_init_mode", "global_proj_linear_init_mode",
}  # fmt: skip


def convert_network(options: dict, part: str) -> dict:
    """Our arguments for the denoiser or the alignment network.

    Raises:
        ValueError: an option is unknown, or has a value that this package does not have; the message names it.
    """
    options = {"block_attn_patterns" if key == "self_pattern" else key: value for key, value in options.items()}
    pattern_key = f"{part}.block_attn_patterns (self_pattern)"
    number = options.get("num_global_vectors", 0)
    built_in = BUILT_IN | (BUILT_IN_WITH_GLOBAL_VECTORS if number else {})
    for key, value in options.items():
        if key in built_in and value not in (built_in[key], [1, built_in[key], built_in[key]]):
            refuse(f"{part}.{key}", value, f"only {built_in[key]!r}")
        if key not in {*built_in, *BUILT_IN_WITH_GLOBAL_VECTORS, *CONVERTED, *WITHOUT_EFFECT}:
            refuse(f"{part}.{key}", value, "it is no option of the original network")
        if key in CONVERTED and not (value is None and key in ("block_units", "out_len")):
            named = key == "block_attn_patterns"
            refuse_unlike(pattern_key if named else f"{part}.{key}", value, CONVERTED[key], or_list=named)
    if number and part == "align":
        refuse("align.num_global_vectors", number, "only 0")
    if options.get("padding_type", "zeros") not in ("zeros", "ignore"):
        refuse(f"{part}.padding_type", options["padding_type"], "only 'zeros' and 'ignore'")
    drops = {options.get(name, 0.0) for name in ("attn_drop", "proj_drop", "ffn_drop")}
    if len(drops) != 1:
        refuse(f"{part}.attn_drop / proj_drop / ffn_drop", sorted(drops), "only one value for all")
    if len(options.get("input_shape") or ()) != 4:
        refuse(f"{part}.input_shape", options.get("input_shape"), "it must be [time, height, width, channels]")
    time, *size, channels = options["input_shape"]
    for name in ("base_units", "depth", "num_heads"):
        if name not in options:
            refuse(f"{part}.{name}", None, "it must be given")
    depth, patterns = options["depth"], options.get("block_attn_patterns")
    if patterns is None:
        refuse(pattern_key, patterns, "only named patterns")
    patterns = [patterns] * len(depth) if isinstance(patterns, str) else patterns
    growth, base = 2 ** options.get("scale_alpha", 1.0), options["base_units"]
    arguments = {
        "sample_size": size,
        "in_channels": channels,
        "block_out_channels": options.get("block_units") or [base * int(growth**i) for i in range(len(depth))],
        "layers_per_block": depth,
        "num_attention_heads": options["num_heads"],
        "attention_pattern": [known_pattern(pattern_key, name) for name in patterns],
        "mask_padding": options.get("padding_type", "zeros") == "ignore",
        "resnet_time_scale_shift": "scale_shift" if options.get("time_embed_use_scale_shift_norm") else "default",
        "dropout": drops.pop(),
    }
    if part == "align":
        if options.get("out_len", time) not in (None, time):
            refuse("align.out_len", options["out_len"], f"only all frames, {time}")
        return arguments | {"prediction_length": time, "out_channels": options.get("out_channels", 1)}
    target = options.get("target_shape") or []
    if list(target[1:]) != [*size, channels]:
        refuse(f"{part}.target_shape", target, f"it must end like input_shape, {[*size, channels]}")
    return arguments | {"context_length": time, "prediction_length": target[0], "num_global_vectors": number}


def convert_vae(options: dict) -> dict:
    """Arguments of diffusers' AutoencoderKL."""
    known = {
        "in_channels": 1, "out_channels": 1, "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [128, 256], "layers_per_block": 2,
        "act_fn": "silu", "latent_channels": 64, "norm_num_groups": 32,
    }  # fmt: skip
    for key, value in options.items():
        if key in known:
            refuse_unlike(f"vae.{key}", value, known[key])
        elif key not in {"pretrained_ckpt_path", "data_channels", "sample_size", "scaling_factor"}:
            refuse(f"vae.{key}", value, "it is no option of the original network")
    return {key: value for key, value in options.items() if key in known}


# Options of the original's diffusion; those that nothing here looks at concern training or follow from others.
DIFFUSION = {
    "data_shape", "layout", "timesteps", "beta_schedule", "loss_type", "monitor", "use_ema", "log_every_t",
    "clip_denoised", "linear_start", "linear_end", "cosine_s", "given_betas", "original_elbo_weight", "v_posterior",
    "l_simple_weight", "parameterization", "learn_logvar", "logvar_init", "latent_shape", "cond_stage_model",
    "num_timesteps_cond", "cond_stage_trainable", "cond_stage_forward", "scale_by_std", "scale_factor",
    "latent_cond_shape",
}  # fmt: skip


def convert_scheduler(options: dict) -> dict:
    """Arguments of diffusers' DDPMScheduler: the original's chain.

    Raises:
        ValueError: an option has a value that this package does not have.
    """
    names = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2"}
    kinds = {"eps": "epsilon", "x0": "sample"}
    for key, value in options.items():
        if key not in DIFFUSION:
            refuse(f"diffusion.{key}", value, "it is no option of the original")
    schedule = options.get("beta_schedule", "linear")
    if schedule not in names:
        refuse("diffusion.beta_schedule", schedule, f"only {list(names)}")
    if options.get("parameterization", "eps") not in kinds:
        refuse("diffusion.parameterization", options["parameterization"], f"only {list(kinds)}")
    for key, value in {
        "given_betas": None, "v_posterior": 0.0, "scale_by_std": False, "clip_denoised": False, "cosine_s": 8e-3,
        "cond_stage_model": "__is_first_stage__", "cond_stage_forward": None,
    }.items():  # fmt: skip
        given = options.get(key, value)
        if (float(given) if isinstance(value, float) else given) != value:
            refuse(f"diffusion.{key}", given, f"only {value!r}")
    return {
        "num_train_timesteps": options.get("timesteps", 1000),
        "beta_start": float(options.get("linear_start", 1e-4)),
        "beta_end": float(options.get("linear_end", 2e-2)),
        "beta_schedule": names[schedule],
        "variance_type": "fixed_small",
        "clip_sample": False,
        "prediction_type": kinds[options.get("parameterization", "eps")],
    }


# ---------------------------------------------------------------------------------------------------------------------


PRESETS = ("sevir-lr",)


def read_config(path: Path, aligned: bool) -> dict[str, Any]:
    """The parts of a pipeline that a file of the original describes, with random weights.

    Args:
        aligned: whether the alignment network is one of them.

    Raises:
        ValueError: the file lacks a block, or has an option that has no place here.
    """
    document = yaml.safe_load(Path(path).read_text())
    blocks = document.get("model") if isinstance(document, dict) else None
    for name in ("vae", "latent_model", "diffusion", *(["align"] if aligned else [])):
        if not isinstance(blocks, dict) or not isinstance(blocks.get(name), dict):
            raise ValueError(f"config_path: {path} has no block `model: {name}:`.")
    scale = float(blocks["diffusion"].get("scale_factor", 1.0))
    if scale != 1.0:
        refuse("diffusion.scale_factor", scale, "only 1.0, since the original scales the context by nothing else")
    vae = AutoencoderKL(**convert_vae(blocks["vae"]), scaling_factor=1.0)
    unet = EarthformerUNetModel(**convert_network(blocks["latent_model"], "latent_model"))
    if vae.config.latent_channels != unet.config.in_channels:
        refuse("vae.latent_channels", vae.config.latent_channels, f"the denoiser takes {unet.config.in_channels}")
    parts = {"vae": vae, "unet": unet, "scheduler": DDPMScheduler(**convert_scheduler(blocks["diffusion"]))}
    if aligned:
        align = blocks["align"]
        if align.get("alignment_type") != "avg_x" or align.get("model_type", "cuboid") != "cuboid":
            kinds = align.get("alignment_type"), align.get("model_type")
            refuse("align.alignment_type / model_type", kinds, "only 'avg_x' and 'cuboid'")
        if not isinstance(align.get("model_args"), dict):
            refuse("align.model_args", align.get("model_args"), "it must be a block of options")
        parts["alignment"] = EarthformerAlignmentModel(**convert_network(align["model_args"], "align"))
    return parts


def preset_parts(name: str, aligned: bool) -> dict[str, Any]:
    """The same of a published setting, and its feature extractor."""
    blocks = recipe(f"prediff_{name}")
    vae = AutoencoderKL(**blocks["vae"])
    unet = EarthformerUNetModel(in_channels=vae.config.latent_channels, **blocks["unet"])
    scheduler = {key: value for key, value in blocks["scheduler"].items() if key != "class"}
    parts = {"vae": vae, "unet": unet, "scheduler": DDPMScheduler(**scheduler)}
    if aligned:
        shape = {field: unet.config[field] for field in ("sample_size", "prediction_length", "in_channels")}
        parts["alignment"] = EarthformerAlignmentModel(**shape, **blocks["alignment_network"])
    return parts | {"feature_extractor": EarthformerFeatureExtractor(**blocks["feature_extractor"])}


def convert(
    vae_checkpoint_path: Path,
    unet_checkpoint_path: Path,
    output_dir: Path,
    alignment_checkpoint_path: Path | None = None,
    config_path: Path | None = None,
    preset: str | None = None,
    command: str = "",
    overwrite: bool = False,
) -> PreDiffPipeline:
    """Convert, compare and export; returns the reloaded pipeline.

    Raises:
        ValueError: anything of the configuration or a checkpoint has no place here, or `output_dir` holds something
            else.
    """
    paths = {"vae": vae_checkpoint_path, "unet": unet_checkpoint_path}
    if alignment_checkpoint_path is not None:
        paths["alignment"] = alignment_checkpoint_path
    aligned = "alignment" in paths
    parts = preset_parts(preset, aligned) if preset else read_config(config_path, aligned)
    sources = [fill(parts[part], path, part) for part, path in paths.items()]
    pipeline, text = PreDiffPipeline(**parts), report(command, sources)
    released = released_card(f"prediff-{preset}", text) if preset else None
    text = released or card(Path(output_dir).resolve().name, pipeline, text)
    return share(pipeline, outputs, output_dir, text, overwrite=overwrite)


def fill(model: torch.nn.Module, path: Path, part: str) -> tuple[Path, Conversion]:
    """Give a network its weights; returns the file and what became of its tensors.

    Raises:
        ValueError: a tensor has no place here.
    """
    tensors = load_tensors(path)
    chosen = select(tensors, part)
    conversion = convert_state_dict(chosen, model, part)
    model.load_state_dict(conversion.tensors)
    model.eval()
    of_the_network = {prefix + name for prefix in ("", *PREFIXES[part]) for name in chosen}
    beside = {name: "not of this network" for name in tensors if name not in of_the_network}
    return path, conversion._replace(dropped=conversion.dropped | beside)


CARD = """---
license: other
library_name: diffusers
tags: [prediff]
---

# {name}

[PreDiff](https://arxiv.org/abs/2307.10422), converted from checkpoints of the
[original](https://github.com/gaozhihan/PreDiff). It has not been scored since.
The licence of the weights is not known here: it is whatever their owner gave them.

## Inputs and outputs

| name | shape | unit, range |
|---|---|---|
| `past_values` | (B, {context}, {size}, {channels}) float32 | as the original was trained on |
| `predictions` | (B, ensemble, {prediction}, {size}, {channels}) float32 | as `past_values` |

## Use

```python
from earthformer_hf import PreDiffPipeline

pipeline = PreDiffPipeline.from_pretrained("{name}")
predictions = pipeline(past_values, ensemble_size=8, num_inference_steps=20).predictions
```

{report}"""


def card(name: str, pipeline: PreDiffPipeline, conversion_report: str) -> str:
    """The model card: metadata, shapes, use, and where the weights come from."""
    config = pipeline.unet.config
    return CARD.format(
        name=name,
        context=config.context_length,
        prediction=config.prediction_length,
        size=", ".join(map(str, frame_size(pipeline))),
        channels=pipeline.vae.config.in_channels,
        report=conversion_report,
    )


def frame_size(pipeline: PreDiffPipeline) -> list[int]:
    """Height and width of a frame."""
    return [n * 2 ** (len(pipeline.vae.config.block_out_channels) - 1) for n in pipeline.unet.config.sample_size]


@torch.no_grad()
def outputs(pipeline: PreDiffPipeline) -> list[torch.Tensor]:
    """What every network makes of a fixed input."""
    config, channels = pipeline.unet.config, pipeline.vae.config.in_channels
    random = torch.Generator().manual_seed(0)
    shape = (*config.sample_size, config.in_channels)
    noisy = torch.randn(1, config.prediction_length, *shape, generator=random)
    context = torch.randn(1, config.context_length, *shape, generator=random)
    frame = torch.randn(1, channels, *frame_size(pipeline), generator=random)
    mode = pipeline.vae.encode(frame).latent_dist.mode()
    results = [mode, pipeline.vae.decode(mode).sample, pipeline.unet(noisy, 500, context).sample]
    if pipeline.alignment is not None:
        results.append(pipeline.alignment(noisy, 500).prediction)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae_checkpoint_path", type=Path, required=True)
    parser.add_argument("--unet_checkpoint_path", type=Path, required=True)
    parser.add_argument("--alignment_checkpoint_path", type=Path, help="without it the pipeline has no `alignment`")
    configuration = parser.add_mutually_exclusive_group(required=True)
    configuration.add_argument("--config_path", type=Path, help="configuration of the original (.yaml)")
    configuration.add_argument("--preset", choices=PRESETS, help="a published setting instead")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that output_dir holds")
    arguments = parser.parse_args()
    try:
        convert(**vars(arguments), command=stated("convert_prediff.py", arguments))
    except ERRORS as reason:
        print(f"error: {' '.join(str(reason).split())}", file=sys.stderr)
        return 1
    print(f"{arguments.output_dir}: reloaded and compared.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
