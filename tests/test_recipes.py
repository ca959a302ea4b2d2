"""The released and paper settings: parameters exactly, multiply-adds to one per cent."""

import re
import sys
from importlib import import_module

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from tiny import ROOT, inputs_of
from torch.utils.flop_counter import FlopCounterMode

from earthformer_hf import (
    EarthformerAlignmentModel,
    EarthformerConfig,
    EarthformerForPrediction,
    EarthformerUNetModel,
    cuboid,
    stem_earthformer,
)
from earthformer_hf.data.events import SOURCES, builder_of, options_of
from earthformer_hf.evaluation.protocols import PROTOCOLS
from earthformer_hf.folding import plain_upsample_conv
from earthformer_hf.training import DataArguments, TrainingArguments, parse_recipe


# name -> parameters of the original, those of them that never receive a gradient, multiply-adds in units of 1e9
PUBLISHED = {
    "earthformer_sevir": (8_659_677, 459_008, 223.58),
    "earthformer_sevir_paper": (15_082_069, 65_792, 255.71),
    "earthformer_sevir_paper_noglobal": (13_075_029, 0, 255.20),
    "earthformer_sevir_lr": (1_505_069, 0, 13.92),
    "earthformer_icar_enso": (1_394_325, 0, 6.703),
    "earthformer_icar_enso_paper": (7_600_077, 16_512, 23.65),
    "earthformer_nbody_mnist": (6_702_109, 0, 33.33),
    "earthformer_moving_mnist": (6_702_109, 0, 33.33),
    "earthformer_earthnet2021": (60_618_380, 1_976_832, 903.6),
}


def recipe_config(name):
    return EarthformerConfig(**yaml.safe_load((ROOT / f"examples/configs/{name}.yaml").read_text())["model"])


@pytest.fixture
def unfolded(monkeypatch):
    """The networks as they were published, whose operations are counted."""
    for module in (cuboid, stem_earthformer):
        monkeypatch.setattr(module, "upsample_conv", plain_upsample_conv)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, unfolded):
    parameters, dead, multiply_adds = PUBLISHED[name]
    config = recipe_config(name)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = EarthformerForPrediction(config).eval()
        inputs = inputs_of(config, batch=1)
    assert sum(p.numel() for p in model.parameters()) + dead == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds * 1e9, rel=0.01)


def test_every_recipe_is_valid():
    names = {path.stem for path in (ROOT / "examples/configs").glob("earthformer_*.yaml")}
    assert set(PUBLISHED) < names
    for name in names:
        recipe_config(name)


def test_every_entry_of_every_recipe_is_known(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from train_alignment import AlignmentArguments
    from train_autoencoder import AutoencoderArguments
    from train_earthformer import ForecastArguments
    from train_unet import DenoiserArguments

    stages = {"autoencoder": AutoencoderArguments, "denoiser": DenoiserArguments, "alignment": AlignmentArguments}
    for path in (ROOT / "examples/configs").glob("*former_*.yaml"):
        monkeypatch.setattr(sys, "argv", ["train", "--recipe", str(path)])
        _, data, arguments = parse_recipe(data=DataArguments, training=ForecastArguments)
        assert data.source and arguments.max_steps > arguments.warmup_steps
    paths = [*(ROOT / "examples/configs").glob("prediff_*.yaml"), ROOT / "examples/configs/autoencoder_radar.yaml"]
    for path in paths:
        for stage, kind in stages.items():
            monkeypatch.setattr(sys, "argv", ["train", "--recipe", str(path)])
            _, data, arguments = parse_recipe(data=DataArguments, **{stage: kind})
            assert data.source and arguments.max_steps > arguments.warmup_steps


SCRIPTS = ("train_earthformer", "train_autoencoder", "train_unet", "train_alignment")


def call_script(monkeypatch, name, *options):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(str(option) for option in options)])
    import_module(name).main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_the_options_without_a_recipe(monkeypatch, capsys, name):
    with pytest.raises(SystemExit) as end:
        call_script(monkeypatch, name, "--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and all(option in shown for option in ("--recipe", "--learning_rate", "--eval_stride"))
    assert "The same command resumes" in shown


def refusal(monkeypatch, name, *options) -> str:
    """The one line in which a script ends."""
    with pytest.raises(SystemExit) as end:
        call_script(monkeypatch, name, *options)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, r"--recipe .* cannot be read: .*No such file"),
        ("data: {source: open-radar", "--recipe .* cannot be read: while parsing"),
        ("- 1", "must hold blocks such as `data:`, got list"),
        ("data: open-radar", "`data` must hold entries, got 'open-radar'"),
        ("data: {sorce: open-radar}", "unknown entry 'sorce' of `data`; did you mean 'source'"),
        ("training: {max_steps: many}", "`training`: .*'max_steps' expected int, got str"),
        ("training: {learning_rate: high}", "'learning_rate' expected float, got str"),
        ("training: {optimizer: sgd}", "'optimizer' expected one of .*'muon', 'adamw'.*sgd"),
        ("training: {batch_size: 0}", "`batch_size` must be at least 1, got 0"),
        ("training: {}", "must hold a block `model`"),
        ("model: {contxt_length: 13}", "`model` of the recipe: .*'contxt_length'.*'context_length'"),
        ("model: {num_attention_heads: 3}", "`model` of the recipe: .*`num_attention_heads`|`hidden_sizes`"),
    ],
)
def test_a_mistake_in_a_recipe_is_said_in_one_line(tmp_path, monkeypatch, text, expected):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    assert re.search(expected, refusal(monkeypatch, "train_earthformer", "--recipe", tmp_path / "recipe.yaml"))


