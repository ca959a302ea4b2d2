"""Files of a user's own that are forecast: read by what they say, or refused by name."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from tiny import ROOT
from transformers import AutoFeatureExtractor
from typer.testing import CliRunner

from earthformer_hf.cli import app
from earthformer_hf.data import simulated
from earthformer_hf.data.inputs import holds_ocean, last_frames, ocean_input, rain_input, wettest_window
from earthformer_hf.data.sst_anomalies import sst_anomalies
from earthformer_hf.plotting import plot_ocean


LAT, LON = np.arange(-55.0, 65, 5), np.arange(0.0, 360, 5)


def ocean(months=14, first="2010-01"):
    """Anomalies that differ at every node and month; land is missing."""
    time = (np.datetime64(first, "M") + np.arange(months)).astype("datetime64[ns]")
    values = np.sin(np.arange(months))[:, None, None] + 0.01 * LAT[:, None] + 0.001 * LON
    values[:, :2] = np.nan
    return xr.Dataset({"ssta": (("time", "lat", "lon"), values)}, {"time": time, "lat": LAT, "lon": LON})


def read(tmp_path, dataset):
    dataset.to_netcdf(tmp_path / "mine.nc")
    _, events = ocean_input(tmp_path / "mine.nc")
    return events["test"][0]


@pytest.mark.parametrize("change", ["order", "time last", "descending", "dateline", "names"])
def test_the_ocean_is_read_by_the_names_of_its_dimensions(tmp_path, change):
    data = ocean()
    expected = read(tmp_path, data)
    changed = {
        "order": lambda: data.transpose("time", "lon", "lat"),
        "time last": lambda: data.transpose("lat", "lon", "time"),
        "descending": lambda: data.isel(lat=slice(None, None, -1)),
        "dateline": lambda: data.assign_coords(lon=(LON + 180) % 360 - 180).sortby("lon"),
        "names": lambda: data.rename(lat="latitude", lon="longitude"),
    }[change]()
    (tmp_path / "changed").mkdir()
    found = read(tmp_path / "changed", changed)
    np.testing.assert_array_equal(found["values"], expected["values"])
    np.testing.assert_array_equal(found["time"], expected["time"])
    assert found["geo"] == expected["geo"] and found["geo"]["lon"][0] == 95


def test_a_changed_order_is_said(tmp_path, caplog):
    read(tmp_path, ocean().transpose("lat", "lon", "time"))
    assert "('lat', 'lon', 'time') of `ssta` is put in the order ('time', 'lat', 'lon')" in caplog.text


@pytest.mark.parametrize(
    "numbers, units",
    [
        (600.5 + np.arange(14), {"units": "months since 1960-01-01"}),
        (15.0 + 30 * np.arange(14), {"units": "days since 2010-01-01", "calendar": "360_day"}),
    ],
)
def test_months_of_any_calendar(tmp_path, numbers, units):
    expected = read(tmp_path, ocean())
    dated = ocean().assign_coords(time=("time", numbers, units)).rename(time="T", lat="Y", lon="X")
    dated.to_netcdf(tmp_path / "dated.nc")
    assert holds_ocean(tmp_path / "dated.nc")
    _, events = ocean_input(tmp_path / "dated.nc")
    np.testing.assert_array_equal(events["test"][0]["time"], expected["time"])
    np.testing.assert_array_equal(events["test"][0]["values"], expected["values"])
    sst_anomalies(tmp_path / "dated.nc", tmp_path / "based.nc", (2010, 2010))
    _, events = ocean_input(tmp_path / "based.nc")  # the mean of a month over one year is that month
    assert events["test"][0]["time"][-1] == expected["time"][-1] and np.nanmax(events["test"][0]["values"][:12]) == 0
    np.testing.assert_allclose(
        events["test"][0]["values"][12:], expected["values"][12:] - expected["values"][:2], atol=1e-6
    )


def days(data):
    return data.assign_coords(time=np.datetime64("2010-01-01", "ns") + np.arange(14) * np.timedelta64(1, "D"))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda data: data.isel(time=slice(None, None, -1)), "2011-02-01 is followed by 2011-01-01"),
        (days, "2010-01-01 is followed by 2010-01-02"),
        (lambda data: data.isel(time=[0, 1, 2, 5, 6]), "2010-03-01 is followed by 2010-06-01"),
        (lambda data: data + 300, "within 12 degC of 0, it holds 29.*sst-anomalies IN OUT"),
        (lambda data: data.fillna(-999.0), "it holds -999 to .*a missing value that the file does not state"),
        (lambda data: data * np.nan, "no value of 2010-01 in the region of Nino3.4"),
        (lambda data: data.drop_vars("time"), "must have dates along 'time' of `ssta`, it has none"),
        (
            lambda data: data.coarsen(lat=2, lon=2).mean(),
            "lat of it must be -55, -50 .. 60, got 12 from -52.5 to 57.5",
        ),
        (lambda data: data.rename(ssta="sst"), "must hold `ssta` .*sst.*sst-anomalies IN OUT"),
    ],
)
def test_what_is_no_monthly_anomaly_is_refused_by_name(tmp_path, change, named):
    change(ocean()).to_netcdf(tmp_path / "mine.nc")
    with pytest.raises(ValueError, match=f"mine.nc.*{named}|{named}"):
        ocean_input(tmp_path / "mine.nc")


def test_the_ocean_model_sees_only_the_grid_points_that_it_knows(tmp_path):
    extractor = AutoFeatureExtractor.from_pretrained(ROOT / "model_cards/earthformer-sst-small")
    assert sum(row.count("1") for row in extractor.coverage) == 229  # of Kaplan's record
    event = read(tmp_path, ocean())
    values, observed = extractor.encode(event["values"])
    assert observed.sum() == 14 * 229 and (values[~observed] == 0).all()
    np.testing.assert_allclose(values[observed], 0.3 * event["values"][observed], rtol=1e-6)
    beyond = event["values"].copy()
    beyond[:, np.array([list(row) for row in extractor.coverage]) == "0"] += 5
    np.testing.assert_array_equal(extractor.encode(beyond)[0], values)
    channels = extractor.observed(event["values"][..., None])
    np.testing.assert_array_equal(channels[..., 0], observed)
    with pytest.raises(ValueError, match=r"on the grid of `coverage`, \(24, 48\), got the shape \(14, 24, 47\)"):
        extractor.observed(event["values"][..., 1:])
    for wrong in ([], ["01", "1"], ["0x"]):
        with pytest.raises(ValueError, match="`coverage` must be texts of 0 and 1"):
            type(extractor)(coverage=wrong)


def forecast(script, *options):
    command = [sys.executable, f"examples/{script}.py", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_coming_months_follow_the_last_of_the_record(tmp_path):
    ocean(30, "2019-01").to_netcdf(tmp_path / "my ocean (1).nc")
    result = forecast("forecast", "--input", tmp_path / "my ocean (1).nc")
    assert result.returncode == 0, result.stderr
    assert "no hindcast: it needs 38 months, there are 30" in result.stdout
    assert "229 grid points are used, which the model knows; " in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("202") and " .. " in line]
    assert rows[0].startswith("2021-07 .. 2021-09  ") and rows[-1].startswith("2022-06 .. 2022-08  ")
    assert len(rows) == 12


def test_files_are_told_apart_by_what_they_hold(tmp_path):
    ocean().to_netcdf(tmp_path / "a.nc")
    ocean().rename(ssta="rain").to_netcdf(tmp_path / "b.nc")
    assert holds_ocean(tmp_path / "a.nc") and not holds_ocean(tmp_path / "b.nc")
    assert not holds_ocean(tmp_path / "rain.npy")
    with pytest.raises(ValueError, match="c.nc"):
        holds_ocean(tmp_path / "c.nc")


def test_the_last_frames_keep_times_and_series():
    event = {"id": "a", "time": np.arange(5), "values": np.arange(5) * 2, "series": {"n": np.arange(5) * 3}}
    cut = last_frames(event, 2)
    assert [cut["time"].tolist(), cut["values"].tolist(), cut["series"]["n"].tolist()] == [[3, 4], [6, 8], [9, 12]]


def rain(minutes=2, spacing=3000.0, units="mm/h", factor=1.0):
    """Rain (26, 32, 32), projected in metres."""
    values = simulated.rain_events(1, length=26, size=32)[0]["values"] * factor
    time = np.datetime64("2020-06-01", "ns") + np.arange(26) * np.timedelta64(60 * minutes, "s")
    places = {name: (name, spacing * np.arange(32), {"units": "m"}) for name in "yx"}
    return xr.Dataset({"rate": (("time", "y", "x"), values, {"units": units})}, {"time": time} | places)


def test_rain_of_any_unit_and_kind_of_file_is_the_same(tmp_path):
    extractor = AutoFeatureExtractor.from_pretrained(ROOT / "model_cards/earthformer-radar-tiny")
    np.save(tmp_path / "a.npy", rain()["rate"].values)
    _, expected = rain_input(tmp_path / "a.npy", extractor)
    for units, factor in {"mm/h": 1.0, "mm hr-1": 1.0, "kg m-2 s-1": 1 / 3600, "mm": 2 / 60}.items():
        rain(units=units, factor=factor).to_netcdf(tmp_path / "b.nc")
        _, events = rain_input(tmp_path / "b.nc", extractor)
        np.testing.assert_allclose(events[0]["values"], expected[0]["values"], atol=1e-3)
        (tmp_path / "b.nc").unlink()
    one_minute = rain(minutes=1)
    one_minute.to_netcdf(tmp_path / "c.nc")
    _, events = rain_input(tmp_path / "c.nc", extractor)
    event, codes, minutes = wettest_window(events, extractor, 6, 4, (32, 32))
    assert event["geo"]["minutes"] == 1 and minutes[-1] == 8  # every other frame
    np.testing.assert_array_equal(codes, events[0]["values"][:20:2])


def test_rain_is_found_by_its_units_and_not_by_the_files_ending(tmp_path):
    extractor = AutoFeatureExtractor.from_pretrained(ROOT / "model_cards/earthformer-radar-tiny")
    alone = rain()
    alone.to_netcdf(tmp_path / "a.nc")
    _, expected = rain_input(tmp_path / "a.nc", extractor)
    beside = alone.assign(
        quality=alone["rate"].assign_attrs(units="1"), wind=alone["rate"].assign_attrs(units="m s-1")
    )
    for name in ("b.nc", "b.h5", "b"):
        beside.to_netcdf(tmp_path / name, engine="netcdf4")
        assert not holds_ocean(tmp_path / name)
        _, events = rain_input(tmp_path / name, extractor)
        np.testing.assert_array_equal(events[0]["values"], expected[0]["values"])
    alone.assign(amount=alone["rate"].assign_attrs(units="mm")).to_netcdf(tmp_path / "c.nc")
    with pytest.raises(ValueError, match=r"must be one of \['amount', 'rate'\], which .*c.nc holds"):
        rain_input(tmp_path / "c.nc", extractor)


def test_scan_times_may_jitter_and_a_lone_frame_is_left_out(tmp_path, caplog):
    extractor = AutoFeatureExtractor.from_pretrained(ROOT / "model_cards/earthformer-radar-tiny")
    data = rain()
    seconds = np.random.default_rng(0).integers(-4, 5, 26) * np.timedelta64(1, "s")
    late = data.isel(time=[25]).assign_coords(time=data.time[25:] + np.timedelta64(1, "h"))
    xr.concat([data.assign_coords(time=data.time + seconds).isel(time=slice(25)), late], "time").to_netcdf(
        tmp_path / "mine.nc"
    )
    _, events = rain_input(tmp_path / "mine.nc", extractor)
    assert [len(event["values"]) for event in events] == [25] and events[0]["geo"]["minutes"] == 2
    assert "mine.nc: 1 frames stand alone between gaps, and are left out" in caplog.text


@pytest.mark.parametrize(
    "change, named",
    [
        ({"minutes": 5}, "frames every 2 minutes, or a part of that, are needed, got 5 minutes"),
        ({"spacing": 1000.0}, "mine.nc must have a grid of 3 km, got 1 km"),
        ({"units": "degC"}, "mine.nc: the data must be rain in one of .*, got the units 'degC'"),
        ({"units": "", "factor": -1.0}, "mine.nc: the data must be rain in one of .*, got the units 'unknown'"),
        ({"factor": -1.0}, "mine.nc holds .* negative or infinite rates"),
    ],
)
def test_rain_that_the_model_does_not_know_is_refused_by_name(tmp_path, change, named):
    extractor = AutoFeatureExtractor.from_pretrained(ROOT / "model_cards/earthformer-radar-tiny")
    rain(**change).to_netcdf(tmp_path / "mine.nc")
    with pytest.raises(ValueError, match=named):
        _, events = rain_input(tmp_path / "mine.nc", extractor)
        wettest_window(events, extractor, 6, 4, (32, 32))


def test_the_plume_begins_at_the_last_observed_month():
    months = np.datetime64("2019-01", "M") + np.arange(24)
    observed, forecast = (months[:12], np.arange(12.0)), (months[14:], np.arange(10.0), np.arange(1.0, 11))
    geo = {"lat": LAT, "lon": LON}
    figure = plot_ocean({}, observed, forecast, {"a map": np.ones((24, 72))}, geo, "a test")
    (axis,) = (axis for axis in figure.axes if axis.get_title().startswith("the coming months"))
    assert axis.get_title() == "the coming months, 2020-02 to 2021-01"  # the first and last that the means hold
    drawn = {line.get_label(): line.get_ydata() for line in axis.lines}
    np.testing.assert_array_equal(drawn["forecast"], forecast[1])
    np.testing.assert_array_equal(drawn["observed"], observed[1])
    edges = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert (edges.min(), edges.max()) == (
        -1,
        19,
    ) and 11 in edges  # 0 - 1, 9 + 10, and the last observed, without width


# The command line


def cli(*command):
    return CliRunner().invoke(app, list(map(str, command)))


def test_options_are_spelt_either_way(tmp_path):
    for option in ("--data-dir", "--data_dir"):
        for command in (["data", "info", "folder"], ["evaluate", "--protocol", "radar-open"]):
            result = cli(*command, option, tmp_path / "nowhere")
            assert result.exit_code == 1 and "nowhere" in result.output and "No such option" not in result.output


def test_an_unknown_data_set_suggests_the_nearest():
    for command in (["data", "info", "open_radr"], ["data", "preview", "open_radr", "x.png"]):
        result = cli(*command)
        assert result.exit_code == 1 and "Did you mean 'open-radar'?" in result.output


@pytest.mark.slow
def test_a_traceback_is_shown_only_when_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("neither")
    command = [sys.executable, "-m", "earthformer_hf.cli", "data", "info", "folder", "--data-dir", str(tmp_path)]
    plain, debug = (
        subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT) for more in ([], ["--debug"])
    )
    assert plain.returncode == 1 and "Traceback" not in plain.stderr and "holds no file" in plain.stderr
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "holds no file" in debug.stderr
    np.save(tmp_path / "flat.npy", np.zeros((4, 4)))  # which the command finds that `forecast` starts
    plain = forecast("forecast", "--input", tmp_path / "flat.npy")
    assert plain.returncode == 1 and "Traceback" not in plain.stderr
    assert "`data` must be numbers (T, H, W)" in plain.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_passes_a_path_as_it_is(tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python"
    program.write_text('#!/bin/sh\nprintf "<%s>" "$@"\nexit ${CODE:-0}\n')
    program.chmod(0o755)
    (tmp_path / "installed").touch()
    options = [f"BIN={tmp_path / 'bin'}", f"STAMP={tmp_path / 'installed'}"]
    for path in ("a b/it's (1).nc", "plain.npy"):
        result = subprocess.run(
            ["make", "--no-print-directory", "forecast", *options, f"INPUT={path}"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert result.returncode == 0 and result.stdout == f"<examples/forecast.py><--input><{path}>"
    result = subprocess.run(
        ["make", "--no-print-directory", "forecast", *options], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout == "<examples/forecast.py>"
    failed = subprocess.run(
        ["make", "--no-print-directory", "forecast", *options, "CODE=1"], capture_output=True, text=True, cwd=ROOT
    )
    assert failed.returncode != 0 and "Error 1" in failed.stderr
