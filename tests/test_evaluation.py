"""One way through a protocol: known answers on small made-up data."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import datasets
import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import binom
from test_source_sevir import TRAPS, write_catalogue, write_raster
from tiny import ROOT, tiny_model, tiny_pipeline
from typer.testing import CliRunner

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.advection import first_guess
from earthformer_hf.cli import app
from earthformer_hf.data import Windows, icar_enso, sevir, simulated
from earthformer_hf.evaluation import (
    baseline_forecaster,
    compare,
    data_extractor,
    evaluate,
    model_forecaster,
    pipeline_forecaster,
    protocol_windows,
    reports,
    run_protocol,
    window_at,
)
from earthformer_hf.evaluation.benchmark_metrics import earthnet_parts
from earthformer_hf.evaluation.forecasters import protocol_baselines
from earthformer_hf.evaluation.protocols import PROTOCOLS, Protocol
from earthformer_hf.evaluation.reports import update_card
from earthformer_hf.sharing.cards import with_scores
from earthformer_hf.sharing.tables import text_table


THRESHOLDS = (16, 74, 133, 160, 181, 219)


def codes(number, length=49, size=16, seed=0, minutes=1):
    """Events of slowly changing codes 0..255 that reach every threshold."""
    events = []
    for i in range(number):
        random = np.random.default_rng([seed, i])
        walk = random.normal(100, 60, (1, size, size)) + random.normal(0, 12, (length, size, size)).cumsum(0)
        events.append({"id": f"S{i}", "time": (minutes * np.arange(length)).astype("datetime64[m]")})
        events[-1]["geo"] = {"source": f"S{i}"}
        events[-1]["values"] = walk.clip(0, 254).astype("uint8")
    return events


def cut(events, protocol):
    lengths = protocol.context_length, protocol.prediction_length
    strides = protocol.window_stride, protocol.frame_stride
    return Windows(events, data_extractor(protocol).encode, *lengths, *strides)


def persistence(protocol):
    return baseline_forecaster("persistence", protocol, lambda split: None)


def test_persistence_under_the_protocol_of_sevir_is_a_plain_loop():
    protocol, events = PROTOCOLS["sevir-earthformer"], codes(2)
    results = evaluate({"persistence": persistence(protocol)}, cut(events, protocol), protocol)
    hits, misses, false_alarms = np.zeros((3, 6, 12), int)
    error, count = np.zeros(12), 0
    for event in events:
        values = event["values"].astype(int)
        for start in (0, 12, 24):
            for lead in range(12):
                said, happened = values[start + 12], values[start + 13 + lead]
                error[lead] += (((said - happened) / 255) ** 2).sum()
                for i, threshold in enumerate(THRESHOLDS):
                    hits[i, lead] += ((said >= threshold) & (happened >= threshold)).sum()
                    misses[i, lead] += ((said < threshold) & (happened >= threshold)).sum()
                    false_alarms[i, lead] += ((said >= threshold) & (happened < threshold)).sum()
            count += 1
    scores = results["scores"]["persistence"]
    assert results["windows"] == count == 6
    for name, expected in (("hits", hits), ("misses", misses), ("false_alarms", false_alarms)):
        np.testing.assert_array_equal(scores["contingency"][name], expected)
    pooled = hits.sum(1) / (hits + misses + false_alarms).sum(1)
    assert scores["summary"]["csi_m"] == pytest.approx(pooled.mean())
    assert scores["summary"]["mse"] == pytest.approx(error.sum() / (6 * 12 * 256))

    protocol = PROTOCOLS["sevir-per-lead"]
    results = evaluate({"persistence": persistence(protocol)}, cut(events, protocol), protocol)
    by_lead = hits / (hits + misses + false_alarms)
    summary = results["scores"]["persistence"]["summary"]
    assert summary["csi_m"] == pytest.approx(by_lead.mean())
    assert abs(summary["csi_m"] - scores["summary"]["csi_m"]) > 1e-3
    assert summary["mse"] == pytest.approx(scores["summary"]["mse"])  # as many pixels at every lead time


def test_what_was_not_observed_enters_no_score():
    protocol, (event,) = PROTOCOLS["radar-open"], codes(1, length=25, size=32)
    event["values"][10:, :4] = 255  # no coverage, also in the last frame of the past
    whole = {**event, "values": event["values"][:, 4:]}
    first, second = (
        evaluate({"persistence": persistence(protocol)}, cut([e], protocol), protocol) for e in (event, whole)
    )
    for family in ("contingency", "contingency_physical", "errors"):  # blocks and neighbours are of another grid
        for name, values in first["scores"]["persistence"][family].items():
            np.testing.assert_allclose(values, second["scores"]["persistence"][family][name], rtol=1e-12)
    assert (first["scores"]["persistence"]["errors"]["pixels"] == 28 * 32).all()

    nothing = {**event, "values": np.full_like(event["values"], 255)}
    results = evaluate({"persistence": persistence(protocol)}, cut([nothing], protocol), protocol)
    assert np.isnan(results["scores"]["persistence"]["summary"]["mse"])
    document = reports.score_file(results, protocol)
    assert document["scores"]["persistence"]["summary"]["csi_m"] is None
    assert "undefined" in reports.score_text(document, protocol)
    results = evaluate({"persistence": persistence(protocol)}, cut([nothing, event], protocol), protocol)
    assert results["windows"] == 2 and results["cases"] == {"best": 1, "median": 1, "worst": 1}  # no error, no case


def test_a_first_guess_is_scored_with_what_was_not_observed():
    protocol, (event,) = PROTOCOLS["radar-open"], codes(1, length=25, size=32)
    rows = np.arange(32)[None, :, None] - np.arange(25)[:, None, None]  # rain that moves by a row a frame
    event["values"] = np.where((rows % 16) < 6, event["values"] // 2 + 60, 0).astype("uint8")
    event["values"][:, 20:] = 255
    extractor = EarthformerFeatureExtractor(scale=1 / 255, fill_value=0, missing_value=255, valid_range=[0, 254])
    model = tiny_model(context_length=13, prediction_length=12, image_size=(32, 32), first_guess="advection")
    (item,) = Windows([event], extractor.encode, 13, 12)
    guess, _ = first_guess("advection", item["past_values"][None], 12, 1, item["past_observed_mask"][None])
    found = model_forecaster(model, extractor)(window_at(cut([event], protocol), 0, data_extractor(protocol)))
    np.testing.assert_allclose(found, extractor.decode(guess[0, ..., 0]), atol=0.01)
    blind, _ = first_guess("advection", item["past_values"][None], 12, 1, None)
    assert (blind - guess).abs().max() > 0.1


def test_an_ensemble_is_scored_by_its_mean_or_by_each_member():
    protocol, events = PROTOCOLS["sevir-lr-prediff"], codes(2, length=25)

    def forecast(window):
        random = np.random.default_rng(window.index)
        return window.filled_past[-1] + random.normal(0, 20, (3, *window.future.shape))

    windows = cut(events, protocol)
    ensembles = [forecast(window_at(windows, number, data_extractor(protocol))) for number in range(len(windows))]
    truth = [windows.raw(number)[7:] for number in range(len(windows))]
    for rule, forecasts in (("mean", [[e.mean(0)] for e in ensembles]), ("each", ensembles)):
        changed = replace(protocol, ensemble=rule)
        scores = evaluate({"model": forecast}, windows, changed)["scores"]["model"]
        pairs = [(member, y) for members, y in zip(forecasts, truth) for member in members]
        hits = [sum(((x >= t) & (y >= t)).sum() for x, y in pairs) for t in THRESHOLDS]
        assert scores["contingency"]["hits"].sum(1).tolist() == hits
        assert scores["summary"]["mse"] == pytest.approx(np.mean([((x - y) / 255) ** 2 for x, y in pairs]))
        assert scores["ensemble"]["windows"] == 6 and scores["ranks"]["ranks"].sum() == 6 * 6 * 256
    plain = [np.abs(e - y).mean(0) - np.abs(e[:, None] - e[None]).sum((0, 1)) / 18 for e, y in zip(ensembles, truth)]
    assert scores["summary"]["crps"] == pytest.approx(np.mean(plain) / 255)


def test_chances_of_physical_thresholds_are_those_of_their_codes():
    base = replace(PROTOCOLS["radar-open-ensemble"], scores=("probabilities",), baselines=())
    codes_of = data_extractor(base).from_physical(np.array(base.physical_thresholds)).tolist()

    def forecast(window):
        random = np.random.default_rng(window.index)
        return window.filled_past[-1] + random.normal(0, 20, (3, *window.future.shape))

    windows = cut(codes(1, length=25), base)
    found = evaluate({"model": forecast}, windows, base)["scores"]["model"]["probabilities_physical"]
    plain = replace(base, thresholds=tuple(codes_of), physical_thresholds=())
    expected = evaluate({"model": forecast}, windows, plain)["scores"]["model"]["probabilities"]
    assert found["forecasts"].sum() == expected["forecasts"].sum() > 0
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_every_system_is_scored_again_where_a_masked_one_reaches():
    protocol, events = replace(PROTOCOLS["radar-open"], scores=("errors",)), codes(1, length=25)

    def half(window):
        mask = np.zeros(window.future.shape, bool)
        mask[:, :, 8:] = True
        return np.ma.masked_array(np.where(mask, 0, window.future), mask)

    scores = evaluate({"half": half, "persistence": persistence(protocol)}, cut(events, protocol), protocol)["scores"]
    assert list(scores) == ["half", "persistence", "half, reachable pixels", "persistence, reachable pixels"]
    assert scores["half"]["summary"]["mse"] > 0 == scores["half, reachable pixels"]["summary"]["mse"]
    left = events[0]["values"][:, :, :8].astype(float)
    expected = np.square((left[12] - left[13:]) / 255).mean()
    assert scores["persistence, reachable pixels"]["summary"]["mse"] == pytest.approx(expected)


def test_the_interval_of_a_proportion_is_the_binomial_one():
    """Always forecast, and it happens in 120 of 400 events: then CSI is a proportion."""
    protocol = Protocol(
        name="coin", source="a test", dataset="open-radar", context_length=1, prediction_length=1,
        scores=("contingency",), thresholds=(1,),
    )  # fmt: skip
    events = codes(400, length=2, size=1)
    for number, event in enumerate(events):
        event["values"] = np.full((2, 1, 1), int(number % 10 < 3), "uint8")
    results = evaluate({"always": lambda window: np.ones((1, 1, 1))}, cut(events, protocol), protocol)
    scores = results["scores"]["always"]
    assert results["independent_events"] == 400 and scores["summary"]["csi_m"] == 0.3
    np.testing.assert_allclose(scores["interval"]["csi_m"], np.array(binom.interval(0.95, 400, 0.3)) / 400, atol=0.006)
    never = replace(protocol, thresholds=(2,))
    results = evaluate({"always": lambda window: np.ones((1, 1, 1))}, cut(events, never), never)
    assert results["scores"]["always"]["interval"]["csi_m"] is None  # undefined, whatever is drawn
    assert "undefined..undefined" in reports.score_text(reports.score_file(results, never), never)


def test_few_events_are_scored_by_region():
    """Tiles of one storm are no independent events: an interval would be a lie."""
    protocol = replace(PROTOCOLS["radar-open"], scores=("contingency", "errors"))
    events = codes(20, length=25)
    for number, event in enumerate(events):
        event["geo"] = {"source": "storm", "row": 4 * number, "column": 0}  # each overlaps the next three
    results = evaluate({"persistence": persistence(protocol)}, cut(events, protocol), protocol)
    scores = results["scores"]["persistence"]
    assert results["independent_events"] == 1 and "interval" not in scores
    assert len(scores["regions"]) == 5 and "S0" in scores["regions"]
    alone = evaluate({"persistence": persistence(protocol)}, cut(events[:1], protocol), protocol)
    assert scores["regions"]["S0"] == alone["scores"]["persistence"]["summary"]
    for event in events:
        event["geo"]["source"] = event["id"]
    results = evaluate({"persistence": persistence(protocol)}, cut(events, protocol), protocol)
    low, high = results["scores"]["persistence"]["interval"]["mse"]
    assert results["independent_events"] == 20 and low < results["scores"]["persistence"]["summary"]["mse"] < high


def test_a_models_forecast_is_what_the_model_says():
    events = codes(1, length=7, size=20)
    events[0]["values"] = np.concatenate([events[0]["values"], events[0]["values"][..., :8]], axis=2)  # 20 x 28
    model, extractor = tiny_model(), EarthformerFeatureExtractor(scale=1 / 255, valid_range=(0, 254))
    protocol = replace(PROTOCOLS["sevir-earthformer"], context_length=3, prediction_length=4, scores=("errors",))
    window = window_at(cut(events, protocol), 0, data_extractor(protocol))
    expected = extractor.decode(model(**extractor(events[0]["values"][:3])).predictions[0, ..., 0])
    np.testing.assert_allclose(model_forecaster(model, extractor)(window), expected, rtol=1e-4, atol=0.01)
    with pytest.raises(ValueError, match="`windows` must be of"):
        evaluate({}, cut(events, protocol), replace(protocol, context_length=4))


def test_an_ensemble_follows_from_the_windows_index():
    pipeline = tiny_pipeline()
    pipeline.register_modules(feature_extractor=EarthformerFeatureExtractor(scale=1 / 255))
    events = codes(1, length=8, size=16)
    events[0]["values"] = events[0]["values"][:, :12]
    protocol = replace(PROTOCOLS["sevir-lr-prediff"], context_length=3, prediction_length=2, window_stride=1)
    windows, extractor = cut(events, protocol), data_extractor(protocol)
    forecast = pipeline_forecaster(pipeline, ensemble_size=2, num_inference_steps=2)
    first, second = (forecast(window_at(windows, number, extractor)) for number in (0, 1))
    assert first.shape == (2, 2, 12, 16)
    np.testing.assert_array_equal(forecast(window_at(windows, 0, extractor)), first)
    assert not np.array_equal(second, first)


def test_dressed_persistence_draws_from_the_training_windows():
    protocol = PROTOCOLS["radar-open-ensemble"]
    training = cut(codes(3, length=25, seed=5), protocol)
    forecast = baseline_forecaster("dressed persistence", protocol, lambda split: training, ensemble_size=4)
    window = window_at(cut(codes(1, length=25), protocol), 0, data_extractor(protocol))
    possible = [training.raw(n)[7:].astype(float) - training.raw(n)[6] for n in range(len(training))]
    for member in forecast(window):
        assert any(np.array_equal(member, np.maximum(window.filled_past[-1] + error, 0)) for error in possible)


def test_the_index_of_maps_and_of_a_series_of_labels():
    (event,) = simulated.sst_events(6)
    protocol = replace(PROTOCOLS["sst-kaplan"], baselines=())
    windows = cut([event], protocol)
    perfect = evaluate({"truth": lambda window: window.future}, windows, protocol)["scores"]["truth"]
    assert perfect["summary"]["c_nino34_m"] == pytest.approx(1) and perfect["summary"]["index_rmse"] == 0
    assert perfect["nino34"]["forecasts"] == len(event["values"]) - 25
    assert perfect["nino34"]["forecasts_by_month"].tolist()[0] == sum(
        str(month).endswith("-01") for month in event["time"][12 : len(event["values"]) - 13].astype("datetime64[M]")
    )
    # labels that are twice the index: correlation 1, error the index itself
    maps = np.nanmean(event["values"][:, 10:13, 19:30].astype("float64"), axis=(1, 2))
    means = np.append((maps[:-2] + maps[1:-1] + maps[2:]) / 3, [0, 0])
    event["series"] = {"nino34": 2 * means}
    labelled = replace(protocol, index_series="nino34")
    scores = evaluate({"truth": lambda window: window.future}, windows, labelled)["scores"]["truth"]
    assert scores["summary"]["c_nino34_m"] == pytest.approx(1)
    each = [means[start + 12 : start + 24] for start in range(len(windows))]
    expected = np.sqrt(np.square(each).mean(0)).mean()
    assert scores["summary"]["index_rmse"] == pytest.approx(expected)


def test_a_table_is_aligned_markdown():
    rows = {"model": {"csi_m": 0.38812, "pixels": 12000}, "persistence": {"csi_m": None, "range": "0..1"}}
    assert text_table(rows, "name").splitlines() == [
        "| name        |     csi_m | pixels | range |",
        "|-------------|----------:|-------:|------:|",
        "| model       |    0.3881 | 12,000 |       |",
        "| persistence | undefined |        |  0..1 |",
    ]


def test_score_files_of_other_protocols_are_refused(tmp_path):
    protocol, events = PROTOCOLS["sevir-earthformer"], codes(1)
    paths = []
    for name, changed in (("a", protocol), ("b", protocol), ("c", PROTOCOLS["sevir-per-lead"])):
        results = evaluate({"persistence": persistence(changed)}, cut(events, changed), changed)
        reports.write_score_file(reports.score_file(results, changed, command="x"), tmp_path / name)
        paths.append(tmp_path / name)
    document = json.loads(paths[0].read_text())
    assert document["protocol_hash"] == protocol.hash and document["protocol"]["name"] == protocol.name
    assert (
        document["scores"]["persistence"]["contingency"]["hits"]
        == json.loads(paths[1].read_text())["scores"]["persistence"]["contingency"]["hits"]
    )
    text = compare(paths[:2])
    assert f"{document['scores']['persistence']['summary']['csi_m']:.4g}" in text
    with pytest.raises(ValueError, match="differ in average, name, published, source"):
        compare(paths)
    runner = CliRunner()
    assert runner.invoke(app, ["compare", *map(str, paths[:2])]).output.strip() == text
    refused = runner.invoke(app, ["compare", *map(str, paths)])
    assert refused.exit_code == 1 and "do not compare" in refused.output
    document["windows"] += 1
    reports.write_score_file(document, paths[1])
    with pytest.raises(ValueError, match="3 and 4 windows"):
        compare(paths[:2])
    paths[1].write_text("{}")
    with pytest.raises(ValueError, match="is not a score file"):
        compare(paths[:2])


def test_ensembles_of_different_size_compare_by_the_fair_score(tmp_path):
    protocol = PROTOCOLS["sevir-lr-prediff"]
    windows, paths = cut(codes(1, 25), protocol), [tmp_path / "two", tmp_path / "two again", tmp_path / "three"]
    for size, path in zip((2, 2, 3), paths):

        def forecast(window, size=size):
            return window.filled_past[-1] + np.arange(size)[:, None, None, None] * np.ones_like(window.future, float)

        document = reports.score_file(evaluate({"x": forecast}, windows, protocol), protocol, ensemble_size=size)
        reports.write_score_file(document, path)
    for text, plain in ((compare(paths[:2]), 1), (compare(paths), 0)):
        columns = text.splitlines()[2].split()
        assert columns.count("fair_crps") == 1 and columns.count("crps") == plain


def test_figures_show_the_scores():
    protocol, events = PROTOCOLS["sevir-lr-prediff"], codes(2, length=25, minutes=10)

    def forecast(window):
        random = np.random.default_rng(window.index)
        return window.filled_past[-1] + random.normal(0, 20, (3, *window.future.shape))

    windows, forecasters = cut(events, protocol), {"model": forecast, "persistence": persistence(protocol)}
    results = evaluate(forecasters, windows, protocol)
    figures = reports.figures(reports.score_file(results, protocol), forecasters, windows, protocol)
    assert set(figures) == {"scores_by_lead", "spectrum", "reliability", "rank_histogram", "cases"}
    axes = {axis.get_title(): axis for axis in figures["scores_by_lead"].axes}
    line = axes["mean squared error"].lines[0]
    assert line.get_xdata().tolist() == [10, 20, 30, 40, 50, 60]
    np.testing.assert_allclose(line.get_ydata(), results["scores"]["model"]["errors"]["mse_by_lead"], rtol=1e-5)
    heights = [bar.get_height() for bar in figures["rank_histogram"].axes[0].patches]
    ranks = results["scores"]["model"]["ranks"]["ranks"].sum(0)
    np.testing.assert_allclose(heights, 4 * ranks / ranks.sum())
    # the cases are those of the lowest, median and highest error
    extractor = data_extractor(protocol)
    taken = [window_at(windows, number, extractor) for number in range(len(windows))]
    errors = [np.square(forecast(window).mean(0) - window.future).mean() for window in taken]
    order = np.argsort(errors)
    assert results["cases"] == {"best": order[0], "median": order[3], "worst": order[-1]}
    shown = figures["cases"].axes[0].images[0].get_array()
    np.testing.assert_array_equal(shown, taken[order[0]].future[0])
    assert f"worst: {taken[order[-1]].event['id']}" in figures["cases"].get_suptitle()
    # and a window that is several of them is drawn once
    same = reports.score_file(results | {"cases": {"best": 1, "median": 2, "worst": 2}}, protocol)
    labels = [axis.get_ylabel() for axis in reports.figures(same, forecasters, windows, protocol)["cases"].axes]
    assert [label.replace("\n", " ") for label in labels if label][:4] == [
        "best: observed", "best: model", "best: persistence", "median and worst: observed",
    ]  # fmt: skip


# -- the data sets of the published protocols, from files of their layout ---------------------------------------------


@pytest.fixture
def from_files(tmp_path, monkeypatch):
    """Scores of persistence under a protocol, and the windows, of files in `tmp_path / "data"`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def score(name, **options):
        protocol = PROTOCOLS[name]
        protocol = replace(protocol, options=options) if options else protocol
        windows = protocol_windows(protocol, tmp_path / "data")
        return evaluate({"persistence": persistence(protocol)}, windows, protocol)["scores"]["persistence"], windows

    return score


