"""The shipped models and the examples that use them."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_data import write_sst
from tiny import DATA, ROOT
from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction
from typer.testing import CliRunner

from earthformer_hf import KnowledgeAlignmentCallback, PreDiffPipeline
from earthformer_hf.cli import app
from earthformer_hf.data import Windows, simulated
from earthformer_hf.data.open_radar import rain_table
from earthformer_hf.evaluation import (
    baseline_forecaster,
    baselines,
    evaluate,
    model_forecaster,
    pipeline_forecaster,
    protocol_windows,
)
from earthformer_hf.evaluation.protocols import PROTOCOLS
from earthformer_hf.guidance import frame_mean, intensity_change


CARDS = {
    "earthformer-radar-small": "earthformer_radar_small",
    "earthformer-radar-tiny": "earthformer_radar_tiny",
    "earthformer-sst-small": "earthformer_sst_small",
}


def load(name):
    folder = ROOT / "model_cards" / name
    return AutoModelForTimeSeriesPrediction.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(
        folder
    )


@pytest.mark.parametrize("name", CARDS)
def test_model_recipe_and_card_belong_together(name):
    model, extractor = load(name)
    recipe = yaml.safe_load((ROOT / f"examples/configs/{CARDS[name]}.yaml").read_text())
    for key, value in recipe["model"].items():
        stored = getattr(model.config, key)
        assert stored == value, key
    for key, value in recipe["feature_extractor"].items():
        assert getattr(extractor, key) == value, key
    assert extractor.thresholds == list(PROTOCOLS[extractor.protocol].thresholds)
    if extractor.physical_table is not None:
        np.testing.assert_allclose(extractor.physical_table, rain_table(), rtol=1e-3)
    card = (ROOT / "model_cards" / name / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] and header["library_name"] == "transformers"
    assert f"{model.num_parameters():,}" in card
    assert "earthformer-hf evaluate" in card


def test_the_radar_model_is_small():
    model, extractor = load("earthformer-radar-tiny")
    assert model.num_parameters() <= 3_000_000
    weights = ROOT / "model_cards/earthformer-radar-tiny/model.safetensors"
    assert weights.stat().st_size <= 12 * 2**20
    # the table ties SEVIR's thresholds to the rain rates that the data's description gives
    rates = extractor.to_physical(np.array([16, 74, 133, 160, 181, 219]))
    np.testing.assert_allclose(rates, [0.3, 1.7, 8.7, 19, 34, 100], rtol=0.06)


def test_the_radar_model_beats_persistence_on_simulated_rain():
    """Weather that it never saw, so this is weak; the scores that count are in its card."""
    model, extractor = load("earthformer-radar-tiny")
    events = simulated.rain_events(2)
    for event in events:
        event["values"] = extractor.from_physical(event["values"])
    protocol = replace(PROTOCOLS["radar-open"], independent="id")  # simulated events have no source
    forecasters = {
        "model": model_forecaster(model, extractor),
        "persistence": baseline_forecaster("persistence", protocol, lambda split: None),
    }
    scores = evaluate(forecasters, Windows(events, extractor.encode, 13, 12), protocol)["scores"]
    assert scores["model"]["summary"]["mse"] < scores["persistence"]["summary"]["mse"]
    assert scores["model"]["errors"]["pixels"].sum() == 2 * 12 * 128 * 128


def test_pipeline_recipe_and_card_belong_together():
    folder = ROOT / "model_cards/prediff-radar-small"
    pipeline = PreDiffPipeline.from_pretrained(folder)
    recipe = yaml.safe_load((ROOT / "examples/configs/prediff_radar_small.yaml").read_text())
    recipe["vae"] = yaml.safe_load((ROOT / "examples/configs/autoencoder_radar.yaml").read_text())["vae"]
    parts = {"vae": pipeline.vae, "unet": pipeline.unet, "alignment_network": pipeline.alignment}
    for name, network in parts.items():
        for key, value in recipe[name].items():
            stored = network.config[key]
            assert (list(stored) if isinstance(stored, (list, tuple)) else stored) == value, key
    for key, value in recipe["feature_extractor"].items():
        assert getattr(pipeline.feature_extractor, key) == value, key
    extractor = pipeline.feature_extractor
    assert extractor.thresholds == list(PROTOCOLS[extractor.protocol].thresholds)
    np.testing.assert_allclose(extractor.physical_table, rain_table(), rtol=1e-3)
    assert pipeline.scheduler.config.prediction_type == recipe["scheduler"]["prediction_type"]
    files = list(folder.rglob("*.safetensors"))
    assert sorted(file.parent.name for file in files) == ["alignment", "forecaster", "unet", "vae"]
    assert sum(file.stat().st_size for file in files) <= 20 * 2**20
    everything = [*parts.values(), pipeline.forecaster]
    assert sum(p.numel() for network in everything for p in network.parameters()) <= 12_000_000
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float16}
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] and header["library_name"] == "diffusers"
    for network in parts.values():
        assert f"{sum(p.numel() for p in network.parameters()):,}" in card
    assert "earthformer-hf evaluate" in card


@pytest.mark.skipif(not (DATA / "radar_open_10min_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
@pytest.mark.slow
def test_the_ensemble_beats_dressed_persistence_and_obeys():
    """On a few test windows and few steps; the scores that count are in the pipeline's card."""
    pipeline = PreDiffPipeline.from_pretrained(ROOT / "model_cards/prediff-radar-small")
    extractor = pipeline.feature_extractor
    protocol = replace(PROTOCOLS[extractor.protocol], max_windows=4)
    windows = protocol_windows(protocol, DATA)
    forecasters = {
        "model": pipeline_forecaster(pipeline, ensemble_size=3, num_inference_steps=5),
        "dressed": baseline_forecaster("dressed persistence", protocol, partial(protocol_windows, protocol, DATA)),
    }
    scores = evaluate(forecasters, windows, protocol)["scores"]
    assert scores["model"]["summary"]["fair_crps"] < 0.8 * scores["dressed"]["summary"]["fair_crps"]
    past_values, usual = windows[10]["past_values"][None], pipeline.alignment.config.statistics
    means = []
    for n in (-2, 0, 2):
        target = intensity_change(usual["change_mean"], usual["change_deviation"], n)
        guide = KnowledgeAlignmentCallback(target, frame_mean)
        generator = torch.Generator().manual_seed(0)
        member = pipeline(past_values, 1, 10, generator, callback_on_step_end=guide).predictions
        means.append(member.mean())
        assert abs(member.mean() - target(past_values)) < 0.25 * usual["change_deviation"]
    assert means[0] < means[1] < means[2]


