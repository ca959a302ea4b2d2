"""Figures of forecasts: what they show is what the dataset holds."""

import io
import sys
from types import ModuleType, SimpleNamespace

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from test_forecasting import extractor, field, persistence, rain_dataset
from typer.testing import CliRunner

from earthformer_hf.cli import app
from earthformer_hf.cuboid import DILATED, Cuboid, cuboid_partition, cuboid_regions, padding_to, roll_grid
from earthformer_hf.data.inputs import last_time
from earthformer_hf.data.open_sst import nino34, three_month_means
from earthformer_hf.forecasting import observe, observed_maps, open_forecast
from earthformer_hf.plotting import (
    animate_forecast,
    cuboids_of_cells,
    lead_labels,
    plot_by_lead,
    plot_cuboids,
    plot_events,
    plot_forecast,
    plot_rank_histogram,
    plot_sequence,
    plot_spectrum,
    sequence_row,
)
from earthformer_hf.plotting.canvas import columns_of, time_labels, within_coverage, wrapped
from earthformer_hf.plotting.coasts import coastlines, natural_earth
from earthformer_hf.plotting.fields import read_map
from earthformer_hf.plotting.ocean import nino34_means


REFERENCE = np.datetime64("2020-06-01T23:30", "ns")
LEADS = np.arange(1, 16) * np.timedelta64(4, "m").astype("timedelta64[ns]")
RAIN = {"units": "mm h-1"}


def rain(members=4, thresholds=(10.0, 1.0)):
    """An hour of rain on 12 x 18 km; a corner was not observed, and the west is not reliable."""
    values = np.random.default_rng(0).gamma(0.4, 8, (members, len(LEADS), 12, 18)).astype("float32")
    values[..., 8:, :6] = np.nan
    places = {name: (name, 1000.0 * np.arange(count), {"units": "m"}) for name, count in (("y", 12), ("x", 18))}
    times = {"lead_time": LEADS, "time": ("lead_time", REFERENCE + LEADS), "forecast_reference_time": REFERENCE}
    dims = ("realization", "lead_time", "y", "x")
    dataset = xr.Dataset({"rainfall_rate": (dims, values, RAIN)}, times | places).isel(y=slice(None, None, -1))
    flag = np.zeros((len(LEADS), 12, 18), "int8")
    flag[:, 5:, :5] = 1
    dataset = dataset.assign(quality_flag=(dims[1:], flag)).assign_attrs(model_id="a-model")
    if thresholds:
        reached = np.stack([np.where(np.isnan(values), np.nan, values >= threshold) for threshold in thresholds])
        dataset["exceedance_probability"] = (("threshold", *dims[1:]), reached.mean(1))
        dataset["exceedance_probability_at_any_time"] = (("threshold", "y", "x"), reached.max(2).mean(1))
        dataset["threshold"] = ("threshold", list(thresholds), RAIN)
    return dataset


def observed(dataset, first=-6, last=15, step=4):
    """Frames every `step` minutes from before the forecast until after its end."""
    time = REFERENCE + np.arange(first, last + 1) * np.timedelta64(60 * step, "s")
    values = np.arange(len(time), dtype="float32")[:, None, None] + np.zeros((12, 18), "float32")
    places = {name: dataset[name] for name in ("y", "x")}
    return xr.DataArray(values, {"time": time} | places, ("time", "y", "x"), attrs={"units": "mm/h"})


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.images]


def picture(figure, axis):
    """Pixels of a panel, (h, w, 3)."""
    figure.savefig(buffer := io.BytesIO(), dpi=100)
    whole = np.asarray(Image.open(buffer).convert("RGB"))
    box = axis.get_window_extent()
    top = len(whole) - int(box.y1)
    return whole[top + 2 : len(whole) - int(box.y0) - 2, int(box.x0) + 3 : int(box.x1) - 2]