def test_sevir_lr_from_files(tmp_path, from_files):
    write_catalogue(tmp_path / "data", TRAPS)
    for name in ("vil/2018/a.h5", "vil/2019/b.h5"):
        write_raster(tmp_path / "data/data" / name, 6)
    scores, windows = from_files("sevir-lr-prediff")
    assert len(windows) == 9 and {event["id"] for event in windows.events} == {"R14", "S1000", "S900"}
    pairs = [windows.raw(number) for number in range(9)]
    error = np.mean([np.square((pair[6].astype(float) - pair[7:]) / 255) for pair in pairs])
    assert scores["summary"]["mse"] == pytest.approx(error)
    assert scores["contingency"]["hits"].shape == (6, 6) and "csi_m_pool16" in scores["summary"]


def test_extrapolation_and_steps_under_the_protocol_of_sevir_lr(tmp_path, monkeypatch):
    """Cells that move by two pixels a frame: what moves with them has less error than what stays."""
    pytest.importorskip("pysteps")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cells = simulated.rain_events(1, length=1, size=128)[0]["values"][0]
    codes = sevir.code_of_vil(cells / cells.max() * 30)
    moving = np.stack([np.roll(codes, 2 * t, axis=1) for t in range(25)], axis=-1)  # (H, W, T)
    times = {"R1": "2019-08-01 12:00:00", "R2": "2018-08-01 12:00:00"}  # of the test split, and of training
    rows = [(id, "vil/2019/c.h5", row, "vil", time, 0.0) for row, (id, time) in enumerate(times.items())]
    write_catalogue(tmp_path / "data", rows)
    write_raster(tmp_path / "data/data/vil/2019/c.h5", 2)
    with h5py.File(tmp_path / "data/data/vil/2019/c.h5", "a") as file:
        file["vil"][0] = moving
    run_protocol(
        protocol="sevir-lr-prediff",
        data_dir=tmp_path / "data",
        ensemble_size=3,
        max_windows=1,
        output=tmp_path / "scores",
        further_baselines=("advection", "extrapolation", "steps", "persistence"),
    )
    stored = json.loads((tmp_path / "scores/scores.json").read_text())
    assert stored["protocol"]["baselines"] == ["persistence", "dressed persistence"]
    scores = {name: found["summary"] for name, found in stored["scores"].items()}
    assert {"persistence", "dressed persistence", "advection", "extrapolation", "steps"} <= set(scores)
    for name in ("advection", "extrapolation", "steps"):
        assert scores[name]["mse"] < 0.6 * scores["persistence"]["mse"], name
    assert "crps" in scores["steps"]


