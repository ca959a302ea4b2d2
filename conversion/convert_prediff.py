"""Convert the three checkpoints of the original PreDiff (gaozhihan/PreDiff) to one pipeline folder.

    python conversion/convert_prediff.py --vae_checkpoint_path vae.pt --unet_checkpoint_path unet.pt \\
        --alignment_checkpoint_path alignment.pt --preset sevir-lr --output_dir DIR

Each checkpoint is a plain state dict or a Lightning checkpoint of which only the state dict is read; a file that asks
for anything unusual is refused before it is loaded. Options that a configuration (`--config_path` instead of
`--preset`) leaves out take the defaults of the original's training script; what this package does not have is refused
by name. A preset also brings the feature extractor and the model card of the release.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import load_tensors
from common import (
    LAYER_NAMES,
    POSITION_INDEX,
    Conversion,
    add_shared_arguments,
    command_for_card,
    compare_and_export,
    conversion_section,
    match_tensors,
    read_model_block,
    read_recipe,
    refuse,
    released_card,
    rename_first,
    run,
    unused_update_of_global_vectors,
)
from diffusers import AutoencoderKL, DDPMScheduler
from prediff_options import convert_network, convert_scheduler, convert_vae

from earthformer_hf import (
    EarthformerAlignmentModel,
    EarthformerFeatureExtractor,
    EarthformerUNetModel,
    PreDiffPipeline,
)
from earthformer_hf.sharing.cards import converted_card


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: regular expression -> name. Where a module lies in the network comes first, then what is inside it.
# ---------------------------------------------------------------------------------------------------------------------

MODULE_NAMES = [
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
RESIDUAL_BLOCK_NAMES = [
    (r"\.in_layers\.0\.", r".norm1."),
    (r"\.in_layers\.2\.", r".conv1."),
    (r"\.emb_layers\.1\.", r".time_proj."),
    (r"\.out_layers\.0\.", r".norm2."),
    (r"\.out_layers\.3\.", r".conv2."),
    (r"\.skip_connection\.", r".shortcut."),
]
VAE_NAMES = [
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
NOT_OF_THE_NETWORK = re.compile(
    r"(first_stage_model|cond_stage_model|alignment_model|torch_nn_module|\w*ema|loss|logger)\b.*|logvar|betas"
    r"|\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|log_one_minus_\w+|sqrt_\w+"
)
AVERAGED_WEIGHTS = re.compile(r"\w*ema\..*")


def select(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The tensors of one network, without their prefix.

    Args:
        part: "vae", "unet" or "alignment".

    Raises:
        ValueError: a tensor that is neither of the network nor known to lie beside it.
    """
    for prefix in PREFIXES[part]:
        selected = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if selected:
            others = [n for n in tensors if not n.startswith(prefix) and not NOT_OF_THE_NETWORK.fullmatch(n)]
            if others:
                raise ValueError(f"{part} checkpoint: unknown tensor {others[0]!r} beside {prefix}*.")
            return selected
    return {name: tensor for name, tensor in tensors.items() if not AVERAGED_WEIGHTS.fullmatch(name)}


def rename(name: str, part: str) -> str:
    """The name here of a tensor of the original; itself if no rule knows it."""
    for rules in [VAE_NAMES] if part == "vae" else [MODULE_NAMES, RESIDUAL_BLOCK_NAMES + LAYER_NAMES]:
        name = rename_first(name, rules) or name
    return name


def convert_state_dict(tensors: dict[str, torch.Tensor], model: torch.nn.Module, part: str) -> Conversion:
    """The original's tensors under our names and in our shapes.

    Raises:
        ValueError: a tensor is unknown, missing, or of another shape than the configuration says.
    """

    def renamed_tensors() -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, tensor in tensors.items():
            target = rename(name, part)
            if target == "pool.position_embedding":
                tensor = tensor.T.contiguous()  # (channels, tokens) there
            elif target.startswith("pool.") and tensor.ndim == 3:
                tensor = tensor.flatten(1)  # a convolution of width 1 there
            yield name, target, tensor

    drop_rules = [POSITION_INDEX, unused_update_of_global_vectors(r"^up\.levels\.0\.\d+")]
    return match_tensors(renamed_tensors(), model.state_dict(), drop_rules, f"{part} checkpoint")


