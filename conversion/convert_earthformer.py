"""Convert a checkpoint of the original Earthformer (amazon-science/earth-forecasting-transformer) to this package.

    python conversion/convert_earthformer.py --checkpoint_path X.pt --config_path X.yaml --output_dir DIR
    python conversion/convert_earthformer.py --checkpoint_path X.pt --preset sevir --output_dir DIR

X.pt is a state dict, or has one as `state_dict`. Only tensors are read, and a file that asks for anything unusual is
refused before it is loaded. X.yaml has a `model:` block with the original's options; options it leaves out take the
defaults of the original constructor. A preset is a recipe in `examples/configs`; it also knows the range of the data,
and brings the model card of a released setting. Every option (see `earthformer_options.py`) and every tensor is
translated, dropped for a stated reason, or refused. The folder's card says which tensor became which.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

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
    released_card,
    rename_first,
    run,
    unused_update_of_global_vectors,
)
from earthformer_options import convert_config

from earthformer_hf import EarthformerConfig, EarthformerFeatureExtractor, EarthformerForPrediction
from earthformer_hf.sharing.cards import converted_card


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: regular expression -> name. Where a module lies in the network comes first, then what is inside it.
# ---------------------------------------------------------------------------------------------------------------------

MODULE_NAMES = [
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

# With covariates the decoder starts from those of the forecast, and the original still has tensors for the other way.
UNUSED_START = (
    r"^model\.decoder\.(position_embedding|start_proj)\.",
    "another start of the decoder, which never received a gradient",
)
# What Lightning, DistributedDataParallel and torch.compile put before every name.
WRAPPER_PREFIXES = re.compile(r"((module|torch_nn_module|_orig_mod)\.)*")


def rename(name: str) -> str:
    """The name here of a tensor of the original.

    Raises:
        ValueError: no rule knows the name.
    """
    renamed = rename_first(name, MODULE_NAMES)
    if renamed is None:
        raise ValueError(f"checkpoint: no rule for tensor {name!r}; is this a checkpoint of Earthformer?")
    return rename_first(renamed, LAYER_NAMES) or renamed


def convert_state_dict(original: dict[str, torch.Tensor], model: EarthformerForPrediction) -> Conversion:
    """The original's tensors under our names.

    Raises:
        ValueError: a tensor is unknown, missing, used twice, not finite, or of another shape or type than the
            configuration says.
    """
    config = model.config
    last_block = rf"^model\.encoder\.levels\.{len(config.hidden_sizes) - 1}\.{config.encoder_depths[-1] - 1}"
    drop_rules = [POSITION_INDEX, unused_update_of_global_vectors(last_block), UNUSED_START]
    prefixes = Counter(WRAPPER_PREFIXES.match(name)[0] for name in original)
    if len(prefixes) > 1:
        names = [f"{prefix + '*'!r} ({count} tensors)" for prefix, count in prefixes.items()]
        raise ValueError(f"checkpoint: it holds more than one network: {', '.join(names)}.")
    prefix = next(iter(prefixes), "")
    renamed_tensors = ((name, rename(name.removeprefix(prefix)), tensor) for name, tensor in original.items())
    return match_tensors(renamed_tensors, model.state_dict(), drop_rules)


# ---------------------------------------------------------------------------------------------------------------------
# The conversion
# ---------------------------------------------------------------------------------------------------------------------

PRESETS = (
    "sevir", "sevir-lr", "icar-enso", "earthnet2021", "nbody-mnist", "moving-mnist",
    "sevir-paper", "sevir-paper-noglobal", "icar-enso-paper",
)  # fmt: skip


def read_config(path: Path) -> EarthformerConfig:
    """The configuration that a file of the original describes.

    Raises:
        ValueError: the file has no `model:` block, or `convert_config` refuses it.
    """
    return convert_config(read_model_block(path))


def preset_config(name: str) -> EarthformerConfig:
    """The configuration of a published setting."""
    return EarthformerConfig(**read_recipe(f"earthformer_{name}")["model"])


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
    section = conversion_section(command, [(checkpoint_path, conversion)])
    extractor = card = None
    if preset is not None:
        extractor = EarthformerFeatureExtractor(**read_recipe(f"earthformer_{preset}")["feature_extractor"])
        card = released_card(f"earthformer-{preset}", section)
    card = card or converted_card(Path(output_dir).resolve().name, model, extractor, {"Conversion": section})
    return compare_and_export(model, outputs, output_dir, card, extractor, overwrite)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="checkpoint of the original (.pt, .ckpt)")
    add_shared_arguments(parser, PRESETS)

    def convert_from(arguments: argparse.Namespace) -> str:
        config = preset_config(arguments.preset) if arguments.preset else read_config(arguments.config_path)
        command = command_for_card(Path(__file__).name, arguments)
        model = convert(
            arguments.checkpoint_path, config, arguments.output_dir, command, arguments.overwrite, arguments.preset
        )
        return f"{arguments.output_dir}: {model.num_parameters():,} parameters, reloaded and compared."

    return run(parser, convert_from)


__all__ = [
    "MODULE_NAMES", "PRESETS", "convert", "convert_state_dict", "outputs", "preset_config", "read_config", "rename",
]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