def test_further_baselines_are_checked():
    with pytest.raises(ValueError, match="`further_baselines` must be of .* got 'luck'"):
        protocol_baselines(PROTOCOLS["sevir-earthformer"], further=("luck",))
    with pytest.raises(ValueError, match="`scores` must hold one of ensembles, which the baseline 'steps'|'steps'"):
        protocol_baselines(replace(PROTOCOLS["sevir-earthformer"], scores=("nino34",)), further=("steps",))


def test_codes_of_liquid_are_those_of_the_paper():
    """Veillette et al., 2020, appendix; and back."""
    codes = np.array([0, 5, 10, 18, 74, 133, 254])
    liquid = [0, 0, 8 / 90.66, 16 / 90.66, *np.exp((np.array([74, 133, 254]) - 83.9) / 38.9)]
    np.testing.assert_allclose(sevir.vil_of_code(codes), liquid)
    every = np.arange(6, 255)
    assert sevir.code_of_vil(sevir.vil_of_code(every)).tolist() == every.tolist()
    assert sevir.code_of_vil(np.array([0.0, 1e9])).tolist() == [0, 254]


@pytest.mark.parametrize("name", ["nbody-mnist-drawn", "moving-mnist-drawn"])
def test_mnist_from_files(tmp_path, from_files, name):
    (tmp_path / "data").mkdir()
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28)).astype("uint8")
    np.savez(tmp_path / "data/digits.npz", images=images, split=np.repeat(["train", "val", "test"], [10, 5, 5]))
    scores, windows = from_files(name, digits="digits.npz", sizes=(3, 3, 3))
    frames = [windows.raw(number) / 255.0 for number in range(len(windows))]
    differences = np.stack([frame[9] - frame[10:] for frame in frames])  # (N, T, H, W)
    assert len(windows) == 3
    assert scores["summary"]["mse"] == pytest.approx(np.square(differences).sum((2, 3)).mean())
    assert scores["summary"]["mae"] == pytest.approx(np.abs(differences).sum((2, 3)).mean())
    assert 0 < scores["summary"]["ssim"] < 1