@pytest.mark.skipif(not (DATA / "radar_open_10min_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
@pytest.mark.slow
def test_an_ensemble_that_is_fed_back_keeps_its_heavy_rain():
    """In the second hour, of the test storms: the share of 10 mm/h or more within a factor of 2 of the observed."""
    pipeline = PreDiffPipeline.from_pretrained(ROOT / "model_cards/prediff-radar-small")
    pipeline.set_progress_bar_config(disable=True)
    extractor, generator = pipeline.feature_extractor, torch.Generator().manual_seed(0)
    windows = protocol_windows(replace(PROTOCOLS[extractor.protocol], prediction_length=12), DATA)
    heavy = float(extractor.encode(extractor.from_physical(np.array([10.0])))[0][0])
    forecast, observed = [], []
    for index in np.linspace(0, len(windows) - 1, 10).round().astype(int).tolist():
        past, future = windows[index]["past_values"][None], windows[index]["future_values"]
        hour = pipeline(past, 2, generator=generator, output_type="pt").predictions[0]  # (2, 6, H, W, 1)
        context = torch.cat([past[:, -1:].expand(2, -1, -1, -1, -1), hour], dim=1)
        next_hour = pipeline(context, 1, generator=generator, output_type="pt").predictions
        forecast.append((next_hour >= heavy).double().mean())
        observed.append((future[6:] >= heavy).double().mean())
    assert 0.5 < torch.stack(forecast).mean() / torch.stack(observed).mean() < 2


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "sst_kaplan_1856_2014.nc").exists(), reason="ocean data: set EARTHFORMER_HF_DATA")
def test_the_ocean_model_beats_all_baselines():
    model, extractor = load("earthformer-sst-small")
    protocol = PROTOCOLS[extractor.protocol]
    forecasters = {"model": model_forecaster(model, extractor)}
    for name in protocol.baselines:
        forecasters[name] = baseline_forecaster(name, protocol, partial(protocol_windows, protocol, DATA))
    scores = evaluate(forecasters, protocol_windows(protocol, DATA), protocol)["scores"]
    skill = {name: system["summary"]["c_nino34_m"] for name, system in scores.items()}
    error = {name: system["summary"]["index_rmse"] for name, system in scores.items()}
    for name in protocol.baselines:
        assert skill["model"] > skill[name] and error["model"] < error[name], name
    assert skill["seasonal ridge"] > skill["linear inverse model"] > skill["damped persistence"]
    stored = json.loads((ROOT / "model_cards/earthformer-sst-small/scores.json").read_text())
    assert stored["protocol_hash"] == protocol.hash
    for name, value in skill.items():
        assert stored["scores"][name]["summary"]["c_nino34_m"] == pytest.approx(value, abs=1e-4), name


