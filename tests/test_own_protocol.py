"""Own data under an own protocol: what is said of them comes from them, and what does not fit is refused."""

import json
import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
import xarray as xr
import yaml
from tiny import ROOT, tiny_model, tiny_pipeline
from typer.testing import CliRunner

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.cli import app
from earthformer_hf.data import Windows, load_dataset, simulated
from earthformer_hf.data.hosted import cached, prepare
from earthformer_hf.data.measures import DataFacts, canonical_units, spacing_of, step_of
from earthformer_hf.data.open_radar import OpenRadar
from earthformer_hf.data.rain import rain_coding
from earthformer_hf.evaluation import (
    PROTOCOLS,
    Protocol,
    baseline_forecaster,
    baselines,
    compare,
    data_extractor,
    load_protocol,
    protocol_windows,
    window_at,
)
from earthformer_hf.evaluation import evaluate as score
from earthformer_hf.evaluation.data_facts import facts_of


pysteps = pytest.mark.skipif(
    not baselines.is_pysteps_available(), reason="pysteps and OpenCV are not installed: the extra `optical-flow`"
)
OWN = {
    "dataset": "folder",
    "options": {"fractions": [0.5, 0, 0.5]},
    "context_length": 4,
    "prediction_length": 3,
    "scores": ["contingency", "errors"],
    "thresholds": [0.1, 1],
    "baselines": ["persistence"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def rain():
    """60 frames of 32 x 32 pixels, mm/h."""
    return simulated.rain_events(1, length=60, size=32, seed=3)[0]["values"]


def write_files(folder, rain, units="mm h-1", minutes=5, kilometers=1.0, first="2024-07-01T12:00"):
    """A file for each frame."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {
        name: (name, 1000 * kilometers * np.arange(size), {"units": "m"})
        for name, size in zip("yx", np.shape(rain)[1:])
    }
    for number, frame in enumerate(rain):
        time = [np.datetime64(first, "ns") + np.timedelta64(60 * minutes * number, "s")]
        values = (("time", "y", "x"), frame[None], {"units": units} if units else {})
        xr.Dataset({"rain": values}, {"time": time} | places).to_netcdf(folder / f"{number:03d}.nc")


def write_protocol(path, **changes):
    path.write_text(yaml.safe_dump(OWN | changes))
    return str(path)


def evaluate(tmp_path, *options, protocol="mine.yaml", data="data", rc=0, output="scores"):
    """The score file and the text of the command; or, if it ends with 1, its one line."""
    paths = ["--protocol", str(tmp_path / protocol), "--data-dir", str(tmp_path / data)]
    result = CliRunner().invoke(app, ["evaluate", *paths, "--output", str(tmp_path / output), *map(str, options)])
    assert result.exit_code == rc, result.output
    if rc:
        return result.output.strip().splitlines()[-1]
    return json.loads((tmp_path / output / "scores.json").read_text()), result.output


# -- the protocol -----------------------------------------------------------------------------------------------------


def test_the_template_is_a_protocol_and_is_not_overwritten(tmp_path):
    path = tmp_path / "radar.yaml"
    command = ["evaluate", "--new-protocol", str(path)]
    assert CliRunner().invoke(app, command).exit_code == 0
    protocol = load_protocol(path)
    assert (protocol.name, protocol.dataset, protocol.context_length) == ("radar", "folder", 4)
    assert protocol.thresholds == (0.1, 1, 5, 10) and protocol.options == {"fractions": (0.8, 0.1, 0.1)}
    stated = yaml.safe_load(path.read_text())
    assert {name for name in stated if getattr(protocol, name) != getattr(Protocol, name, None)} > {"name", "dataset"}
    path.write_text("name: kept")
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 1 and "is not overwritten" in refused.output and path.read_text() == "name: kept"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"treshold": [1]}, "unknown field 'treshold'; did you mean 'thresholds'"),
        ({"context_length": "four"}, "`context_length` must be a whole number, got 'four'"),
        ({"context_length": True}, "`context_length` must be a whole number, got True"),
        ({"context_length": 4.5}, "`context_length` must be a whole number, got 4.5"),
        ({"thresholds": 1}, "`thresholds` must be a list, got 1"),
        ({"thresholds": [1, "x"]}, "`thresholds` must be a number, got 'x'"),
        ({"options": ["a"]}, "`options` must be names with values"),
        ({"frame_sums": 1}, "`frame_sums` must be true or false"),
        ({"feature_extractor": {"unit": "mm/h"}}, "did you mean 'units'"),
        ({"options": {"patern": "*.nc"}}, "`options` of 'folder' must be of"),
        ({"scores": ["csi"]}, "`scores` must be of"),
        ({"thresholds": [5, 1]}, "`thresholds` must be one or more ascending values"),
        ({"physical_thresholds": [1]}, "knows no physical units"),
        ({"baselines": ["persistance"]}, "`baselines` must be of ('persistence'"),
        ({"baselines": []}, "has nothing to score"),
        ({"pools": [99]}, "`pools` of 'mine' must be at most 32 for maps of 32 x 32, got (99,)"),
        (
            {"independent": "source"},
            "`independent` of 'mine' must be 'id', a length of time such as '1D', or a key of",
        ),
        ({"scores": ["nino34"]}, "'nino34' is of monthly maps of 24 x 48"),
    ],
)
def test_what_no_protocol_can_hold_ends_in_one_line(tmp_path, rain, changes, message):
    write_files(tmp_path / "data", rain[:20])
    write_protocol(tmp_path / "mine.yaml", **changes)
    line = evaluate(tmp_path, rc=1)
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": ["ranks"]}, "`scores` must hold one of maps, which the baseline 'persistence' forecasts"),
        ({"thresholds": [float("nan")]}, "`thresholds` must be one or more ascending values, all finite, got [nan]"),
        ({"value_range": 0}, "`value_range` must be finite and above 0, got 0.0"),
        ({"physical_thresholds": [1]}, "knows no physical units"),
        ({"feature_extractor": {"unit": "mm/h"}}, "did you mean 'units'"),
        ({"feature_extractor": {"valid_range": 5}}, "`valid_range` must be two rising numbers, got 5"),
        ({"feature_extractor": {"valid_range": ["0", "300"]}}, "`valid_range` must be two rising numbers, got ('0',"),
        ({"feature_extractor": {"missing_value": "-1"}}, "`missing_value` must be a number, got '-1'"),
    ],
)
def test_a_value_that_no_score_can_be_taken_with_is_refused_with_its_file(tmp_path, changes, message):
    path = write_protocol(tmp_path / "mine.yaml", **changes)
    with pytest.raises(ValueError, match=re.escape(f"`protocol`: {path}: ") + ".*" + re.escape(message)):
        load_protocol(path)


def test_files_that_hold_no_protocol(tmp_path):
    with pytest.raises(ValueError, match="--new-protocol .* writes a template"):
        load_protocol(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("dataset: folder\n")
    with pytest.raises(ValueError, match="must state context_length, prediction_length, scores"):
        load_protocol(tmp_path / "a.yaml")
    for text, message in (("[1]", "must hold the fields"), ("a: [", "a.yaml")):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_protocol(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(OWN) + "missing: x\nwet_threshold: 1\noptions:\n")
    protocol = load_protocol(tmp_path / "a.yaml")
    assert protocol.name == "a" and protocol.wet_threshold == 1.0 and protocol.options == {}


def test_the_published_hashes_stay():
    """Score files carry them; a later field counts once it holds something."""
    for name, stored in (("earthformer-radar-tiny", "radar-open"), ("earthformer-sst-small", "sst-kaplan")):
        document = json.loads((ROOT / "model_cards" / name / "scores.json").read_text())
        assert document["protocol_hash"] == PROTOCOLS[stored].hash
    stated = replace(PROTOCOLS["radar-open"], feature_extractor={"units": "mm/h"})
    assert stated.hash != PROTOCOLS["radar-open"].hash


# -- what the data say ------------------------------------------------------------------------------------------------


def times(text, count, step):
    return np.datetime64(text) + step * np.arange(count)


def test_time_steps_are_those_of_the_times():
    assert step_of(times("2024-01-01T00:00", 5, np.timedelta64(5, "m")), {}) == "5m"
    assert step_of(times("2024-01-01T00:00", 5, np.timedelta64(5, "m")), {"minutes": 2}, None, 2) == "10m"
    assert step_of(times("2024-01-01T00:00", 5, np.timedelta64(90, "s")), {}) == "90s"
    assert step_of(times("2024-01", 30, np.timedelta64(1, "M")).astype("datetime64[s]"), {}) == "1M"
    assert step_of(times("2024-01-01", 5, np.timedelta64(5, "D")), {}) == "5D"
    jitter = np.array([0, 31, -17, 44, -40, 12, 5, -3]).astype("timedelta64[s]")
    assert step_of(times("2024-01-01T00:00:00", 8, np.timedelta64(300, "s")) + jitter, {}) == "5m"
    # of a few frames alone it would be the mean of two
    few = times("2024-01-01T00:00:00", 3, np.timedelta64(300, "s")) + np.array([40, -35, 20]).astype("timedelta64[s]")
    assert step_of(few, {}, np.timedelta64(300, "s")) == "5m"
    assert step_of(times("2024-01-01T00:00", 5, np.timedelta64(10, "m")), {}, np.timedelta64(300, "s")) == "10m"
    undated = np.full(4, np.datetime64("NaT", "s"))
    assert step_of(undated, {"minutes": 10}) == "10m" and step_of(undated, {}) == "unknown"


def test_grid_spacings_are_those_of_the_coordinates():
    metres = {"y": [3000, 2000, 1000], "x": [0, 1000, 2000], "y_units": "m"}
    assert spacing_of(metres) == "1 km" and spacing_of(metres | {"y_units": "km"}) == "1000 km"
    assert spacing_of({"y": [20, 10], "x": [0, 10], "y_units": "m"}) == "10 m"
    assert spacing_of({"lat": np.arange(-5.0, 10, 5), "lon": np.arange(0.0, 15, 5)}) == "5 degrees"
    assert spacing_of({"y": [1.0, 0.99], "x": [0, 0.01], "y_name": "latitude"}) == "0.01 degrees"
    assert spacing_of({"y": [0, 1], "x": [0, 1], "y_name": "y"}) == spacing_of({}) == "unknown"
    assert DataFacts(grid_spacing="500 m").kilometers == 0.5 and DataFacts(time_step="1h").minutes == 60
    assert DataFacts(grid_spacing="0.01 degrees").kilometers == pytest.approx(1.112)
    assert DataFacts(time_step="1M").minutes is None is DataFacts().kilometers


def test_units_have_one_spelling():
    assert {canonical_units(text) for text in ("mm/h", "mm h-1", "mm hr-1", "MM/H", "mm/hour")} == {"mm/h"}
    assert canonical_units("kg m-2 s-1") == "mm/s" and canonical_units("DBZ") == "dBZ"
    assert canonical_units("furlong") == "furlong"


@pytest.mark.parametrize(
    "units, stored, rate",
    [
        ("mm h-1", 2.5, 2.5),
        ("kg m-2 s-1", 0.001, 3.6),
        ("m s-1", 1e-6, 3.6),
        ("mm", 0.5, 6.0),  # in 5 minutes
        ("dBZ", 10 * np.log10(200), 1.0),
    ],
)
def test_rain_rates_and_stored_values_are_inverse(units, stored, rate):
    coding = rain_coding(EarthformerFeatureExtractor(), DataFacts(units, "5m"))
    values = np.array([stored], "float32")
    np.testing.assert_allclose(coding.to_rain(values), rate, rtol=1e-6)
    np.testing.assert_allclose(coding.from_rain(coding.to_rain(values), -32.0), values, rtol=1e-6)


def test_rain_by_a_table_of_codes():
    table = {"physical_units": "mm/h", "physical_table": [[0, 10, 20], [0, 1, 100]]}
    coding = rain_coding(EarthformerFeatureExtractor(**table), DataFacts("1"))
    assert coding.to_rain(np.array([5, 20])).tolist() == [0.5, 100]
    assert coding.from_rain(np.array([0.52, 100.0]), 0).tolist() == [5, 20]  # whole codes
    with pytest.raises(ValueError, match="must be rain in one of .* got the units 'degC'"):
        rain_coding(EarthformerFeatureExtractor(), DataFacts("degC"))


# -- own files --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pysteps
def test_every_baseline_and_figure_of_own_files(tmp_path, rain):
    write_files(tmp_path / "data", rain)
    names = ["persistence", "last clear value", "extrapolation", "s-prog", "anvil", "steps", "dressed persistence"]
    families = ["contingency", "errors", "ssim", "fss", "spectrum", "ensemble", "ranks", "probabilities"]
    write_protocol(tmp_path / "mine.yaml", baselines=names, scores=families, neighbourhoods=[1, 5], pools=[4])
    options = ("--max-windows", "3", "--ensemble_size", "3")  # both spellings
    document, text = evaluate(tmp_path, *options)
    assert document["data"] == {"units": "mm h-1", "time_step": "5m", "grid_spacing": "1 km"}
    assert list(document["scores"])[:7] == names and document["windows"] == 3
    assert set(document["scores"]["steps"]) >= {"ensemble", "ranks", "probabilities"}
    assert "by lead time in min" in text and "1 mm/h" in text
    figures = {path.stem for path in (tmp_path / "scores").glob("*.png")}
    assert figures == {"cases", "rank_histogram", "reliability", "scores_by_lead", "spectrum"}

    windows = protocol_windows(load_protocol(tmp_path / "mine.yaml"), tmp_path / "data")
    frames = [windows.raw(index) for index in (0, 12, 23)]  # 30 frames of the test split have 24 windows
    error = np.mean([np.square(frame[3] - frame[4:], dtype="float64") for frame in frames])
    assert document["scores"]["persistence"]["summary"]["mse"] == pytest.approx(error, rel=1e-5)
    assert document["scores"]["last clear value"]["summary"] == document["scores"]["persistence"]["summary"]
    moved = [baselines.extrapolation(frame[:4], 3)[0].astype("float32") for frame in frames]
    hits = [sum(((x >= t) & (y[4:] >= t)).sum() for x, y in zip(moved, frames)) for t in (np.float32(0.1), 1)]
    assert np.sum(document["scores"]["extrapolation"]["contingency"]["hits"], axis=1).tolist() == hits


@pysteps
@pytest.mark.parametrize("minutes, kilometers", [(5, 1.0), (10, 0.5)])
def test_step_and_spacing_of_the_data_reach_the_noise_of_steps(tmp_path, rain, minutes, kilometers):
    write_files(tmp_path / "data", rain[:24], minutes=minutes, kilometers=kilometers)
    protocol = load_protocol(write_protocol(tmp_path / "mine.yaml", options={"fractions": [0, 0, 1]}, frame_stride=2))
    window = window_at(protocol_windows(protocol, tmp_path / "data"), 5, data_extractor(protocol))
    forecast = baseline_forecaster("steps", protocol, lambda split: None, ensemble_size=2)(window)
    stated = {"minutes": 2 * minutes, "kilometers": kilometers, "seed": 5}
    np.testing.assert_array_equal(forecast, baselines.steps_ensemble(window.past, 3, 2, **stated))
    other = baselines.steps_ensemble(window.past, 3, 2, **(stated | {"minutes": 2, "kilometers": 3}))
    assert not np.array_equal(forecast, other)


def test_a_baseline_that_cannot_work_is_refused_by_name(tmp_path, rain):
    write_files(tmp_path / "data", rain[:30], units="degC")
    write_files(tmp_path / "bare", rain[:30], units="")
    write_protocol(tmp_path / "test.yaml", baselines=["dressed persistence"], options={"fractions": [0, 0, 1]})
    line = evaluate(tmp_path, protocol="test.yaml", rc=1)
    assert "'dressed persistence' cannot work on these data" in line and "train" in line
    write_protocol(tmp_path / "ocean.yaml", baselines=["seasonal ridge"], scores=["nino34"])
    assert "'seasonal ridge' cannot work on these data" in evaluate(tmp_path, protocol="ocean.yaml", rc=1)
    if not baselines.is_pysteps_available():
        return
    write_protocol(tmp_path / "mine.yaml", baselines=["persistence", "s-prog"])
    assert "'s-prog' cannot work on these data: the data must be rain" in evaluate(tmp_path, rc=1)
    assert "got the units 'unknown'" in evaluate(tmp_path, data="bare", rc=1)
    write_protocol(tmp_path / "mine.yaml", baselines=["s-prog"], feature_extractor={"units": "mm/h"})
    document, _ = evaluate(tmp_path, "--max-windows", "1", data="bare")
    assert document["data"]["units"] == "mm/h"
    write_protocol(tmp_path / "mine.yaml", baselines=["anvil"], context_length=3, feature_extractor={"units": "mm/h"})
    assert "it needs a context of 4 frames, got 3" in evaluate(tmp_path, data="bare", rc=1)


def test_missing_values_are_what_the_events_say(tmp_path, rain):
    """NaN and the stated missing value enter no score; an outage makes windows that count for nothing."""
    values = rain[:24].copy()
    values[:, :4] = -1
    values[16:20, 10:] = np.nan
    write_files(tmp_path / "data", values)
    stated = {"missing_value": -1, "valid_range": [0, 300]}
    write_protocol(tmp_path / "mine.yaml", options={"fractions": [0, 0, 1]}, feature_extractor=stated)
    document, _ = evaluate(tmp_path)
    windows = protocol_windows(load_protocol(tmp_path / "mine.yaml"), tmp_path / "data")
    pixels = [np.isfinite(w[4:, 4:]).sum((1, 2)) for w in map(windows.raw, range(len(windows)))]
    assert document["scores"]["persistence"]["errors"]["pixels"] == np.sum(pixels, axis=0).tolist()

    values[12:16, 4:] = np.nan
    values[12:16, :4] = -1  # nothing observed, as a window of them shows
    write_files(tmp_path / "outage", values)
    document, text = evaluate(tmp_path, data="outage")
    windows = protocol_windows(load_protocol(tmp_path / "mine.yaml"), tmp_path / "outage")
    seen = [np.isfinite(w[:, 4:]) for w in map(windows.raw, range(len(windows)))]
    empty = sum(not w[:4].any() or not w[4:].any() for w in seen)
    assert document["unobserved_windows"] == empty == 3
    assert "3 of 18 windows have no observed context or future" in text
    pixels = [w[4:].sum((1, 2)) * w[:4].any() for w in seen]
    assert document["scores"]["persistence"]["errors"]["pixels"] == np.sum(pixels, axis=0).tolist()


def test_files_that_cannot_be_read_are_left_out_when_asked(tmp_path, rain):
    write_files(tmp_path / "data", rain[:30])
    (tmp_path / "data/zz.nc").write_bytes(b"no file")
    write_protocol(tmp_path / "mine.yaml")
    assert "zz.nc" in evaluate(tmp_path, rc=1)
    write_protocol(tmp_path / "mine.yaml", options=OWN["options"] | {"keep_bad": True})
    assert evaluate(tmp_path)[0]["windows"] == 9


def test_prepared_and_cached_data_score_as_their_files(tmp_path, rain):
    write_files(tmp_path / "data", rain[:30])
    write_protocol(tmp_path / "mine.yaml")
    document, _ = evaluate(tmp_path)
    options = {"fractions": (0.5, 0, 0.5)}
    tables = load_dataset("folder", tmp_path / "data", **options)
    prepare(tables, tmp_path / "prepared")
    write_protocol(tmp_path / "prepared.yaml", dataset=str(tmp_path / "prepared"), options={})
    hosted, _ = evaluate(tmp_path, protocol="prepared.yaml")
    protocol = load_protocol(tmp_path / "mine.yaml")
    windows = Windows(cached(tables["test"], tmp_path / "arrays"), data_extractor(protocol).encode, 4, 3)
    forecasters = {"persistence": baseline_forecaster("persistence", protocol, lambda split: windows)}
    results = score(forecasters, windows, protocol)
    for other in (hosted, results):
        assert other["data"] == document["data"] and other["scored"] == document["scored"]
        assert other["scores"]["persistence"]["summary"]["mse"] == pytest.approx(
            document["scores"]["persistence"]["summary"]["mse"], rel=1e-5
        )
    write_protocol(tmp_path / "prepared.yaml", dataset=str(tmp_path / "prepared"))
    assert "`options` are those of a source" in evaluate(tmp_path, protocol="prepared.yaml", rc=1)


def test_a_split_that_is_too_short_is_named(tmp_path, rain):
    write_files(tmp_path / "data", rain[:10])
    write_protocol(tmp_path / "mine.yaml")
    line = evaluate(tmp_path, rc=1)
    assert "'test' of folder: Windows: `events` must hold 7 frames or more, the longest has 5" in line
    assert "'test' holds 5 frames in 1 events; `fractions` or `dates` may give it more" in line


def test_tiles_of_one_record_are_one_independent_event(tmp_path, rain):
    """As tiles of a record are of the same storms, draws of them would make an interval that is too narrow."""
    (tmp_path / "data").mkdir()
    for day in range(2):
        time = times(f"2024-07-0{day + 1}T12:00", 7, np.timedelta64(300, "s")).astype("datetime64[ns]")
        values = {"rain": (("time", "y", "x"), rain[7 * day :][:7])}
        xr.Dataset(values, {"time": time}).to_netcdf(tmp_path / f"data/{day}.nc")
    tiled = {"fractions": [0, 0, 1], "tile": [16, 16]}
    protocol = load_protocol(write_protocol(tmp_path / "mine.yaml", options=tiled))
    windows = protocol_windows(protocol, tmp_path / "data")
    forecasters = {"persistence": baseline_forecaster("persistence", protocol, lambda split: None)}
    for independent in ("id", "file", "1D"):
        results = score(forecasters, windows, replace(protocol, independent=independent))
        assert results["windows"] == len(results["scores"]["persistence"]["regions"]) == 8
        assert results["independent_events"] == 2


def test_a_model_needs_a_score_of_what_it_forecasts(tmp_path, rain):
    write_files(tmp_path / "data", rain[:30])
    write_protocol(tmp_path / "mine.yaml", scores=["ranks"], baselines=[])
    save_model(tmp_path / "model", **FITS)
    line = evaluate(tmp_path, "--model", tmp_path / "model", rc=1)
    assert "`scores` must hold one of maps, which the model" in line


def test_files_of_several_time_steps_are_refused(tmp_path, rain):
    write_files(tmp_path / "data/a", rain[:12])
    write_files(tmp_path / "data/b", rain[:12], minutes=10, first="2024-07-02T00:00")
    write_protocol(tmp_path / "mine.yaml", options={"fractions": [0, 0, 1]}, context_length=1, prediction_length=1)
    (tmp_path / "one.yaml").write_text((tmp_path / "mine.yaml").read_text())
    windows = protocol_windows(load_protocol(tmp_path / "mine.yaml"), tmp_path / "data/a")
    assert facts_of(windows, load_protocol(tmp_path / "mine.yaml")).time_step == "5m"
    events = [
        {"id": name, "time": times("2024-01-01T00:00", 4, np.timedelta64(step, "m")), "values": rain[:4], "geo": {}}
        for name, step in (("one", 5), ("two", 10))
    ]
    both = Windows(events, EarthformerFeatureExtractor().encode, 1, 1)
    with pytest.raises(ValueError, match="must have one time step, got 5m in 'one' and 10m in 'two'"):
        facts_of(both, load_protocol(tmp_path / "mine.yaml"))


def test_open_radar_at_five_minutes_and_one_kilometre(tmp_path):
    """Step and spacing are those of the file, not of the source's usual one."""
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data/radar.h5", "w") as file:
        file["vil_lut"] = np.arange(256).astype("uint8")
        for day in range(2):
            group = file.create_group(f"knmi_{day}")
            group.attrs.update(tile_size=16, dt_minutes=5, pixel="native")
            group["code"] = np.random.default_rng(day).integers(0, 200, (20, 16, 16)).astype("uint8")
            stamps = times(f"2021-02-0{day + 1}T20:00", 20, np.timedelta64(5, "m"))
            group["time"] = np.array([str(stamp).encode() + b"Z" for stamp in stamps])
            group["tiles_test"] = np.zeros((1, 2), "int32")
    options = {"file": "radar.h5", "sources": ["knmi"]}
    write_protocol(tmp_path / "mine.yaml", dataset="open-radar", options=options, thresholds=[16, 74])
    document, text = evaluate(tmp_path)
    assert document["data"] == {"units": "1", "time_step": "5m", "grid_spacing": "1 km"}
    row = text.partition("mean squared error, by lead time in min")[2].split("|")[2:5]
    assert [int(cell) for cell in row] == [5, 10, 15]
    assert OpenRadar.FACTS.time_step == "2m"  # which said 2, 4, 6


# -- models -----------------------------------------------------------------------------------------------------------


def save_model(folder, **extractor):
    tiny_model(context_length=4, prediction_length=3, image_size=(32, 32), stem_strides=[1, 2]).save_pretrained(folder)
    EarthformerFeatureExtractor(scale=0.1, **extractor).save_pretrained(folder)


FITS = {"units": "mm/h", "time_step": "5m", "grid_spacing": "1 km", "fill_value": 0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, None),
        ({"units": "mm hr-1", "time_step": "300s", "grid_spacing": "1.05 km"}, None),
        ({"units": "unknown", "time_step": "unknown", "grid_spacing": "unknown"}, None),
        ({"units": "dBZ"}, "its units 'dBZ' and not 'mm h-1'"),
        ({"time_step": "2m"}, "its time step '2m' and not '5m'"),
        ({"time_step": "1M"}, "its time step '1M' and not '5m'"),
        ({"grid_spacing": "3 km"}, "its grid spacing '3 km' and not '1 km'"),
        ({"grid_spacing": "1.2 km", "units": "K"}, "its units 'K' and not 'mm h-1', its grid spacing '1.2 km'"),
    ],
)
def test_a_model_of_other_numbers_is_refused_before_it_forecasts(tmp_path, rain, caplog, changes, message):
    write_files(tmp_path / "data", rain[:30])
    write_protocol(tmp_path / "mine.yaml")
    save_model(tmp_path / "model", **(FITS | changes))
    options = ("--model", tmp_path / "model", "--max-windows", "2")
    if message is None:
        document, _ = evaluate(tmp_path, *options)
        assert list(document["scores"]) == ["model", "persistence"]
    else:
        assert message in evaluate(tmp_path, *options, rc=1)
        assert not (tmp_path / "scores").exists()