def test_a_mistake_on_the_command_line_is_said_in_one_line(tmp_path, monkeypatch):
    recipe = "--recipe", ROOT / "examples/configs/earthformer_radar_tiny.yaml"
    assert "--recipe" in refusal(monkeypatch, "train_earthformer")
    assert "--max_step" in refusal(monkeypatch, "train_earthformer", *recipe, "--max_step", "3")
    assert "invalid int value: 'x'" in refusal(monkeypatch, "train_earthformer", *recipe, "--max_steps", "x")
    assert "'sgd'" in refusal(monkeypatch, "train_earthformer", *recipe, "--optimizer", "sgd")
    assert "'radar'" in refusal(monkeypatch, "train_earthformer", *recipe, "--source", "radar")
    assert str(tmp_path) in refusal(monkeypatch, "train_earthformer", *recipe, "--data_dir", tmp_path)
    recipe = "--recipe", ROOT / "examples/configs/prediff_radar_small.yaml"
    nothing = tmp_path / "nothing"
    assert str(tmp_path) in refusal(monkeypatch, "train_autoencoder", *recipe, "--data_dir", tmp_path)
    assert "laplace" in refusal(monkeypatch, "train_autoencoder", *recipe, "--learn_log_variance")
    assert str(nothing) in refusal(monkeypatch, "train_unet", *recipe, "--vae", nothing)
    assert str(nothing) in refusal(monkeypatch, "train_alignment", *recipe, "--pipeline", nothing)


def test_the_command_line_overrides_a_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("training: {learning_rate: 1e-3, ema_decay: null, weight_decay: 0}\nvae: {}")
    monkeypatch.setattr(sys, "argv", ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--weight_decay", "0.5"])
    recipe, data, arguments = parse_recipe(data=DataArguments, training=TrainingArguments)
    assert (arguments.learning_rate, arguments.ema_decay, arguments.weight_decay) == (1e-3, None, 0.5)
    assert data == DataArguments() and arguments.max_steps == TrainingArguments().max_steps and recipe["vae"] == {}


def test_every_recipe_trains_on_the_data_of_its_protocol():
    for path in (ROOT / "examples/configs").glob("*_*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        if "data" not in recipe:  # settings of accelerate
            continue
        data, extractor = recipe["data"], recipe["feature_extractor"]
        assert data["source"] in SOURCES, path.name
        options, known = data.get("options", {}), options_of(builder_of(data["source"]))
        assert options.keys() | data.get("train_options", {}).keys() <= known, path.name
        if "protocol" not in extractor:
            of_no_protocol = path.stem in ("earthformer_knmi_tiny", "autoencoder_radar")
            assert data["source"] in ("simulated-land", "folder") or of_no_protocol
            continue
        protocol, network = PROTOCOLS[extractor["protocol"]], recipe.get("model") or recipe["unet"]
        lengths = network["context_length"], network["prediction_length"]
        stated = (data["source"], options, lengths, data.get("frame_stride", 1), extractor.get("thresholds", []))
        lengths = protocol.context_length, protocol.prediction_length
        of_protocol = (protocol.dataset, protocol.options, lengths, protocol.frame_stride, list(protocol.thresholds))
        assert stated == of_protocol, path.name


def test_defaults_are_the_released_sevir_setting_with_masked_padding():
    changed = recipe_config("earthformer_sevir").to_diff_dict()
    default = EarthformerConfig().to_diff_dict()
    assert {name for name in changed if changed[name] != default.get(name)} == {"mask_padding"}


def test_published_sizes_of_prediff(unfolded):
    recipe = yaml.safe_load((ROOT / "examples/configs/prediff_sevir_lr.yaml").read_text())
    with torch.device("meta"):
        vae = AutoencoderKL(**recipe["vae"])
        channels = recipe["vae"]["latent_channels"]
        unet = EarthformerUNetModel(in_channels=channels, **recipe["unet"]).eval()
        shape = {"sample_size": unet.config.sample_size, "prediction_length": unet.config.prediction_length}
        alignment = EarthformerAlignmentModel(in_channels=channels, **shape, **recipe["alignment_network"]).eval()
        sample, context = (torch.empty(1, length, 16, 16, channels) for length in (6, 7))
        frame = torch.empty(1, 1, 128, 128)
    calls = {
        (84_499_393, 111.6): (vae, lambda: vae(frame)),
        (136_817_538, 326.7): (unet, lambda: unet(sample, 1, context)),
        (8_937_033, 5.7): (alignment, lambda: alignment(sample, 1)),
    }
    for (parameters, multiply_adds), (network, call) in calls.items():
        assert sum(p.numel() for p in network.parameters()) == parameters
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds * 1e9, rel=0.01)
