"""The command that converts checkpoints of the original PreDiff, and what it refuses."""

import hashlib
import subprocess
import sys

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler
from tiny import ROOT

from earthformer_hf import (
    EarthformerAlignmentModel,
    EarthformerFeatureExtractor,
    EarthformerUNetModel,
    PreDiffPipeline,
    sharing,
)


sys.path.insert(0, str(ROOT / "conversion"))

import convert_prediff as convert  # noqa: E402
import prediff_options  # noqa: E402
from common import Alias  # noqa: E402


LATENT = {
    "input_shape": [3, 6, 8, 4], "target_shape": [2, 6, 8, 4], "base_units": 16, "depth": [1, 1], "num_heads": 4,
    "attn_drop": 0.1, "proj_drop": 0.1, "ffn_drop": 0.1, "padding_type": "zeros", "pos_embed_type": "t+h+w",
    "self_pattern": "axial", "unet_res_connect": True, "use_dec_cross_global": False, "num_global_vectors": 0,
}  # fmt: skip
ALIGN = {
    "input_shape": [2, 6, 8, 4], "base_units": 16, "depth": [1, 1], "block_attn_patterns": "axial", "num_heads": 4,
    "attn_drop": 0.1, "proj_drop": 0.1, "ffn_drop": 0.1, "padding_type": "zeros", "out_channels": 1, "out_len": 2,
}  # fmt: skip
AUTOENCODER = {
    "in_channels": 1, "out_channels": 1, "data_channels": 1, "block_out_channels": [8, 16], "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4,
    "layers_per_block": 1, "act_fn": "silu", "pretrained_ckpt_path": "vae.pt",
}  # fmt: skip
DOCUMENT = {
    "optim": {"lr": 1},
    "model": {
        "diffusion": {"beta_schedule": "linear", "linear_start": "1e-4", "linear_end": "2e-2", "use_ema": True},
        "align": {"alignment_type": "avg_x", "guide_scale": 50.0, "model_type": "cuboid", "model_args": ALIGN},
        "latent_model": LATENT,
        "vae": AUTOENCODER,
    },
}


def original_name(name, part):
    """The inverse of `rename`, for names that occur in the tiny networks."""
    plain = {"out_proj": "final_proj"} if part == "unet" else {}
    rules = convert.VAE_NAMES if part == "vae" else convert.MODULE_NAMES + convert.RESIDUAL_BLOCK_NAMES
    rules = [(a, b) for a, b in rules if "pool" not in b and "norm_out" not in b]
    pool = {"norm_out.": "out.0.", "pool.position_embedding": "out.2.positional_embedding"}
    pool |= {"pool.qkv.": "out.2.qkv_proj.", "pool.out_proj.": "out.2.c_proj."}
    layers = {
        ".attentions.": ".attn_l.", ".feed_forwards.": ".ffn_l.", ".up.": ".ffn_1.", ".down.": ".ffn_2.",
        ".relative_position_bias": ".relative_position_bias_table", ".out_proj.": ".proj.", ".time.": ".T_embed.",
        ".height.": ".H_embed.", ".width.": ".W_embed.",
    }  # fmt: skip
    if part != "vae":
        for ours, theirs in pool.items():
            if name.startswith(ours):
                return name.replace(ours, theirs)
        if ".feed_forwards." in name:
            name = name.replace(".norm.", ".layer_norm.")
    for ours, theirs in plain.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs)
    if part != "vae":
        for ours, theirs in layers.items():
            name = name.replace(ours, theirs) if not name.startswith("down.t") else name
    for pattern, ours in rules:
        theirs = pattern.lstrip("^").rstrip("$").replace("\\", "")
        if name.startswith(ours) if pattern.startswith("^") else ours in name:
            name = name.replace(ours, theirs, 1)
    return name