def test_nothing_is_forecast_without_windows_or_members(tmp_path, rain):
    write_files(tmp_path / "data", rain[:30])
    write_protocol(tmp_path / "mine.yaml")
    assert "`--max-windows` must be at least 1, got 0" in evaluate(tmp_path, "--max_windows", "0", rc=1)
    write_protocol(tmp_path / "dressed.yaml", baselines=["dressed persistence"])
    line = evaluate(tmp_path, "--ensemble-size", "1", protocol="dressed.yaml", rc=1)
    assert "`--ensemble-size` must be at least 2 for the baseline 'dressed persistence', got 1" in line
    pipeline = tiny_pipeline()
    pipeline.register_modules(feature_extractor=EarthformerFeatureExtractor(**FITS))
    pipeline.save_pretrained(tmp_path / "pipeline")
    line = evaluate(tmp_path, "--ensemble-size", "1", "--model", tmp_path / "pipeline", rc=1)
    assert "`--ensemble-size` must be at least 2 for the pipeline" in line


# -- score files side by side -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_scored_on_other_data_do_not_compare(tmp_path, rain):
    write_protocol(tmp_path / "mine.yaml", options={"fractions": [0, 0, 1]})
    write_files(tmp_path / "data", rain[:20])
    changed = rain[:20].copy()
    changed[15, 3, 3] += 1e-3
    write_files(tmp_path / "values", changed)
    write_files(tmp_path / "later", rain[:20], first="2024-07-02T12:00")
    write_files(tmp_path / "coarse", rain[:20], kilometers=2.0)
    write_files(tmp_path / "longer", rain[:21])
    (tmp_path / "named").mkdir()
    for path in (tmp_path / "data").iterdir():
        (tmp_path / "named" / f"1{path.name}").write_bytes(path.read_bytes())
    for name in ("data", "values", "later", "coarse", "longer", "named"):
        evaluate(tmp_path, data=name, output=name + "-scores")
    file = {name: tmp_path / f"{name}-scores/scores.json" for name in ("data", "values", "later", "coarse", "longer")}
    assert "protocol mine, 14 windows" in compare([file["data"], file["data"]])
    for name, message in (
        ("values", r"other data were scored: 1 events with other values \(000.nc:0\)"),
        ("later", r"1 events at other times \(000.nc:0\)"),
        ("coarse", "grid_spacing 1 km and 2 km"),
        ("longer", "14 and 15 windows"),
    ):
        with pytest.raises(ValueError, match=message):
            compare([file["data"], file[name]])
    with pytest.raises(ValueError, match=r"only in the first \(000.nc:0\); 1 events only in the second \(1000.nc:0\)"):
        compare([file["data"], tmp_path / "named-scores/scores.json"])


def test_older_score_files_still_compare(tmp_path):
    stored = json.loads((ROOT / "model_cards/earthformer-sst-small/scores.json").read_text())
    later = ("scored", "data", "fallbacks", "headline_thresholds", "unobserved_windows")
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({name: value for name, value in stored.items() if name not in later}))
    text = compare([path, path])
    assert "0.5949" in text and "without a digest of the data; that these are the same is not known" in text
    assert "no paired differences" in text