def test_icar_enso_from_files(tmp_path, from_files, monkeypatch):
    monkeypatch.setattr(icar_enso, "ARCHIVES", (("CMIP6", 1, 3), ("CMIP5", 2, 3)))
    (tmp_path / "data").mkdir()
    random = np.random.default_rng(0)
    labels = random.normal(size=(9, 36)).astype("float32")
    maps = random.normal(size=(9, 36, 24, 48)).astype("float32")
    places = {"lat": np.arange(-55.0, 65, 5), "lon": np.arange(95.0, 335, 5)}
    xr.Dataset({"sst": (("year", "month", "lat", "lon"), maps)}, places).to_netcdf(tmp_path / "data/CMIP_train.nc")
    xr.Dataset({"nino": (("year", "month"), labels)}).to_netcdf(tmp_path / "data/CMIP_label.nc")
    scores, windows = from_files("icar-enso")
    event = windows.events[0]
    index = event["values"][:][:, 10:13, 19:30].mean((1, 2))
    starts = range(len(index) - 25)
    targets = np.stack([event["series"]["nino34"][start + 12 : start + 24] for start in starts])
    said = np.array([index[start + 11] for start in starts])
    expected = [np.corrcoef(said, targets[:, lead])[0, 1] for lead in range(12)]
    assert scores["summary"]["c_nino34_m"] == pytest.approx(np.mean(expected), rel=1e-5)
    np.testing.assert_allclose(
        scores["nino34"]["rmse_by_lead"], np.sqrt(np.square(said[:, None] - targets).mean(0)), 1e-5
    )