@pytest.fixture
def originals(tmp_path):
    """Three checkpoints in the original's names, one of each kind of file, and the networks they came from."""
    torch.manual_seed(1)
    networks = {
        "vae": AutoencoderKL(**convert.convert_vae(AUTOENCODER), scaling_factor=1.0),
        "unet": EarthformerUNetModel(**convert.convert_network(LATENT, "latent_model")),
        "alignment": EarthformerAlignmentModel(**convert.convert_network(ALIGN, "align")),
    }
    tensors = {}
    for name, network in networks.items():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        tensors[name] = {original_name(key, name): value for key, value in network.state_dict().items()}
    place = tensors["alignment"]["out.2.positional_embedding"]
    tensors["alignment"]["out.2.positional_embedding"] = place.T.contiguous()
    for key in ("out.2.qkv_proj.weight", "out.2.c_proj.weight"):
        tensors["alignment"][key] = tensors["alignment"][key][:, :, None]
    prefixed = {"torch_nn_module." + key: value for key, value in tensors["unet"].items()}
    prefixed |= {"first_stage_model." + key: value for key, value in tensors["vae"].items()}
    prefixed |= {"cond_stage_model." + key: value for key, value in tensors["vae"].items()}
    averaged = {"model_ema." + key.replace(".", ""): value for key, value in tensors["unet"].items()}
    beside = {"model_ema.decay": torch.tensor(0.9), "logvar": torch.zeros(1000), "sqrt_alphas_cumprod": torch.zeros(9)}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(DOCUMENT))
    torch.save(tensors["vae"], tmp_path / "vae.pt")
    torch.save({"state_dict": prefixed | averaged | beside, "epoch": 3}, tmp_path / "unet.pt")
    prefixed = {"torch_nn_module." + key: value for key, value in tensors["alignment"].items()}
    torch.save({"state_dict": prefixed | beside}, tmp_path / "alignment.pt")
    return tmp_path, networks


def command(folder):
    options = [
        option
        for name in ("vae", "unet", "alignment")
        for option in (f"--{name}_checkpoint_path", str(folder / f"{name}.pt"))
    ]
    options += ["--config_path", str(folder / "x.yaml"), "--output_dir", str(folder / "out")]
    script = str(ROOT / "conversion/convert_prediff.py")
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True)