def run(*command, data):
    environment = os.environ | {"EARTHFORMER_HF_DATA": str(data), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


@pytest.mark.slow
def test_forecast_radar_without_data_says_simulated(tmp_path):
    result = run("examples/forecast_radar.py", "--output", tmp_path / "f.png", data=tmp_path)
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert "simulated rain (not real)" in first
    assert "persistence" in result.stdout and is_picture(tmp_path / "f.png")


@pytest.mark.slow
def test_ensembles_without_data_say_simulated(tmp_path):
    for script, options in (("forecast_prediff", ["--ensemble_size", "2"]), ("guided_forecast", [])):
        picture = tmp_path / f"{script}.png"
        options = [*options, "--num_inference_steps", "3"]
        result = run(f"examples/{script}.py", *options, "--output", picture, data=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "simulated rain (not real)" in result.stdout.splitlines()[0]
        assert is_picture(picture)
    np.save(tmp_path / "short.npy", np.zeros((12, 128, 128), "float32"))
    result = run("examples/forecast_prediff.py", "--input", tmp_path / "short.npy", data=tmp_path)
    assert result.returncode != 0 and "13 frames" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_forecast_enso_without_data_says_simulated(tmp_path):
    result = run("examples/forecast_enso.py", "--output", tmp_path / "e.png", data=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "simulated ocean (not real)" in result.stdout.splitlines()[0]
    assert "hindcasts are scored first, in about" in result.stdout
    assert is_picture(tmp_path / "e.png")


def test_forecast_of_a_users_own_rain(tmp_path):
    rain = simulated.rain_events(1, length=14)[0]["values"]
    rain[3, 5, 5] = np.nan
    np.save(tmp_path / "mine.npy", rain)
    options = ("--input", tmp_path / "mine.npy", "--output", tmp_path / "f.png")
    result = run("examples/forecast_radar.py", *options, data=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mine.npy" in result.stdout and is_picture(tmp_path / "f.png")
    result = run("examples/forecast_radar.py", "--model", "model_cards/earthformer-radar-tinny", data=tmp_path)
    assert result.returncode == 1 and "no folder model_cards/earthformer-radar-tinny; there are" in result.stderr


@pytest.mark.slow
def test_forecast_of_a_users_own_ocean(tmp_path):
    write_sst(tmp_path / "mine.nc", "2015-01", 40, signal=lambda month: np.sin(month / 6))
    options = ("--input", tmp_path / "mine.nc", "--output", tmp_path / "e.png")
    result = run("examples/forecast_enso.py", *options, data=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mine.nc" in result.stdout and is_picture(tmp_path / "e.png")
    write_sst(tmp_path / "short.nc", "2015-01", 11)
    result = run("examples/forecast_enso.py", "--input", tmp_path / "short.nc", data=tmp_path)
    assert result.returncode != 0 and "12 months are needed" in result.stderr.splitlines()[-1]


def refusal(monkeypatch, script, *options) -> str:
    """The one line in which an example ends."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
    assert "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize("shape", [(12, 128, 128), (25, 64, 64), (128, 128)])
def test_unusable_input_is_refused(tmp_path, monkeypatch, shape):
    np.save(tmp_path / "mine.npy", np.zeros(shape, "float32"))
    end = refusal(monkeypatch, "forecast_radar", "--input", tmp_path / "mine.npy")
    assert end.startswith("error: --input: ") and str(shape).strip("()") in end.replace("got ", "")


@pytest.mark.parametrize("script", ["forecast_radar", "forecast_enso", "forecast_prediff", "guided_forecast"])
def test_unusable_arguments_end_in_one_line(tmp_path, monkeypatch, script):
    (tmp_path / "mine.txt").write_text("neither rain nor ocean")
    for option, value in (("--model", "no-such-folder"), ("--input", tmp_path / "mine.txt")):
        assert refusal(monkeypatch, script, option, value).startswith(f"error: {option}: ")


def test_evaluate_without_data_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("EARTHFORMER_HF_DATA", str(tmp_path))
    model = str(ROOT / "model_cards/earthformer-radar-tiny")
    result = CliRunner().invoke(app, ["evaluate", "--model", model])
    assert result.exit_code == 1 and "EARTHFORMER_HF_DATA" in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "radar_open_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
def test_the_radar_model_has_the_scores_of_its_card(tmp_path):
    model = "model_cards/earthformer-radar-tiny"
    result = run("-m", "earthformer_hf.cli", "evaluate", "--model", model, "--output", tmp_path, data=DATA)
    assert result.returncode == 0, result.stderr
    document, stored = (json.loads((folder / "scores.json").read_text()) for folder in (tmp_path, ROOT / model))
    scores = document["scores"]
    assert document["windows"] == 165 and document["protocol_hash"] == stored["protocol_hash"]
    assert document["weights"] == stored["weights"]
    summary = {name: system["summary"] for name, system in scores.items()}
    assert summary["persistence"]["csi_m"] == pytest.approx(0.335, abs=0.001)
    assert summary["persistence"]["mse"] == pytest.approx(4.97e-3, abs=1e-5)
    assert summary["model"]["csi_m"] > summary["persistence"]["csi_m"]
    assert summary["model"]["mse"] < 3.46e-3  # of the extrapolation
    for name in ("model", "persistence"):
        assert summary[name]["csi_m"] == pytest.approx(stored["scores"][name]["summary"]["csi_m"], abs=1e-3)
    card = (ROOT / model / "README.md").read_text()
    assert f"| this model | {summary['model']['csi_m']:.3f} | {summary['model']['mse'] * 1e3:.2f}e-3 |" in card
    if baselines.is_pysteps_available():
        assert summary["extrapolation"]["csi_m"] == pytest.approx(0.409, abs=0.002)
        assert summary["extrapolation"]["mse"] == pytest.approx(3.47e-3, abs=1e-5)