def test_earthnet_from_files(tmp_path, from_files):
    name, random = "29SND_2018-09-01_2019-01-30_441_569_2745_2873_6_86_42_122", np.random.default_rng(0)
    weather = {"highresstatic": (128, 128, 1), "mesodynamic": (80, 80, 5, 150), "mesostatic": (80, 80, 1)}
    folder = tmp_path / "data/iid_test_split"
    for part, frames in (("context", 10), ("target", 20)):
        cube = random.uniform(0.2, 0.4, (128, 128, 5, frames)).astype("float16")
        cube[:, :, 4] = random.uniform(size=(128, 128, frames)) < 0.2  # clouds
        (folder / part).mkdir(parents=True)
        arrays = {key: np.zeros(shape, "float16") for key, shape in weather.items()} if part == "context" else {}
        np.savez(folder / part / f"{part}_{name}.npz", highresdynamic=cube, **arrays)
    scores, windows = from_files("earthnet2021")
    event = windows.events[0]
    values, clear = event["values"][:], event["observed"][10:]
    last = np.repeat(values[9:10], 20, axis=0)
    expected = earthnet_parts(last, values[10:], clear)
    for part, value in expected.items():
        assert scores["earthnet"][part] == pytest.approx(value), part
    assert scores["summary"]["earthnet_score"] == pytest.approx(4 / sum(1 / value for value in expected.values()))
    assert scores["errors"]["pixels"].sum() == 4 * clear.sum()
    assert scores["summary"]["mse"] == pytest.approx(np.square(last - values[10:])[clear].mean(dtype="float64"), 1e-5)