def test_the_command_makes_a_pipeline(originals):
    folder, networks = originals
    result = command(folder)
    assert result.returncode == 0, result.stderr[-1500:]
    assert "reloaded and compared" in result.stdout
    pipeline = PreDiffPipeline.from_pretrained(folder / "out")
    for name, network in networks.items():
        converted = getattr(pipeline, name).state_dict()
        assert all(torch.equal(converted[key], value) for key, value in network.state_dict().items())
    assert pipeline.vae.config.scaling_factor == 1.0 and not pipeline.unet.config.mask_padding
    assert type(pipeline.scheduler) is DDPMScheduler and pipeline.scheduler.config.beta_schedule == "scaled_linear"
    card = (folder / "out/README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "diffusers" and metadata["license"] == "other"
    assert "pipeline_tag" not in metadata  # as in the cards of the released pipelines
    for name in networks:
        assert hashlib.sha256((folder / f"{name}.pt").read_bytes()).hexdigest() in card
    assert "| `logvar` | dropped: not of this network |" in card and str(folder) not in card
    assert "as the original was trained on" in card and pipeline.feature_extractor is None
    assert sharing.check(folder / "out") == []
    sharing.export(pipeline, folder / "out", card=folder / "out/README.md")  # the same bytes: nothing to replace
    assert {"pipeline_prediff.py", "guidance.py"} < {path.name for path in (folder / "out").iterdir()}


def test_overwriting_leaves_nothing_of_before(originals):
    folder, _ = originals
    files = (folder / "vae.pt", folder / "unet.pt", folder / "out")
    convert.convert(*files, config_path=folder / "x.yaml")
    assert not (folder / "out/alignment").exists()  # which no file was given for
    first = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    (folder / "out/unet/diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"of an earlier conversion")
    with pytest.raises(ValueError, match="holds something else"):
        convert.convert(*files, config_path=folder / "x.yaml")
    convert.convert(*files, config_path=folder / "x.yaml", overwrite=True)
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()} == first


def test_the_preset_is_the_released_setting():
    with torch.device("meta"):
        parts = convert.preset_parts("sevir-lr", aligned=True)
        assert "alignment" not in convert.preset_parts("sevir-lr", aligned=False)
    folder = ROOT / "model_cards/prediff-sevir-lr"
    for name in ("vae", "unet", "alignment", "scheduler"):
        stored, built = type(parts[name]).load_config(folder / name), dict(parts[name].config)
        assert {key: list(x) if isinstance(x := built[key], tuple) else x for key in stored if key[0] != "_"} == {
            key: value for key, value in stored.items() if key[0] != "_"
        }
    stored = EarthformerFeatureExtractor.from_pretrained(folder / "feature_extractor")
    assert parts["feature_extractor"].to_dict() == stored.to_dict()
    card = convert.released_card("prediff-sevir-lr", "as follows")
    assert card.startswith((folder / "README.md").read_text()) and "it was not checked" in card


def test_a_folder_that_holds_something_is_left_alone(originals):
    folder, _ = originals
    (folder / "out").mkdir()
    (folder / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else.*--overwrite"):
        convert.convert(folder / "vae.pt", folder / "unet.pt", folder / "out", config_path=folder / "x.yaml")
    assert [path.name for path in (folder / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("block", "change", "named"),
    [
        ("latent_model", {"gated_ffn": True}, "latent_model.gated_ffn"),
        ("latent_model", {"frobnicate": 1}, "latent_model.frobnicate"),
        ("latent_model", {"self_pattern": None}, "block_attn_patterns"),
        ("latent_model", {"target_shape": [2, 6, 6, 4]}, "target_shape"),
        ("latent_model", {"attn_drop": 0.3}, "attn_drop"),
        ("latent_model", {"padding_type": "nearest"}, "padding_type"),
        ("latent_model", {"self_pattern": "foo"}, "self_pattern.*foo"),
        ("latent_model", {"self_pattern": 3}, "self_pattern.*3"),
        ("latent_model", {"input_shape": 3}, "latent_model.input_shape=3"),
        ("latent_model", {"depth": 1}, "latent_model.depth=1"),
        ("latent_model", {"attn_drop": [1]}, "latent_model.attn_drop"),
        ("latent_model", {"attn_drop": None}, "latent_model.attn_drop"),
        ("latent_model", {"base_units": "a"}, "latent_model.base_units"),
        ("latent_model", {"num_global_vectors": "a"}, "latent_model.num_global_vectors"),
        ("vae", {"block_out_channels": 3}, "vae.block_out_channels"),
        ("align", {"pool": "adaptive"}, "align.pool"),
        ("align", {"out_len": 1}, "align.out_len"),
        ("align", {"num_global_vectors": 2}, "align.num_global_vectors"),
        ("diffusion", {"beta_schedule": "sqrt"}, "beta_schedule"),
        ("diffusion", {"v_posterior": 0.3}, "v_posterior"),
        ("diffusion", {"clip_denoised": True}, "clip_denoised"),
        ("diffusion", {"beta_schedul": "cosine"}, "beta_schedul"),
        ("vae", {"attention": 1}, "vae.attention"),
    ],
)
def test_unsupported_options_are_refused(block, change, named):
    options = {"latent_model": LATENT, "align": ALIGN, "diffusion": {}, "vae": AUTOENCODER}[block] | change
    functions = {"diffusion": convert.convert_scheduler, "vae": convert.convert_vae}
    with pytest.raises(ValueError, match=named):
        functions[block](options) if block in functions else convert.convert_network(options, block)


# What changes training or how weights start, or is read where an option has a value that is refused.
NO_EFFECT = {
    "checkpoint_level", "attn_linear_init_mode", "attn_proj_linear_init_mode", "ffn_linear_init_mode",
    "ffn2_linear_init_mode", "conv_init_mode", "down_linear_init_mode", "up_linear_init_mode",
    "down_up_linear_init_mode", "global_proj_linear_init_mode", "norm_init_mode", "block_cuboid_size",
    "block_cuboid_strategy", "block_cuboid_shift_size", "use_dec_self_global", "use_dec_cross_global",
    "dec_self_update_global",
}  # fmt: skip
GLOBAL_VECTORS = {"use_global_vector_ffn", "use_global_self_attn", "separate_global_qkv", "global_dim_ratio"}


@pytest.mark.parametrize(
    ("block", "options", "rules", "no_effect"),
    [
        ("latent_model", LATENT, prediff_options.UNET_OPTIONS, NO_EFFECT),
        ("align", ALIGN, prediff_options.ALIGNMENT_OPTIONS, NO_EFFECT | GLOBAL_VECTORS),
    ],
)
def test_every_option_without_effect_is_known_and_every_other_is_checked(block, options, rules, no_effect):
    options = {rule.option if isinstance(rule := rules[key], Alias) else key: v for key, v in options.items()}
    before = convert.convert_network(options, block)
    for option, rule in rules.items():
        if option in no_effect:
            assert convert.convert_network(options | {option: {"a": 1}}, block) == before
        elif not isinstance(rule, Alias):
            with pytest.raises(ValueError, match=f"^{block}.{option}="):
                convert.convert_network(options | {option: {"a": 1}}, block)


@pytest.mark.parametrize("blocks", [{"align": 5}, {"align": {"alignment_type": "avg_x", "model_args": 5}}])
def test_a_block_that_is_none_is_refused(tmp_path, blocks):
    document = {"model": DOCUMENT["model"] | blocks}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match="align"):
        convert.read_config(tmp_path / "x.yaml", aligned=True)


def test_a_checkpoint_of_another_model_is_refused(originals):
    folder, _ = originals
    torch.save({"something.weight": torch.ones(1)}, folder / "unet.pt")
    with pytest.raises(ValueError, match="something.weight"):
        convert.convert(folder / "vae.pt", folder / "unet.pt", folder / "out", config_path=folder / "x.yaml")
    assert not (folder / "out").exists()