def test_a_forecast_is_shown_with_valid_times_and_leads(tmp_path):
    dataset = rain()
    dataset.to_netcdf(tmp_path / "f.nc")
    figure = plot_forecast(xr.open_dataset(tmp_path / "f.nc"), observed(dataset))
    forecasts = [
        "23:42, +12 min",
        "23:54, +24 min",
        "2 Jun 00:06, +36 min",
        "2 Jun 00:18, +48 min",
        "2 Jun 00:30, +60 min",
    ]
    whole = "until 2 Jun 00:30"
    expected = ["23:06, -24 min", "23:18, -12 min", "23:30, 0 min"]
    expected += 4 * [*forecasts, f"highest {whole}"] + forecasts + 2 * [*forecasts, f"at any time {whole}"]
    assert titles(figure) == expected
    labels = [axis.get_ylabel() for axis in figure.axes]
    rows = [
        "observed",
        "mean",
        "member 1",
        "member 2",
        "member 3",
        "observed afterwards",
        "10 mm/h or more",
        "1 mm/h or more",
    ]
    assert [label.replace("\n", " ") for label in labels if label][: len(rows)] == rows
    assert labels[-2:] == ["rain rate, mm/h", "chance, %"]
    assert figure.get_suptitle() == "Rain rate, forecast by a-model from 1 June 2020, 23:30 UTC, 4 members"
    drawn = [axis.images[0].get_array().filled(np.nan) for axis in figure.axes if axis.images]
    mean = dataset["rainfall_rate"].mean("realization")
    np.testing.assert_allclose(drawn[3 + 1], mean[5], rtol=1e-6)
    np.testing.assert_allclose(drawn[3 + 5], mean.max("lead_time"), rtol=1e-6)
    assert drawn[3 + 4 * 6 + 2].max() == 6 + 9  # what was observed 36 minutes later
    ever = 100 * dataset["exceedance_probability_at_any_time"][0]
    np.testing.assert_allclose(drawn[3 + 4 * 6 + 5 + 5], ever)


def test_missing_is_hatched_grey_dry_is_white_and_unreliable_is_dotted():
    dataset = rain(members=1, thresholds=()).isel(realization=0)
    dataset["rainfall_rate"] = xr.where(dataset["rainfall_rate"].isnull(), np.nan, 0).assign_attrs(RAIN)
    figure = plot_forecast(dataset, lead="8m")
    (axis,) = [axis for axis in figure.axes if axis.images]
    pixels = picture(figure, axis).astype(int)
    rows, columns = (len(pixels) / 12, len(pixels[0]) / 18)

    def part(top, bottom, left, right):
        return pixels[int(top * rows) + 2 : int(bottom * rows) - 2, int(left * columns) + 2 : int(right * columns) - 2]

    missing, dry, doubtful = part(0, 4, 0, 6), part(0, 4, 7, 18), part(7, 12, 0, 4)
    assert (dry == 255).all()
    assert (missing < 255).all() and (np.ptp(missing, axis=-1) == 0).all() and missing.std() > 5
    assert 0.02 < (doubtful.min(-1) < 200).mean() < 0.3
    assert [text.get_text() for text in figure.legends[0].get_texts()][0] == "not observed"


def test_one_time_shows_all_members_and_its_chances():
    dataset = rain(members=6)
    figure = plot_forecast(dataset, observed(dataset), time="2020-06-01T23:38")
    members = [f"member {number}" for number in range(1, 7)]
    assert titles(figure) == ["observed", "mean", *members, "10 mm/h or more", "1 mm/h or more"]
    assert figure.get_suptitle().endswith("\nvalid 23:38, +8 min")
    assert titles(plot_forecast(dataset, lead="8m")) == titles(figure)[1:]
    sixth = [axis for axis in figure.axes if axis.get_title() == "member 6"][0].images[0].get_array()
    np.testing.assert_array_equal(sixth, dataset["rainfall_rate"][5, 1])