def test_a_model_is_given_the_covariates():
    model = tiny_model(num_covariates=2)
    event = codes(1, length=7, size=28)[0]
    event["values"] = event["values"][:, :20]
    event["covariates"] = np.random.default_rng(0).normal(size=(7, 20, 28, 2)).astype("float32")
    protocol = replace(PROTOCOLS["sevir-earthformer"], context_length=3, prediction_length=4)
    window = window_at(cut([event], protocol), 0, data_extractor(protocol))
    extractor = EarthformerFeatureExtractor(scale=1 / 255)
    past, future = (torch.from_numpy(event["covariates"][None, part]) for part in (slice(0, 3), slice(3, 7)))
    inputs = extractor(event["values"][:3]) | {"past_covariates": past, "future_covariates": future}
    expected = extractor.decode(model(**inputs).predictions[0, ..., 0])
    np.testing.assert_allclose(model_forecaster(model, extractor)(window), expected, rtol=1e-4, atol=0.01)


def test_the_command_writes_scores_and_figures(tmp_path, from_files):
    """As a user types it: a model of the right size, its protocol by name, a folder of data."""
    write_catalogue(tmp_path / "data", TRAPS)
    for name in ("vil/2018/a.h5", "vil/2019/b.h5"):
        write_raster(tmp_path / "data/data" / name, 6)
    options = {"context_length": 7, "prediction_length": 6, "image_size": (128, 128), "stem_strides": [2, 4]}
    tiny_model(**options).save_pretrained(tmp_path / "model")
    EarthformerFeatureExtractor(scale=1 / 255, protocol="sevir-lr-prediff").save_pretrained(tmp_path / "model")
    command = ["evaluate", "--model", "model", "--data_dir", "data", "--max_windows", "2", "--output", "scores"]
    paths = [str(tmp_path / part) if part in ("model", "data", "scores") else part for part in command]
    result = CliRunner().invoke(app, paths)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "scores/scores.json").read_text())
    assert list(document["scores"]) == ["model", "persistence", "dressed persistence"] and document["windows"] == 2
    assert document["protocol"]["max_windows"] == 2 and document["ensemble_size"] == 8
    weights = (tmp_path / "model/model.safetensors").read_bytes()
    assert document["weights"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert f"{document['scores']['model']['summary']['mse']:.4g}" in result.output
    assert {path.name for path in (tmp_path / "scores").glob("*.png")} == {
        "cases.png", "rank_histogram.png", "reliability.png", "scores_by_lead.png", "spectrum.png",
    }  # fmt: skip
    assert "measured by others, published: PreDiff: CRPS 0.0246" in result.output
    refused = CliRunner().invoke(app, [*paths, "--card"])
    assert refused.exit_code == 1 and "`--card` needs a `--model` that is a folder with a card" in refused.output
    (tmp_path / "model/README.md").write_text("# mine\n")
    refused = CliRunner().invoke(app, [*paths, "--card"])
    assert refused.exit_code == 1 and "leave out `--max_windows`" in refused.output.replace("-w", "_w")
    refused = CliRunner().invoke(app, ["evaluate", "--protocol", "sevir"])
    assert refused.exit_code == 1 and "`--protocol` must be one of" in refused.output


def test_a_card_tells_the_last_scores_and_keeps_what_was_written_by_hand(tmp_path):
    def document(mse: float) -> dict:
        scores = {"model": {"summary": {"mse": mse}}}
        protocol = {"name": "p", "published": "another model: MSE 3"}
        return {"protocol": protocol, "windows": 7, "command": "earthformer-hf evaluate", "scores": scores}

    head, rest = "---\nlicense: mit\n---\n# mine\n\n## Scores\n\n", "By eye: good.\n\n## Limits\n\nMany.\n"
    (tmp_path / "README.md").write_text(head + rest)
    for mse in (0.25, 0.125):
        update_card(tmp_path, document(mse))
        assert json.loads((tmp_path / "scores.json").read_text())["scores"]["model"]["summary"]["mse"] == mse
    card = (tmp_path / "README.md").read_text()
    assert card.startswith(f"{head}<!-- scores") and card.endswith(f"\n\n{rest}")
    assert "0.125" in card and "0.25" not in card
    assert "Measured by others, published: another model: MSE 3." in card
    for text in ("# bare\n", "# bare\n\n## Scores\n\nNo evaluation yet.\n"):
        found = with_scores(text, document(0.5))
        assert found.startswith("# bare\n\n## Scores\n\n<!-- scores") and "No evaluation" not in found
        assert with_scores(found, document(0.5)) == found


# -- processes --------------------------------------------------------------------------------------------------------

SCRIPT = """
import pickle, sys
from pathlib import Path
sys.path.insert(0, "tests")
import numpy as np
from test_evaluation import PROTOCOLS, codes, cut, evaluate, persistence
from accelerate import PartialState

state, protocol = PartialState(cpu=True), PROTOCOLS["sevir-lr-prediff"]

def forecast(window):
    random = np.random.default_rng(window.index)
    return window.filled_past[-1] + random.normal(0, 20, (3, *window.future.shape))

results = evaluate({"model": forecast, "persistence": persistence(protocol)}, cut(codes(11, 25), protocol), protocol)
Path(sys.argv[1], f"{state.process_index}of{state.num_processes}").write_bytes(pickle.dumps(results))
"""


@pytest.mark.slow
def test_two_processes_count_every_window_once(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher in ([sys.executable], torchrun):
        command = [*launcher, str(tmp_path / "run.py"), str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    alone, *both = (np.load(tmp_path / name, allow_pickle=True) for name in ("0of1", "0of2", "1of2"))
    for results in both:
        assert results["cases"] == alone["cases"] and results["windows"] == 33
        for system, families in alone["scores"].items():
            for family, scores in families.items():
                for name, values in scores.items():
                    other = np.asarray(results["scores"][system][family][name])
                    if other.dtype.kind == "i":
                        np.testing.assert_array_equal(other, values, err_msg=f"{system} {family} {name}")
                    else:
                        np.testing.assert_allclose(other, values, rtol=1e-12, err_msg=f"{system} {family} {name}")