# ---------------------------------------------------------------------------------------------------------------------
# The conversion
# ---------------------------------------------------------------------------------------------------------------------

PRESETS = ("sevir-lr",)


def read_config(path: Path, aligned: bool) -> dict[str, Any]:
    """The parts of a pipeline that a file of the original describes, with random weights.

    Args:
        aligned: whether the alignment network is one of them.

    Raises:
        ValueError: the file lacks a block, or has an option that has no place here.
    """
    blocks = read_model_block(path)
    for name in ("vae", "latent_model", "diffusion", *(["align"] if aligned else [])):
        if not isinstance(blocks.get(name), dict):
            raise ValueError(f"config_path: {path} has no block `model: {name}:`.")
    vae = AutoencoderKL(**convert_vae(blocks["vae"]), scaling_factor=1.0)
    unet = EarthformerUNetModel(**convert_network(blocks["latent_model"], "latent_model"))
    if vae.config.latent_channels != unet.config.in_channels:
        refuse("vae.latent_channels", vae.config.latent_channels, f"the denoiser takes {unet.config.in_channels}")
    parts = {"vae": vae, "unet": unet, "scheduler": DDPMScheduler(**convert_scheduler(blocks["diffusion"]))}
    if aligned:
        align = blocks["align"]
        given = align.get("alignment_type"), align.get("model_type", "cuboid")
        if given != ("avg_x", "cuboid"):
            refuse("align.alignment_type / model_type", given, "only 'avg_x' and 'cuboid'")
        if not isinstance(align.get("model_args"), dict):
            refuse("align.model_args", align.get("model_args"), "it must be a block of options")
        parts["alignment"] = EarthformerAlignmentModel(**convert_network(align["model_args"], "align"))
    return parts


def preset_parts(name: str, aligned: bool) -> dict[str, Any]:
    """The same of a published setting, and its feature extractor."""
    blocks = read_recipe(f"prediff_{name}")
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
    conversions = [(path, load_weights(parts[part], path, part)) for part, path in paths.items()]
    pipeline, section = PreDiffPipeline(**parts), conversion_section(command, conversions)
    card = released_card(f"prediff-{preset}", section) if preset else None
    card = card or converted_card(Path(output_dir).resolve().name, pipeline, None, {"Conversion": section})
    return compare_and_export(pipeline, outputs, output_dir, card, overwrite=overwrite)


def load_weights(model: torch.nn.Module, path: Path, part: str) -> Conversion:
    """Give a network its weights from a checkpoint; returns what became of its tensors.

    Raises:
        ValueError: a tensor has no place here.
    """
    tensors = load_tensors(path)
    selected = select(tensors, part)
    conversion = convert_state_dict(selected, model, part)
    model.load_state_dict(conversion.tensors)
    model.eval()
    of_the_network = {prefix + name for prefix in ("", *PREFIXES[part]) for name in selected}
    beside = {name: "not of this network" for name in tensors if name not in of_the_network}
    return conversion._replace(dropped=conversion.dropped | beside)


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
    parser.add_argument("--vae_checkpoint_path", type=Path, required=True, help="the autoencoder (.pt, .ckpt)")
    parser.add_argument("--unet_checkpoint_path", type=Path, required=True, help="the denoiser")
    parser.add_argument("--alignment_checkpoint_path", type=Path, help="without it, the pipeline is not guided")
    add_shared_arguments(parser, PRESETS)

    def convert_from(arguments: argparse.Namespace) -> str:
        convert(**vars(arguments), command=command_for_card(Path(__file__).name, arguments))
        return f"{arguments.output_dir}: reloaded and compared."

    return run(parser, convert_from)


__all__ = [
    "MODULE_NAMES", "PRESETS", "RESIDUAL_BLOCK_NAMES", "VAE_NAMES", "convert", "convert_state_dict", "load_weights",
    "outputs", "preset_parts", "read_config", "rename", "select",
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