def test_one_threshold_shows_its_chances_alone():
    figure = plot_forecast(rain(), threshold=10)
    assert titles(figure)[-2:] == ["2 Jun 00:30, +60 min", "at any time until 2 Jun 00:30"]
    assert len(titles(figure)) == 6 and figure.get_suptitle().endswith("chance of 10 mm/h or more")
    near = rain()
    near["exceedance_probability"].attrs["neighbourhood"] = "10 km"
    labels = [axis.get_ylabel() for axis in plot_forecast(near).figure.axes]
    assert "10 mm/h or more\nwithin 10 km" in labels
    assert plot_forecast(near, threshold=10).get_suptitle().endswith("chance of 10 mm/h or more within 10 km")


def test_chances_alone_and_forecasts_without_dates_or_places_are_drawn(tmp_path):
    chances = rain().drop_vars("rainfall_rate")
    figure = plot_forecast(chances)
    labels = [axis.get_ylabel().replace("\n", " ") for axis in figure.axes]
    assert [label for label in labels if label] == ["10 mm/h or more", "1 mm/h or more", "chance, %"]
    animate_forecast(chances.isel(lead_time=slice(0, 2)), tmp_path / "c.gif", observed(chances))
    assert Image.open(tmp_path / "c.gif").n_frames == 2
    bare = rain(members=2, thresholds=()).drop_vars(["time", "forecast_reference_time", "x", "y"])
    bare = bare.isel(lead_time=slice(0, 3)).assign_attrs(model_id="a").rename(rainfall_rate="level")
    bare["level"].attrs["units"] = "m"
    past = xr.DataArray(np.ones((4, 12, 18)), dims=("time", "y", "x"))
    figure = plot_forecast(bare, past)
    assert titles(figure)[:6] == ["-8 min", "-4 min", "0 min", "+4 min", "+8 min", "+12 min"]
    assert figure.get_suptitle() == "Level, forecast by a, 2 members" and figure.axes[-1].get_ylabel() == "level, m"


@pytest.mark.parametrize(
    "options, named",
    [
        ({"threshold": 5}, "`threshold`: the forecast has the chances of 10, 1, got 5"),
        ({"lead": "5m"}, r"`lead`: the forecast has 23:34, \+4 min, .*; got '5m'"),
        ({"time": "2020-06-02"}, "`time`: the forecast has 23:34"),
        ({"time": "2020-06-01T23:38", "lead": "8m"}, "say the same"),
        ({"colors": "jet"}, r"`colors` must be one of \('rain', 'colour-blind'\), got 'jet'"),
        ({"observations": observed(rain()).assign_attrs(units="dBZ")}, "in mm/h, as the forecast, got dBZ"),
        ({"observations": np.zeros((3, 12, 18))}, "`observations` must be an xarray.DataArray"),
    ],
)
def test_what_a_forecast_does_not_hold_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        plot_forecast(rain(), **options)


def test_what_is_no_forecast_is_refused():
    with pytest.raises(ValueError, match="must be a forecast.*got Dataset of .'rain'."):
        plot_forecast(observed(rain()).to_dataset(name="rain"))
    several = rain().expand_dims(forecast_reference_time=[REFERENCE, REFERENCE + LEADS[0]])
    with pytest.raises(ValueError, match="from several times; choose one"):
        plot_forecast(several)


def test_large_maps_are_means_over_areas_in_their_place():
    values = np.arange(1800.0 * 2400).reshape(1800, 2400).astype("float32")
    values[:3, :3] = np.nan
    array = xr.DataArray(
        values, {"lat": 55 - 0.01 * np.arange(1800), "lon": -130 + 0.01 * np.arange(2400)}, ("lat", "lon")
    )
    small = read_map(array)
    assert small.values.shape == (450, 600) and small.unit == "degrees"
    np.testing.assert_allclose(small.values[1, 1], values[4:8, 4:8].mean(), rtol=1e-5)
    assert np.isnan(small.values[0, 0])  # 9 of 16 are missing
    np.testing.assert_allclose(small.extent, (-130.005, -106.005, 37.005, 55.005))
    upside_down = read_map(array.isel(lat=slice(None, None, -1)))
    np.testing.assert_array_equal(upside_down.values, small.values)
    assert upside_down.extent == pytest.approx(small.extent)


