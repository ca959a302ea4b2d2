"""Parity with outputs recorded from the original on random weights, and what conversion refuses."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from test_recipes import PUBLISHED
from tiny import GOLDENS, ROOT

from earthformer_hf import EarthformerFeatureExtractor, EarthformerForPrediction, sharing
from earthformer_hf.cuboid import CrossCuboid, CuboidCrossAttention, CuboidLayerConfig
from earthformer_hf.sharing.cards import converted_card


sys.path.insert(0, str(ROOT / "conversion"))
import convert_earthformer as convert  # noqa: E402
from common import LEFT_OUT, Alias, read_recipe  # noqa: E402
from earthformer_options import OPTIONS  # noqa: E402


FIXTURES = ROOT / "tests/fixtures/parity"
SMALL = ["ef_cross_ntemporal", "ef_enso", "ef_spatial_lg", "ef_swin_zeros", "efaux_earthnet"]
# Everything the configuration covers. Left out, with the reason that conversion gives: see CONTRIBUTING.md.
COVERED = SMALL + [
    "ef_cross_2x2_lg", "ef_cross_4x4_heter", "ef_divided_st", "ef_enso_v2", "ef_nbody", "ef_nbody_v2",
    "ef_sevir_global", "ef_sevir_noglobal", "ef_sevirlr_noglobal_v2", "ef_swin_ignore", "ef_swin_ignore_v2",
]  # fmt: skip
REFUSED = {
    "ef_cross_lastn_global": "dec_cross_last_n_frames",
    "ef_default_cuboids": "use_dec_self_global",
    "ef_enso_gn32": "dec_use_first_self_attn",
    "ef_full": "dec_use_first_self_attn",
    "ef_mix_gated": "enc_use_inter_ffn",
    "ef_mix_global2": "dec_hierarchical_pos_embed",
    "ef_mix_norel_rms": "norm_layer",
    "ef_mix_scale_alpha": "z_init_method",
    "ef_odd_units": "cross_self_pattern",
    "ef_space_dilate": "enc_use_inter_ffn",
    "ef_swin_nearest": "padding_type",
    "efaux_axial_up": "unet_dec_cross_mode",
    "efaux_conv_v2": "unet_dec_cross_mode",
    "efaux_down": "unet_dec_cross_mode",
    "efaux_globalindex": "unet_dec_cross_mode",
}


def recorded(folder, case):
    """Metadata's configuration and the tensors of a recorded case, by group."""
    with safe_open(folder / f"{case}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        groups: dict[str, dict] = {}
        for key in file.keys():
            group, name = key.split("/", 1)
            groups.setdefault(group, {})[name] = file.get_tensor(key)
    return config, groups


AT_KINK = 2e-6


def relative(value, expected):
    return ((value - expected).abs().max() / expected.abs().max()).item()


def check_model(folder, case, implementation):
    options, groups = recorded(folder, case)
    config = convert.convert_config(options)
    config._attn_implementation = implementation
    model = EarthformerForPrediction(config).eval()
    model.load_state_dict(convert.convert_state_dict(groups["state_dict"], model).tensors)
    names = {"x": "past_values", "aux_enc": "past_covariates", "aux_dec": "future_covariates"}
    parameters = dict(model.named_parameters())

    def largest_errors(side=0.0):
        """Of the output and of the gradients; units at the kink of a leaky ReLU are put on one side of it."""
        handles = [
            module.register_forward_pre_hook(lambda _, args: (args[0] + side * (args[0].detach().abs() < AT_KINK),))
            for module in model.modules()
            if isinstance(module, torch.nn.LeakyReLU) and side
        ]
        model.zero_grad()
        inputs = {names[name]: tensor.clone().requires_grad_() for name, tensor in groups["input"].items()}
        predictions = model(**inputs).predictions
        predictions.square().mean().backward()
        for handle in handles:
            handle.remove()
        errors = [relative(inputs[names[name]].grad, gradient) for name, gradient in groups["grad_input"].items()]
        errors += [relative(parameters[convert.rename(n)].grad, gradient) for n, gradient in groups["grad"].items()]
        return relative(predictions, groups["output"]["out"]), max(errors)

    # The gradient of a unit that is 0 up to rounding has two values, and rounding differs between processors.
    sides = (-2 * AT_KINK, 2 * AT_KINK) if case == "ef_swin_ignore" else (0.0,)
    errors = [largest_errors(side) for side in sides]
    assert all(output < 5e-5 for output, _ in errors)
    assert any(gradient < 5e-4 for _, gradient in errors), errors


def check_cross_layer(folder, implementation):
    options, groups = recorded(folder, "layer_cross_shift_pad")
    cuboid = CrossCuboid(options["cuboid_hw"], shift=options["shift_hw"], cuboids_along_time=options["n_temporal"])
    config = CuboidLayerConfig(options["num_heads"])
    layer = CuboidCrossAttention(config, options["dim"], cuboid, options["max_temporal_relative"])
    prefix = "decoder.cross_blocks.0.0.attn_l.0."
    names = {name: convert.rename(prefix + name) for name in groups["state_dict"]}
    start = len("model.decoder.cross_blocks.0.0.attentions.0.")
    names = {name: target[start:] for name, target in names.items() if not target.endswith("position_index")}
    layer.load_state_dict({target: groups["state_dict"][name] for name, target in names.items()})
    inputs = {name: tensor.requires_grad_() for name, tensor in groups["input"].items()}
    out, _ = layer(inputs["x"], inputs["mem"], implementation)
    assert relative(out, groups["output"]["out"]) < 5e-5
    out.square().mean().backward()
    for name, gradient in groups["grad_input"].items():
        assert relative(inputs[name].grad, gradient) < 5e-4
    for name, gradient in groups["grad"].items():
        assert relative(dict(layer.named_parameters())[names[name]].grad, gradient) < 5e-4


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", SMALL)
def test_parity(case, implementation):
    check_model(FIXTURES, case, implementation)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_parity_of_a_cross_attention_layer(implementation):
    check_cross_layer(FIXTURES, implementation)


@pytest.mark.slow
@pytest.mark.skipif(not GOLDENS.exists(), reason="the recorded outputs are not here: set EARTHFORMER_HF_GOLDENS")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", COVERED)
def test_full_parity(case, implementation):
    check_model(GOLDENS, case, implementation)


@pytest.mark.slow
@pytest.mark.skipif(not GOLDENS.exists(), reason="the recorded outputs are not here: set EARTHFORMER_HF_GOLDENS")
def test_every_recorded_case_is_covered_or_refused_by_name():
    known_oddity = {"ef_swin_ignore_global"}  # its global-to-local mask is not in cuboid order
    cases = {path.stem for kind in ("ef", "efaux") for path in GOLDENS.glob(f"{kind}_*.safetensors")}
    assert cases == set(COVERED) | set(REFUSED) | known_oddity
    layers = {path.stem for kind in ("self", "cross") for path in GOLDENS.glob(f"layer_{kind}_*.safetensors")}
    assert layers == {"layer_cross_shift_pad"} | {
        "layer_cross_global",  # global vectors in cross-attention
        "layer_self_dilated_pad",  # qkv_bias
        "layer_self_qkscale_bias",  # qk_scale, qkv_bias
        "layer_self_shift_pad_global",  # its global-to-local mask is not in cuboid order
        "layer_self_shrunk_cuboid",  # its relative offsets are wrong
    }
    for case, option in REFUSED.items():
        with pytest.raises(ValueError, match=option):
            convert.convert_config(recorded(GOLDENS, case)[0])


ALIASES = {key: rule.option for key, rule in OPTIONS.items() if isinstance(rule, Alias)}


def default_of(option):
    """Of the original constructor; for an option with one supported value and no other default, that value."""
    rule = OPTIONS[option]
    return getattr(rule, "value", None) if rule.default is LEFT_OUT else rule.default


# -- the command ------------------------------------------------------------------------------------------------------


def run(tmp_path, options, tensors):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"model": options, "optim": {"lr": 1}}))
    torch.save(tensors, tmp_path / "x.pt")
    command = [
        sys.executable, str(ROOT / "conversion/convert_earthformer.py"), "--checkpoint_path", str(tmp_path / "x.pt"),
        "--config_path", str(tmp_path / "x.yaml"), "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_with_the_keys_of_official_files(tmp_path):
    options, groups = recorded(FIXTURES, "ef_enso")
    for theirs, name in ALIASES.items():
        options[theirs] = options.pop(name)[0]
    defaults = [key for key, value in options.items() if default_of(key) == value]
    for key in defaults:
        del options[key]
    result = run(tmp_path, options, groups["state_dict"])
    assert result.returncode == 0, result.stderr
    model = EarthformerForPrediction.from_pretrained(tmp_path / "out")
    assert relative(model(groups["input"]["x"]).predictions, groups["output"]["out"]) < 5e-5


@pytest.mark.slow
def test_the_command_refuses_and_names_the_option(tmp_path):
    options, groups = recorded(FIXTURES, "ef_enso")
    result = run(tmp_path, options | {"gated_ffn": True}, groups["state_dict"])
    assert result.returncode != 0
    assert "gated_ffn" in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_malicious_file_is_refused_and_named(tmp_path):
    options, groups = recorded(FIXTURES, "ef_enso")
    torch.save(groups["state_dict"] | {"x": eval}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="builtins.eval.*nothing was executed"):
        convert.convert(tmp_path / "x.pt", convert.convert_config(options), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


# -- files of every kind ----------------------------------------------------------------------------------------------

# The released settings, as far as they differ from the original constructor's defaults.
RELEASED = {
    "enc_depth": [1, 1], "dec_depth": [1, 1], "attn_drop": 0.1, "proj_drop": 0.1, "ffn_drop": 0.1,
    "self_pattern": "axial", "cross_self_pattern": "axial", "cross_pattern": "cross_1x1", "ffn_activation": "gelu",
    "padding_type": "zeros", "checkpoint_level": 0, "z_init_method": "zeros", "use_dec_self_global": False,
    "use_dec_cross_global": False, "use_global_vector_ffn": False,
}  # fmt: skip
GLOBAL = {"num_global_vectors": 8, "use_global_self_attn": True, "separate_global_qkv": True}
OFFICIAL = {
    "sevir": RELEASED | GLOBAL | {
        "input_shape": [13, 384, 384, 1], "target_shape": [12, 384, 384, 1], "pos_embed_type": "t+h+w",
        "initial_downsample_type": "stack_conv", "initial_downsample_stack_conv_num_layers": 3,
        "initial_downsample_stack_conv_dim_list": [16, 64, 128],
        "initial_downsample_stack_conv_downscale_list": [3, 2, 2],
        "initial_downsample_stack_conv_num_conv_list": [2, 2, 2],
    },
    "icar-enso": RELEASED | {
        "input_shape": [12, 24, 48, 1], "target_shape": [14, 24, 48, 1], "base_units": 64, "num_global_vectors": 0,
        "pos_embed_type": "t+h+w", "initial_downsample_scale": [1, 1, 2], "final_upsample_conv_layers": 1,
    },
    "earthnet2021": RELEASED | GLOBAL | {
        "input_shape": [10, 128, 128, 4], "target_shape": [20, 128, 128, 4], "base_units": 256, "data_channels": 4,
        "initial_downsample_type": "stack_conv", "initial_downsample_stack_conv_num_layers": 2,
        "initial_downsample_stack_conv_dim_list": [64, 256], "initial_downsample_stack_conv_downscale_list": [2, 2],
        "initial_downsample_stack_conv_num_conv_list": [2, 2], "auxiliary_channels": 7, "unet_dec_cross_mode": "both",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_presets_are_the_released_settings(name):
    official, preset = convert.convert_config(OFFICIAL[name]).to_dict(), convert.preset_config(name).to_dict()
    if preset["num_global_vectors"] == 0:
        del official["separate_global_qkv"], preset["separate_global_qkv"]
    assert official == preset


def test_there_is_a_preset_for_every_published_setting():
    assert {f"earthformer_{name.replace('-', '_')}" for name in convert.PRESETS} == set(PUBLISHED)


def renamed_back(case, model):
    """A model's tensors under the original's names, which those of a recorded case of the same layers are."""
    _, groups = recorded(FIXTURES, case)
    tensors = model.state_dict()
    return {name: tensors.get(convert.rename(name), tensor) for name, tensor in groups["state_dict"].items()}


def main(monkeypatch, capsys, *options):
    """The command, in this process: its exit status and what it prints."""
    monkeypatch.setattr(sys, "argv", ["convert_earthformer.py", *map(str, options)])
    status = convert.main()
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@pytest.mark.parametrize("kind", ["plain", "parallel", "lightning"])
def test_files_of_every_kind(tmp_path, monkeypatch, capsys, kind):
    options, groups = recorded(FIXTURES, "efaux_earthnet")
    tensors = groups["state_dict"]
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump({"model": options}))
    if kind == "plain":
        torch.save(tensors, tmp_path / "x.pt")
    else:
        prefix = {"parallel": "module.", "lightning": "module.torch_nn_module."}[kind]
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        torch.save({"state_dict": tensors, "epoch": 3, "hyper_parameters": {"oc": options}}, tmp_path / "x.pt")
    status, printed = main(
        monkeypatch, capsys, "--checkpoint_path", tmp_path / "x.pt", "--config_path", tmp_path / "cfg.yaml",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert status == 0 and "180,100 parameters" in printed
    model = EarthformerForPrediction.from_pretrained(tmp_path / "out")
    inputs = [groups["input"][name] for name in ("x", "aux_enc", "aux_dec")]
    predictions = model(inputs[0], past_covariates=inputs[1], future_covariates=inputs[2]).predictions
    assert relative(predictions, groups["output"]["out"]) < 5e-5

    card = (tmp_path / "out/README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["license"], metadata["library_name"]) == ("other", "transformers")
    assert "licence of the weights is not known" in card
    assert metadata["pipeline_tag"] == "time-series-forecasting"
    assert hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest() in card
    assert "--checkpoint_path x.pt --config_path cfg.yaml --output_dir out" in card and str(tmp_path) not in card
    rows = dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", card, re.MULTILINE))
    assert all(name in rows for name in tensors)  # each tensor once
    assert sum(row.startswith("dropped") for name, row in rows.items() if name in tensors) == 24
    assert "16 were dropped: an index" in card and "6 were dropped: updates global" in card
    assert "2 were dropped: another start" in card and "| `past_covariates` | (B, 3, 16, 24, 7)" in card
    assert "The range of the data is the original's" in card and sharing.check(tmp_path / "out") == []
    assert not (tmp_path / "out/preprocessor_config.json").exists()


def test_a_preset_instead_of_a_file(tmp_path, monkeypatch, capsys):
    model = EarthformerForPrediction(convert.preset_config("icar-enso")).eval()
    torch.save(renamed_back("ef_enso", model), tmp_path / "x.pt")
    options = ["--checkpoint_path", tmp_path / "x.pt", "--output_dir", tmp_path / "out"]
    status, printed = main(monkeypatch, capsys, *options, "--preset", "icar-enso")
    assert status == 0 and "1,394,325 parameters" in printed
    converted = EarthformerForPrediction.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(converted[name], tensor) for name, tensor in model.state_dict().items())

    # the range of the data and the released card come along, and how these weights were made
    extractor = EarthformerFeatureExtractor.from_pretrained(tmp_path / "out")
    assert extractor.encode([-16.549121856689453, 10.198975563049316])[0].tolist() == pytest.approx([0, 1], abs=1e-6)
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith((ROOT / "model_cards/earthformer-icar-enso/README.md").read_text())
    assert hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest() in card and "it was not checked" in card
    assert sharing.check(tmp_path / "out") == []
    _, again, extractor = sharing.load(tmp_path / "out")
    sharing.export(
        again, tmp_path / "out", extractor, tmp_path / "out/README.md"
    )  # the same bytes: nothing to replace

    status, printed = main(monkeypatch, capsys, *options[:2], "--output_dir", tmp_path / "b", "--preset", "sevir")
    assert status == 1 and "checkpoint: tensor 'dec_final_proj.weight' must have shape" in printed
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", convert.PRESETS)
def test_every_preset_knows_the_range_of_its_data(name):
    extractor = EarthformerFeatureExtractor(**read_recipe(f"earthformer_{name}")["feature_extractor"])
    archive = [-16.549121856689453, 10.198975563049316] if "enso" in name else extractor.valid_range
    assert extractor.encode(archive)[0].tolist() == pytest.approx([0, 1], abs=1e-6)
    with torch.device("meta"):
        text = converted_card("x", EarthformerForPrediction(convert.preset_config(name)), extractor, {})
    assert f"(raw - {extractor.offset}) x {extractor.scale}" in text and extractor.variable in text


@pytest.mark.slow
def test_a_converted_folder_loads_without_this_package(tmp_path):
    options, groups = recorded(FIXTURES, "ef_enso")
    assert run(tmp_path, options, groups["state_dict"]).returncode == 0
    torch.save(groups["input"]["x"], tmp_path / "input.pt")
    script = f"""
import sys
sys.modules["earthformer_hf"] = None  # any import of it fails
import torch
from transformers import AutoModelForTimeSeriesPrediction
model = AutoModelForTimeSeriesPrediction.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
inputs = torch.load({str(tmp_path / "input.pt")!r})
torch.save(model(inputs).predictions.detach(), {str(tmp_path / "output.pt")!r})
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert relative(torch.load(tmp_path / "output.pt"), groups["output"]["out"]) < 5e-5


def test_a_folder_that_holds_something_is_left_alone(tmp_path, monkeypatch, capsys):
    options, groups = recorded(FIXTURES, "ef_enso")
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump({"model": options}))
    torch.save(groups["state_dict"], tmp_path / "x.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("mine")
    command = ["--checkpoint_path", tmp_path / "x.pt", "--config_path", tmp_path / "cfg.yaml", "--output_dir"]
    status, printed = main(monkeypatch, capsys, *command, tmp_path / "out")
    assert status == 1 and "holds something else" in printed and "--overwrite" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    status, printed = main(monkeypatch, capsys, *command, tmp_path / "x.pt")
    assert status == 1 and "is a file" in printed
    status, printed = main(monkeypatch, capsys, *command, tmp_path / "out", "--overwrite")
    assert status == 1 and "config.json is of something else" in printed
    assert (tmp_path / "out/config.json").read_text() == "mine"
    (tmp_path / "out/config.json").write_text('{"model_type": "earthformer"}')
    (tmp_path / "out/model-00001-of-00002.safetensors").write_bytes(b"of an earlier conversion")
    status, _ = main(monkeypatch, capsys, *command, tmp_path / "out", "--overwrite")
    assert status == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    modules = (
        "advection",
        "configuration_earthformer",
        "cuboid",
        "calibration",
        "folding",
        "linear_forecast",
        "loading_earthformer",
        "modeling_earthformer",
        "stem_earthformer",
    )
    code = {f"{module}.py" for module in modules}
    assert set(first) == {"README.md", "config.json", "model.safetensors"} | code
    status, _ = main(monkeypatch, capsys, *command, tmp_path / "out")  # which holds exactly this already
    assert status == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    assert {path.name for path in tmp_path.iterdir()} == {"cfg.yaml", "x.pt", "out"}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_half_downloaded_file_is_refused(tmp_path, monkeypatch, capsys, legacy):
    _, groups = recorded(FIXTURES, "ef_enso")
    torch.save(groups["state_dict"], tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(content[: len(content) // 2])
    options = ["--checkpoint_path", tmp_path / "x.pt", "--preset", "icar-enso", "--output_dir", tmp_path / "out"]
    status, printed = main(monkeypatch, capsys, *options)
    assert status == 1 and "cut off" in printed and printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    status, printed = main(monkeypatch, capsys, "--checkpoint_path", tmp_path / "none.pt", *options[2:])
    assert status == 1 and "no such file" in printed


@pytest.mark.parametrize("content", [b"\x80", b"a: [1", b"optim: {lr: 1}", b"model: 3", b""])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "cfg.yaml").write_bytes(content)
    options = ["--checkpoint_path", tmp_path / "x.pt", "--config_path", tmp_path / "cfg.yaml"]
    status, printed = main(monkeypatch, capsys, *options, "--output_dir", tmp_path / "out")
    assert status == 1 and printed.startswith(f"error: config_path: {tmp_path / 'cfg.yaml'}")
    assert printed.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_folder(tmp_path):
    """The process may write files of at most 30 kB: the configuration fits, the weights do not."""
    (tmp_path / "temporary").mkdir()
    options, groups = recorded(FIXTURES, "ef_enso")
    torch.save(groups["state_dict"], tmp_path / "x.pt")
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump({"model": options}))
    script = f"""
import pathlib, resource, signal, sys
sys.path.insert(0, {str(ROOT / "conversion")!r})
import convert_earthformer as convert
folder = pathlib.Path({str(tmp_path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
paths = {{"checkpoint_path": "x.pt", "config_path": "cfg.yaml", "output_dir": "out"}}
sys.argv = ["convert", *(part for name, path in paths.items() for part in ("--" + name, str(folder / path)))]
sys.exit(convert.main())
"""
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith("error: ") and "too large" in last, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", "cfg.yaml", "temporary"}
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    "change, option",
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"enc_attn_patterns": "divided_st"}, "cross_self_pattern"),
        ({"enc_attn_patterns": "axiel", "dec_self_attn_patterns": "axiel"}, "self_pattern.*axiel"),
        ({"dec_cross_attn_patterns": "last_frame_dst"}, "cross_pattern.*last_frame_dst"),
        ({"padding_type": "nearest"}, "padding_type"),
        ({"ffn_drop": 0.3}, "proj_drop"),
        ({"downsample": 3}, "downsample"),
        ({"num_global_vectors": 4, "use_dec_self_global": True}, "use_dec_self_global"),
        ({"cross_last_n_frames": 2}, "cross_last_n_frames"),
        ({"initial_downsample_type": "resample"}, "initial_downsample_type"),
        ({"initial_downsample_scale": [2, 1, 1]}, "initial_downsample_scale"),
        ({"input_shape": [5, 8]}, "input_shape"),
        ({"target_shape": [7, 12, 12, 1]}, "target_shape"),
        ({"auxiliary_channels": 3}, "unet_dec_cross_mode"),
        ({"unet_dec_cross_mode": "both"}, "unet_dec_cross_mode"),
        ({"data_channels": 3}, "data_channels"),
        # of another kind than the option
        ({"input_shape": 5}, "input_shape=5"),
        ({"input_shape": 5, "data_channels": 1}, "input_shape"),
        ({"input_shape": ["a", 24, 48, 1]}, "input_shape"),
        ({"base_units": None}, "base_units=None"),
        ({"block_units": 3}, "block_units=3"),
        ({"scale_alpha": "a"}, "scale_alpha='a'"),
        ({"num_heads": True}, "num_heads=True"),
        ({"dec_depth": [1, "a"]}, "dec_depth"),
        ({"initial_downsample_scale": None}, "initial_downsample_scale=None"),
        ({"ffn_activation": [1]}, "ffn_activation"),
        ({"padding_type": {}}, "padding_type"),
        ({"enc_attn_patterns": 3}, "enc_attn_patterns=3"),
        ({"dec_self_attn_patterns": ["axial", 3]}, "dec_self_attn_patterns"),
    ],
)
def test_unsupported_options_are_refused(change, option):
    options, _ = recorded(FIXTURES, "ef_enso")
    with pytest.raises(ValueError, match=option):
        convert.convert_config(options | change)


CUBOIDS = {
    "enc_attn_patterns": None, "enc_cuboid_size": [[4, 4, 4]], "enc_cuboid_strategy": [["l", "l", "d"]],
    "enc_shift_size": [[0, 0, 0]], "dec_self_attn_patterns": None, "dec_self_cuboid_size": [[4, 4, 4]],
    "dec_self_cuboid_strategy": [["l", "l", "d"]], "dec_self_shift_size": [[0, 0, 0]],
}  # fmt: skip


def test_cuboids_may_be_given_once_or_per_level():
    options, _ = recorded(FIXTURES, "ef_enso")
    options |= CUBOIDS
    once = convert.convert_config(options).to_dict()
    levels = len(options["enc_depth"])
    per_level = {key: [value] * levels for key, value in CUBOIDS.items() if value is not None}
    assert convert.convert_config(options | per_level).to_dict() == once
    for change, option in (
        ({"enc_cuboid_strategy": [["x", "l", "l"]]}, r"enc_cuboid_strategy=\[\['x'"),
        ({"enc_cuboid_size": [4, 4, 4]}, "enc_cuboid_size"),
        ({"enc_shift_size": []}, "enc_shift_size"),
        ({"enc_cuboid_size": [[[4, 4, 4]]] * (levels + 1)}, "enc_cuboid_size.*levels"),
    ):
        with pytest.raises(ValueError, match=option):
            convert.convert_config(options | change)


def test_an_option_given_twice_is_refused():
    options, _ = recorded(FIXTURES, "ef_enso")
    with pytest.raises(ValueError, match="self_pattern"):
        convert.convert_config(options | {"self_pattern": "axial"})


# What changes training, but not what a trained model computes.
NO_EFFECT = {
    "checkpoint_level", "attn_linear_init_mode", "ffn_linear_init_mode", "conv_init_mode", "down_up_linear_init_mode",
    "norm_init_mode", "dec_self_update_global",
}  # fmt: skip
WITH_GLOBAL_VECTORS = {
    "use_dec_self_global", "use_dec_cross_global", "use_global_vector_ffn", "use_global_self_attn", "global_dim_ratio",
}  # fmt: skip
# Of ef_enso: it names its patterns, has one convolutional stem and no global vectors.
IRRELEVANT = {
    "enc_cuboid_size", "enc_cuboid_strategy", "enc_shift_size", "dec_self_cuboid_size", "dec_self_cuboid_strategy",
    "dec_self_shift_size", "dec_cross_cuboid_hw", "dec_cross_cuboid_strategy", "dec_cross_shift_hw",
    "dec_cross_n_temporal", "initial_downsample_stack_conv_num_layers", "initial_downsample_stack_conv_dim_list",
    "initial_downsample_stack_conv_downscale_list", "initial_downsample_stack_conv_num_conv_list",
    *WITH_GLOBAL_VECTORS,
}  # fmt: skip


@pytest.mark.parametrize("option", [option for option in OPTIONS if option not in ALIASES])
def test_every_option_is_used_or_refused(option):
    options, _ = recorded(FIXTURES, "ef_enso")
    before = convert.convert_config(options).to_dict()
    value = options.get(option, default_of(option))
    if isinstance(value, bool):
        changed = not value
    elif isinstance(value, (int, float)):
        changed = value * 2 or 2
    elif isinstance(value, str):
        changed = "t+hw" if option == "pos_embed_type" else "ignore" if option == "padding_type" else "relu"
    else:
        changed = ["relu"]
    try:
        after = convert.convert_config(options | {option: changed}).to_dict()
    except ValueError as reason:
        names = [option, *(key for key, name in ALIASES.items() if name == option)]
        names += WITH_GLOBAL_VECTORS if option == "num_global_vectors" else []
        assert any(name in str(reason) for name in names)
    else:
        assert after != before or option in NO_EFFECT | IRRELEVANT


def test_pattern_names_of_the_original():
    options, _ = recorded(FIXTURES, "ef_spatial_lg")
    assert convert.convert_config(options).self_attention_pattern == ["spatial_lg_4"] * 2


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.pop("z_proj.bias"), "missing.*start_proj.bias"),
        (lambda t: t.update({"z_proj.bias": torch.zeros(3)}), r"z_proj.bias.*\(32,\).*\(3,\)"),
        (lambda t: t.update({"z_proj.bias": torch.full((32,), float("nan"))}), "z_proj.bias.*not a number"),
        (lambda t: t.update({"z_proj.bias": torch.full((32,), float("inf"))}), "z_proj.bias.*infinite"),
        (lambda t: t.update({"z_proj.bias": torch.zeros(32, dtype=torch.int8)}), "z_proj.bias.*int8"),
        (lambda t: t.update({"lstm.weight": torch.zeros(3)}), "lstm.weight"),
        (lambda t: t.update({"encoder.blocks.0.0.attn_l.7.norm.bias": torch.zeros(16)}), "attn_l.7.norm.bias"),
        (lambda t: t.update({"module.z_proj.bias": torch.zeros(32)}), "more than one network.*module"),
        (lambda t: t.update({"initial_aux_encoder.conv_block.0.bias": torch.zeros(16)}), "initial_aux_encoder"),
    ],
)
def test_checkpoints_of_something_else_are_refused(spoil, message):
    options, groups = recorded(FIXTURES, "ef_enso")
    tensors = dict(groups["state_dict"])
    spoil(tensors)
    model = EarthformerForPrediction(convert.convert_config(options))
    with pytest.raises(ValueError, match=message):
        convert.convert_state_dict(tensors, model)