def test_the_colour_blind_get_other_colours_of_rain_in_rising_darkness():
    from earthformer_hf.plotting.canvas import map_style

    colors = map_style([], "mm/h", "colour-blind")["cmap"].colors
    light = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue, _ in colors]
    assert (np.diff(light) < 0).all()


def test_an_animation_has_a_frame_for_each_lead_and_is_written_whole(tmp_path, monkeypatch):
    dataset = rain(members=1, thresholds=()).isel(realization=0, lead_time=slice(0, 2))
    path = tmp_path / "f.gif"
    animate_forecast(dataset, path, observed(dataset))
    assert Image.open(path).n_frames == 2 + 6
    animate_forecast(dataset, path)
    assert Image.open(path).n_frames == 2
    before = path.read_bytes()

    def half(image, file, **options):
        file.write_bytes(b"GIF89a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(ValueError, match="f.gif cannot be written: No space left on device"):
        animate_forecast(dataset, path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["f.gif"]


def test_a_film_needs_ffmpeg_and_a_known_ending(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="MP4 needs ffmpeg, .* GIF works: .*f.gif"):
        animate_forecast(rain(), tmp_path / "f.mp4")
    with pytest.raises(ValueError, match="must end in one of .*, got 'f.avi'"):
        animate_forecast(rain(), tmp_path / "f.avi")


def test_commands_draw_what_was_forecast(tmp_path):
    persistence().save_pretrained(tmp_path / "model")
    extractor().save_pretrained(tmp_path / "model")
    rain_dataset(field(9, 30, 30)).to_netcdf(tmp_path / "rain.nc")
    names = {name: str(tmp_path / name) for name in ("rain.nc", "model", "f.nc", "f.png", "f.gif", "again.png")}
    command = ["forecast", names["rain.nc"], "--model", names["model"], "--out", names["f.nc"], "--lead", "10m"]
    refused = CliRunner().invoke(app, [*command, "--plot", str(tmp_path / "f.bmp")])
    assert refused.exit_code == 1 and "must end in one of" in refused.output and not (tmp_path / "f.nc").exists()
    result = CliRunner().invoke(app, [*command, "--plot", names["f.png"], "--animate", names["f.gif"]])
    assert result.exit_code == 0, result.output
    assert Image.open(names["f.png"]).size[0] > 500 and Image.open(names["f.gif"]).n_frames == 6 + 2
    again = CliRunner().invoke(
        app, ["plot", names["f.nc"], "--out", names["again.png"], "--observed", names["rain.nc"]]
    )
    assert again.exit_code == 0, again.output
    one, other = (np.asarray(Image.open(names[name])) for name in ("f.png", "again.png"))
    np.testing.assert_array_equal(one, other)
    refused = CliRunner().invoke(app, ["plot", names["rain.nc"], "--out", names["again.png"]])
    assert refused.exit_code == 1 and "error: `dataset` must be a forecast" in refused.output


def test_observed_maps_are_the_last_frames_and_those_at_valid_times():
    dataset = rain().isel(lead_time=slice(2, None, 3))  # every 12 minutes
    frames = observed(dataset, first=-90, last=9).to_dataset(name="rain")  # of one value each, rising by 1
    frames["rain"].attrs["units"] = "mm/s"
    found = observed_maps(dataset, observe(frames))
    leads = (found["time"].values - REFERENCE) / np.timedelta64(1, "m")
    assert leads.tolist() == [-84, -72, -60, -48, -36, -24, -12, 0, 12, 24, 36]
    np.testing.assert_allclose(found[:, 0, 0], 3600 * (90 + leads / 4))
    code = observe(frames.assign(rain=frames["rain"].assign_attrs(units="code")))
    assert observed_maps(dataset, code) is None


def test_an_archive_gives_one_of_its_forecasts(tmp_path):
    several = xr.concat([rain(), rain() + 1], "forecast_reference_time", coords="minimal")
    several["forecast_reference_time"] = [REFERENCE, REFERENCE + LEADS[0]]
    several.drop_vars("time").to_netcdf(tmp_path / "a.nc")
    assert open_forecast(tmp_path / "a.nc").forecast_reference_time.values == REFERENCE + LEADS[0]
    first = open_forecast(tmp_path / "a.nc", "2020-06-01T23:30")
    np.testing.assert_array_equal(first["rainfall_rate"], several["rainfall_rate"][0])
    with pytest.raises(ValueError, match="holds forecasts from 2020-06-01T23:30 .. 2020-06-01T23:34, got '2021'"):
        open_forecast(tmp_path / "a.nc", "2021")


@pytest.mark.parametrize("crs", ["+proj=laea +lat_0=38 +lon_0=-95", None])
def test_coastlines_are_drawn_where_cartopy_has_them(monkeypatch, crs):
    def reader(path):
        line = SimpleNamespace(coords=[(-95, 38), (-94.95, 38), (-94.95, 38.05)])
        return SimpleNamespace(geometries=lambda: [line] if path == "coastline" else [])

    shapes = ModuleType("cartopy.io")
    shapes.shapereader = SimpleNamespace(natural_earth=lambda scale, category, name: name, Reader=reader)
    monkeypatch.setitem(sys.modules, "cartopy", ModuleType("cartopy"))
    monkeypatch.setitem(sys.modules, "cartopy.io", shapes)
    natural_earth.cache_clear()
    dataset = rain(members=1, thresholds=()).isel(realization=0)
    if crs:
        dataset = dataset.assign_coords(crs=((), 0, {"crs_wkt": crs}))
    (axis,) = [axis for axis in plot_forecast(dataset, lead="8m").axes if axis.images]
    assert len(axis.lines) == bool(crs)
    if crs:
        expected = [(0, 0), (4.3916, 0.0012), (4.3886, 5.5511)]  # from a degree's 87.83 and 111.00 km at 38 north
        np.testing.assert_allclose(axis.lines[0].get_xydata(), expected, atol=2e-4)
    natural_earth.cache_clear()


def test_without_cartopy_there_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "cartopy", None)
    natural_earth.cache_clear()
    assert natural_earth() == () and coastlines(rain(), (0, 1, 0, 1), "degrees") == []


def ocean(months, members=None):
    lat, lon = np.arange(-55.0, 65, 5), np.arange(95.0, 335, 5)
    shape = (months, 24, 48) if members is None else (members, months, 24, 48)
    values = np.random.default_rng(1).normal(0, 1, shape).astype("float32")
    places = {"lat": ("lat", lat, {"units": "degrees_north"}), "lon": ("lon", lon, {"units": "degrees_east"})}
    return values, places


def test_months_are_maps_with_dates_under_a_plume_with_members():
    values, places = ocean(14, members=3)
    leads = ("lead_time", np.arange(1, 15), {"units": "months"})
    reference = np.datetime64("2020-08-01", "ns")
    dims = ("realization", "lead_time", "lat", "lon")
    coordinates = {"lead_time": leads, "forecast_reference_time": reference} | places
    dataset = xr.Dataset({"ssta": (dims, values, {"units": "degC"})}, coordinates)
    past, _ = ocean(30)
    time = (np.datetime64("2020-08", "M") - 29 + np.arange(30)).astype("datetime64[ns]")
    known = xr.DataArray(past, {"time": time} | places, ("time", "lat", "lon"), attrs={"units": "degC"})
    figure = plot_forecast(dataset, known)
    assert titles(figure)[:2] == ["observed, Aug 2020", "Oct 2020, +2 months"]
    assert titles(figure)[-1] == "Oct 2021, +14 months" and len(titles(figure)) == 8
    plume = figure.axes[0]
    lines = {line.get_label(): line for line in plume.lines}
    index = three_month_means(nino34(values))
    np.testing.assert_allclose(lines["their mean"].get_ydata(), index.mean(0), rtol=1e-5)
    np.testing.assert_allclose(lines["3 members"].get_ydata(), index[0], rtol=1e-5)
    np.testing.assert_allclose(lines["observed"].get_ydata(), three_month_means(nino34(past[-24:])), rtol=1e-5)
    assert str(lines["observed"].get_xdata()[-1]) == "2020-07"
    np.testing.assert_allclose(nino34_means(known), three_month_means(nino34(past)), rtol=1e-5)


@pytest.mark.parametrize(
    "cuboid", [Cuboid((3, 2, 2)), Cuboid((3, 2, 2), DILATED), Cuboid((3, 2, 2), shift=(1, 1, 1)), Cuboid((2, 3, 3))]
)
def test_cells_have_the_cuboids_that_attention_gathers(cuboid):
    grid = (6, 4, 4)
    number, part = cuboids_of_cells(cuboid, grid)
    padding = padding_to(grid, cuboid.size)
    total = [n + p for n, p in zip(grid, padding)]
    cells = torch.full((1, *total, 1), -1)
    cells[0, : grid[0], : grid[1], : grid[2], 0] = torch.arange(96).reshape(grid)
    gathered = cuboid_partition(roll_grid(cells, cuboid.shift, -1), cuboid)[0, :, :, 0]
    regions = cuboid_regions(grid, padding, cuboid, True, torch.device("cpu"))
    for place, members in enumerate(gathered):
        own = members >= 0
        np.testing.assert_array_equal(number.ravel()[members[own]], place)
        np.testing.assert_array_equal(part.ravel()[members[own]], regions[place][own])


def test_the_figure_of_cuboids_colours_cells_by_cuboid():
    figure = plot_cuboids()
    assert len(figure.axes) == 18
    local, dilated, shifted = figure.axes[0], figure.axes[6], figure.axes[12]
    assert [text.get_text() for text in local.texts] == list("1122112233443344")
    assert [text.get_text() for text in dilated.texts] == list("1212343412123434")
    corners = [shifted.texts[n].get_text() for n in (0, 3, 12, 15)]
    assert {text[0] for text in corners} == {"8"} and len(set(corners)) == 4  # one cuboid, four parts
    colors = np.asarray(local.images[0].get_array())
    assert (colors[:2, :2] == colors[0, 0]).all() and (colors[0, 2] != colors[0, 0]).any()


def colors_of(figure):
    return [{line.get_label(): line.get_color() for line in axis.lines} for axis in figure.axes]


def test_a_system_has_one_colour_and_scores_of_a_kind_one_scale():
    leads = np.array([10, 20])
    curves = {
        "CSI at 1 mm/h": {"a": np.array([0.5, 0.4]), "b": np.array([0.3, 0.2])},
        "CSI at 9 mm/h": {"b": np.array([0.1, 0])},
    }
    figure = plot_by_lead(curves, leads, "min", "A title that is far too long for two panels " * 3)
    assert colors_of(figure) == [{"a": "C0", "b": "C1"}, {"b": "C1"}]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim() == (0, pytest.approx(0.525))
    assert "\n" in figure.get_suptitle()
    power = np.ones(5)
    spectrum = plot_spectrum(np.arange(4, 0, -1), {"x": {"observed": power, "b": power}}, "t", {"a": "C0", "b": "C1"})
    assert colors_of(spectrum) == [{"observed": "black", "b": "C1"}]
    ranks = plot_rank_histogram({"all": {"b": power}}, "t", {"a": "C0", "b": "C1"})
    assert ranks.axes[0].patches[0].get_facecolor() == matplotlib.colors.to_rgba("C1")


# -- sequences --------------------------------------------------------------------------------------------------------


def test_a_sequence_has_the_context_as_a_line_of_its_own_and_no_empty_part():
    random = np.random.default_rng(0)
    context, future = random.random((3, 8, 8)), random.random((3, 8, 8))
    rows = {"observed": sequence_row(future, context), "model": sequence_row(future + 1)}
    chances = {"chance": sequence_row(future)}
    labels = lead_labels([-20, -10, 0, 10, 20, 30], np.datetime64("2020-05-01T23:45"))
    figure = plot_sequence(rows, labels, "title", chances, grid_spacing="3 km")
    maps = [axis for axis in figure.axes if axis.images]
    titles = [axis.get_title() for axis in maps]
    assert titles[:6] == [
        "-20 min, 23:25 UTC", "-10 min, 23:35 UTC", "+0 min, 23:45 UTC",
        "+10 min, 23:55 UTC", "+20 min, 00:05 UTC", "+30 min, 00:15 UTC",
    ]  # fmt: skip
    assert len(maps) == 12 and [axis.get_ylabel() for axis in maps[::3]] == [
        "observed before", "observed", "model", "chance",
    ]  # fmt: skip
    shown = np.concatenate([context, future, future + 1, 100 * future])
    for axis, frame in zip(maps, shown):
        np.testing.assert_allclose(axis.images[0].get_array(), frame)
    assert lead_labels([10]) == lead_labels([10], np.datetime64("NaT")) == ["+10 min"]


def test_maps_are_cut_to_where_any_holds_a_value():
    one, other = np.full((2, 2, 6, 8), np.nan)
    one[0, 2, 3:6] = other[1, 3, 4] = 1
    figure = plot_sequence({"a": one, "b": other}, ["+1", "+2"], "title", units="degC")
    assert {axis.images[0].get_array().shape for axis in figure.axes if axis.images} == {(2, 3)}
    figure = plot_events({"a": one, "b": other}, {"a": ["1", "2"], "b": ["1", "2"]}, "label", "title")
    assert {axis.images[0].get_array().shape for axis in figure.axes if axis.images} == {(2, 3)}
    sizes = within_coverage([one, other[:, 1:]])
    assert [maps.shape for maps in sizes] == [(2, 6, 8), (2, 5, 8)]


def test_labels_are_not_cut_within_words_and_times_no_longer_than_needed():
    assert wrapped("sst_kaplan_1856_2014:test, from 2002", 1.3, 11).split("\n") == [
        "sst_kaplan_", "1856_2014:test,", "from 2002",
    ]  # fmt: skip
    for time, labels in (
        (["2002-05-01", "2002-06-01"], ["2002-05", "2002-06"]),
        (["2002-05-01", "2002-05-02"], ["2002-05-01", "2002-05-02"]),
        (["2002-05-01", "2002-05-01T00:10"], ["2002-05-01 00:00", "2002-05-01 00:10"]),
    ):
        assert time_labels(np.array(time, "datetime64[s]")) == labels


def test_panels_leave_few_places_empty():
    assert [columns_of(panels) for panels in range(1, 10)] == [1, 2, 3, 2, 3, 3, 4, 4, 3]


def test_the_last_frame_of_the_past_has_a_date():
    time = np.datetime64("2020-05-01T12:00", "s") + np.timedelta64(600, "s") * np.arange(9)
    minutes = 10 * np.arange(-2, 3)
    assert last_time({"time": time}, minutes, known=True) == time[2]
    assert last_time({"time": time}, minutes, known=False) == time[8]
    assert np.isnat(last_time({}, minutes, known=True))
