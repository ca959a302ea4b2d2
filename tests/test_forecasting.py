"""Forecasts of a user's own grid, by a model whose forecast is known: untrained, its first guess the last frame."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from tiny import tiny_model, tiny_pipeline
from typer.testing import CliRunner

import earthformer_hf
from earthformer_hf import EarthformerFeatureExtractor, advection
from earthformer_hf.cli import app
from earthformer_hf.data.coarsening import area_means, coarse_length
from earthformer_hf.forecasting import describe, observed_maps, open_forecast, save
from earthformer_hf.forecasting.forecast import context_of as make_context
from earthformer_hf.forecasting.forecast import roll_out
from earthformer_hf.forecasting.grids import grid_of, interpolated
from earthformer_hf.forecasting.mosaic import blended, cover
from earthformer_hf.forecasting.nowcasters import Nowcaster
from earthformer_hf.forecasting.numbers import numbers_of
from earthformer_hf.forecasting.observations import observe


RAIN = {"variable": "rain rate", "units": "mm/h", "time_step": "5m", "grid_spacing": "2 km", "fill_value": 0}
STATED = {"units": "mm/h", "time_step": "5m", "grid_spacing": "2 km"}
START = np.datetime64("2020-06-01T12:00", "ns")
SAY_FORECAST = ["lead_time", "forecast_reference_time"]


def extractor(**changes):
    return EarthformerFeatureExtractor(**(RAIN | changes))


def persistence(**changes):
    """Takes 3 frames of 20 x 28 pixels and repeats the last, 4 times."""
    return tiny_model(first_guess="persistence", **changes)


def field(*shape, seed=0):
    return np.random.default_rng(seed).gamma(0.5, 4.0, shape).astype("float32")


def rain_dataset(values, minutes=5, spacing=2000.0, **attrs):
    count, height, width = values.shape
    coordinates = {
        "time": START + np.arange(count) * np.timedelta64(minutes, "m"),
        "y": ("y", 5e5 - spacing * np.arange(height), {"units": "m", "standard_name": "projection_y_coordinate"}),
        "x": ("x", spacing * np.arange(width), {"units": "m", "standard_name": "projection_x_coordinate"}),
    }
    mapping = {"grid_mapping_name": "lambert_azimuthal_equal_area", "longitude_of_projection_origin": 10.0}
    mapping |= {"latitude_of_projection_origin": 52.0, "semi_major_axis": 6378137.0, "inverse_flattening": 298.257}
    attributes = {"units": "mm/h", "grid_mapping": "crs"} | attrs
    arrays = {"rain": (("time", "y", "x"), values, attributes), "crs": ((), 0, mapping)}
    return xr.Dataset(arrays, coordinates)


def forecast(data, model=None, scaling=None, **options):
    scaling = scaling or extractor()
    return earthformer_hf.forecast(model or persistence(), data, feature_extractor=scaling, **options)


# -- any grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 28), (53, 41), (7, 90), (11, 13)])
def test_any_size_and_length(shape):
    values = field(5, *shape)
    found = forecast(values, **STATED, lead="45m")
    assert dict(found.rainfall_rate.sizes) == {"lead_time": 9, "y": shape[0], "x": shape[1]}
    np.testing.assert_allclose(found.rainfall_rate, np.broadcast_to(values[-1], (9, *shape)), rtol=1e-5)
    assert (found.lead_time / np.timedelta64(1, "m")).values.tolist() == [5.0 * n for n in range(1, 10)]


def test_the_forecast_says_where_when_and_by_what(tmp_path):
    persistence().save_pretrained(tmp_path / "model")
    extractor().save_pretrained(tmp_path / "model")
    found = earthformer_hf.forecast(tmp_path / "model", rain_dataset(field(4, 30, 30)))
    assert found.forecast_reference_time == START + np.timedelta64(15, "m")
    assert found.time.values.tolist() == (START + np.timedelta64(15, "m") + found.lead_time.values).tolist()
    assert found.rainfall_rate.attrs["grid_mapping"] == "crs"
    assert found.crs.attrs["grid_mapping_name"] == "lambert_azimuthal_equal_area"
    assert found.y.attrs["standard_name"] == "projection_y_coordinate" and float(found.y[0]) == 5e5
    assert found.attrs["Conventions"] == "CF-1.11" and len(found.attrs["weights_sha256"]) == 64
    for name in ("forecast.nc", "forecast.zarr"):
        save(found, tmp_path / name)
        with xr.open_dataset(tmp_path / name, decode_coords="all", decode_timedelta=True) as read:
            xr.testing.assert_allclose(read.rainfall_rate, found.rainfall_rate)
            assert read.lead_time.values.tolist() == found.lead_time.values.tolist()
    again = earthformer_hf.forecast(tmp_path / "model", found.rainfall_rate.to_dataset().drop_vars(SAY_FORECAST))
    np.testing.assert_allclose(again.rainfall_rate[0], found.rainfall_rate[0], rtol=1e-5)


def test_weights_of_half_precision_forecast_from_their_folder(tmp_path):
    persistence().half().save_pretrained(tmp_path)
    extractor().save_pretrained(tmp_path)
    values = field(3, 20, 28)
    found = earthformer_hf.forecast(tmp_path, rain_dataset(values))
    np.testing.assert_allclose(found.rainfall_rate, np.broadcast_to(values[-1], (4, 20, 28)), rtol=1e-5)


@pytest.mark.parametrize(
    "units, of_rain",
    [
        ("mm h-1", lambda rain: rain),
        ("dBZ", lambda rain: 10 * np.log10(200 * rain**1.6)),
        ("mm", lambda rain: rain / 12),
        ("mm/day", lambda rain: 24 * rain),
        ("mm/10min", lambda rain: rain / 6),
        ("mm (5 min)-1", lambda rain: rain / 12),
    ],
)
def test_units_become_millimetres_an_hour(units, of_rain):
    rain = 0.1 + field(3, 20, 28)
    found = forecast(of_rain(rain), **STATED | {"units": units})
    assert found.rainfall_rate.attrs["units"] == "mm h-1"
    np.testing.assert_allclose(found.rainfall_rate[-1], rain[-1], rtol=1e-4)


def test_codes_of_the_model_become_rain_by_its_table():
    table = extractor(units="1", physical_units="mm/h", physical_table=[[0, 100, 200], [0, 10, 100]])
    codes = np.full((3, 20, 28), 150.0, "float32")
    found = forecast(codes, scaling=table, **STATED | {"units": "code"})
    np.testing.assert_allclose(found.rainfall_rate, 55, rtol=1e-5)
    np.testing.assert_allclose(forecast(np.full_like(codes, 55), scaling=table, **STATED).rainfall_rate, 55, rtol=1e-5)


def test_a_finer_grid_is_averaged_and_brought_back():
    values = field(3, 60, 66)
    dataset = rain_dataset(values, spacing=500.0)
    coarse = forecast(dataset, coarsen_to="2 km", grid="model")
    means = values.reshape(3, 15, 4, 66)[..., :64].reshape(3, 15, 4, 16, 4).mean((2, 4))
    np.testing.assert_allclose(coarse.rainfall_rate[0, :, :16], means[-1], rtol=1e-4)
    assert coarse.sizes["x"] == 17  # of the last, half is covered
    np.testing.assert_allclose(coarse.x[:2], [750, 2750])
    fine = forecast(dataset, coarsen_to="2 km")
    assert fine.rainfall_rate.shape == (4, 60, 66) and fine.x.values.tolist() == dataset.x.values.tolist()
    assert abs(float(fine.rainfall_rate.mean()) / values[-1].mean() - 1) < 0.02


@pytest.mark.parametrize("factor", [2.0, 2.5, 1.3])
def test_area_means_are_those_of_a_naive_loop(factor):
    values = field(1, 11, 13)
    values[0, 2:5, 3] = np.nan
    found = area_means(values, factor)
    for row in range(coarse_length(11, factor)):
        for column in range(coarse_length(13, factor)):
            total = area = 0.0
            for i in range(11):
                for j in range(13):
                    sides = [min(n + 1, (m + 1) * factor) - max(n, m * factor) for n, m in ((i, row), (j, column))]
                    if min(sides) > 0 and np.isfinite(values[0, i, j]):
                        area += sides[0] * sides[1]
                        total += sides[0] * sides[1] * float(values[0, i, j])
            if area >= factor**2 / 2:
                np.testing.assert_allclose(found[0, row, column], total / area, rtol=1e-5)
            else:
                assert np.isnan(found[0, row, column])


def test_a_slope_comes_back_from_a_coarser_grid():
    slope = np.add.outer(2.0 * np.arange(24), 3.0 * np.arange(30))[None].astype("float32")
    back = interpolated(area_means(slope, 3), 3, (24, 30))
    np.testing.assert_allclose(back[:, 1:-1, 1:-1], slope[:, 1:-1, 1:-1], rtol=1e-5)


@pytest.mark.parametrize("spacing, options", [(2000.0, {}), (1000.0, {"coarsen_to": "2 km"})])
@pytest.mark.parametrize("sides", [("y",), ("x",), ("y", "x")])
def test_the_order_of_rows_and_columns_changes_nothing(sides, spacing, options):
    """The model is untrained and not symmetric; it always sees the north above and the west on the left."""
    dataset = rain_dataset(field(3, 40, 48), spacing=spacing)
    turn = {side: slice(None, None, -1) for side in sides}
    model = tiny_model()
    for grid in ("input", "model"):
        expected = forecast(dataset, model, grid=grid, **options)
        found = forecast(dataset.isel(turn), model, grid=grid, **options)
        xr.testing.assert_equal(found.isel(turn), expected)
        assert float(found[sides[0]][0]) == float(expected[sides[0]][-1])
    unplaced = dataset.drop_vars(["y", "x", "crs"]).isel(turn)  # without coordinates, the order is unknown
    found = forecast(unplaced, model, grid_spacing=f"{spacing / 1000:g} km", **options).isel(turn)
    expected = forecast(dataset, model, **options)
    assert np.abs(found.rainfall_rate.values - expected.rainfall_rate.values).max() > 1e-3


def test_degrees_are_measured_at_their_latitude():
    lat, lon = 60 - 0.01 * np.arange(50), 10 + 0.02 * np.arange(60)
    grid = grid_of({"y": lat, "x": lon, "y_name": "lat", "x_name": "lon", "y_units": "degrees_north"}, (50, 60))
    across, along = 0.02 * 111.2 * np.cos(np.radians(lat.mean())), 0.01 * 111.2
    assert abs(grid.kilometers / np.sqrt(across * along) - 1) < 1e-5


# -- time -------------------------------------------------------------------------------------------------------------


def blob(time, height=24, width=32):
    """A blob that moves 2 pixels a minute to the right."""
    y, x = np.mgrid[:height, :width]
    return 10 * np.exp(-((y - 12) ** 2 + (x - 4 - 2 * time) ** 2) / 18).astype("float32")


def test_frames_between_lie_on_the_way():
    scaling = extractor(scale=0.1, time_step="1m")
    values = np.stack([blob(time) for time in (0, 2, 4, 6)])
    context = context_of(values, scaling, "2m", "1m")
    for place, time in enumerate((4, 5, 6)):
        expected = blob(time)
        assert np.abs(10 * context.values[place] - expected).max() < (1.0 if time == 5 else 1e-5)
    held = np.abs(values[-2] / 2 + values[-1] / 2 - blob(5)).max()
    assert np.abs(10 * context.values[1] - blob(5)).max() < 0.25 * held


def test_every_other_frame_is_taken_from_the_last():
    values = np.stack([np.full((20, 28), number, "float32") for number in range(6)])
    context = context_of(values, extractor(time_step="10m"), "5m", "10m")
    assert context.values[:, 0, 0].tolist() == [1, 3, 5]


def context_of(values, scaling, step, resample_time):
    nowcaster = Nowcaster(persistence(), scaling, {})
    observations = observe(values, units="mm/h", time_step=step, grid_spacing="2 km")
    return make_context(observations, nowcaster, numbers_of(observations.facts, scaling), None, resample_time)


def test_what_was_not_observed_stays_missing_and_inflow_is_flagged():
    values = np.stack([blob(time) for time in (0, 1, 2)])
    values[:, :, :6] = np.nan
    found = forecast(values, scaling=extractor(scale=0.1), **STATED)
    assert np.isnan(found.rainfall_rate[:, :, :6]).all() and np.isfinite(found.rainfall_rate[:, :, 6:]).all()
    flag = found.quality_flag
    assert flag[:, 12, 7].values.tolist() == [1, 1, 1, 1]  # comes from missing pixels at once
    assert flag[:, 12, 25].values.tolist() == [0, 0, 0, 0]


# -- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 28), (61, 47), (9, 200)])
@pytest.mark.parametrize("overlap, multiple", [(0, 1), (5, 1), (8, 4)])
def test_tiles_cover_a_map_without_seams(shape, overlap, multiple):
    tiles = cover(shape, (20, 28), overlap, multiple)
    assert all(corner[0] % multiple == corner[2] % multiple == 0 for corner in tiles.corners)
    whole = torch.from_numpy(field(*tiles.padded))[None, None, ..., None]
    found = blended(lambda place: whole[:, :, *place], tiles)
    torch.testing.assert_close(found, whole[:, :, : shape[0], : shape[1]], rtol=1e-5, atol=1e-6)
    for first, second in zip(tiles.corners, tiles.corners[1:]):
        assert first[0] != second[0] or first[3] - second[2] >= min(overlap, 28 - multiple)


def test_neighbouring_tiles_see_one_field_of_noise():
    scaling = extractor(time_step="5m")
    options = {"scaling": scaling, "model": tiny_pipeline(), "num_inference_steps": 2, **STATED}
    values = field(3, 24, 30)
    four, two = (forecast(values, ensemble_size=size, **options).rainfall_rate for size in (4, 2))
    np.testing.assert_allclose(four[:2], two, atol=1e-5)  # a member does not depend on the others
    other = forecast(values, ensemble_size=2, seed=1, **options).rainfall_rate
    assert np.abs(other - two).max() > 1e-3
    parts = forecast(values, ensemble_size=4, max_memory="100KB", **options).rainfall_rate
    np.testing.assert_allclose(parts, four, atol=1e-5)  # nor on how many are forecast at once


def test_members_go_on_from_their_own_forecasts():
    options = {"model": tiny_pipeline(), "num_inference_steps": 2, "ensemble_size": 2, **STATED}
    values = field(3, 12, 16)
    long = forecast(values, lead="20m", **options).rainfall_rate
    short = forecast(values, **options).rainfall_rate
    assert long.sizes["lead_time"] == 4
    np.testing.assert_allclose(long[:, :2], short, atol=1e-5)
    gap = np.abs(long[0] - long[1]).max(("y", "x")).values
    assert gap[-1] > 0


def test_products_are_those_of_the_members():
    options = {"model": tiny_pipeline(), "num_inference_steps": 2, "ensemble_size": 4, **STATED}
    values = field(3, 12, 16)
    values[:, 0, 0] = np.nan
    threshold = 0.5
    found = forecast(values, mean=True, percentiles=[50], thresholds=[threshold], **options)
    members = found.rainfall_rate.values
    inside = np.isfinite(members[0])
    np.testing.assert_allclose(found.rainfall_rate_mean, members.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.rainfall_rate_percentile[0], np.median(members, 0), rtol=1e-5)
    chance = (members >= threshold).mean(0)
    np.testing.assert_allclose(found.exceedance_probability[0].values[inside], chance[inside])
    ever = (members >= threshold).any(1).mean(0)
    np.testing.assert_allclose(found.exceedance_probability_at_any_time[0].values[inside[0]], ever[inside[0]])
    assert np.isnan(found.exceedance_probability[:, :, 0, 0]).all()
    assert 0 < chance.mean() < 1
    alone = forecast(values, members=False, thresholds=[threshold], **options)
    assert set(alone.data_vars) == {"exceedance_probability", "exceedance_probability_at_any_time", "quality_flag"}


def test_a_chance_in_a_neighbourhood_counts_what_is_reached_within_its_radius():
    options = {"model": tiny_pipeline(), "num_inference_steps": 2, "ensemble_size": 3, **STATED}
    values = field(3, 12, 16)
    threshold = 0.9
    found = forecast(values, thresholds=[threshold], neighbourhood="5 km", **options)  # cells of 2 km
    reached = found.rainfall_rate.values >= threshold
    expected = np.zeros(reached.shape[1:])
    for lead, y, x in np.ndindex(*expected.shape):
        near = [(row, column) for row, column in np.ndindex(12, 16) if 4 * ((row - y) ** 2 + (column - x) ** 2) <= 25]
        expected[lead, y, x] = np.mean([any(member[lead][place] for place in near) for member in reached])
    chance = found.exceedance_probability[0]
    np.testing.assert_allclose(chance, expected, atol=1e-6)
    assert expected.mean() > reached.mean() > 0
    assert chance.attrs["cell_methods"].startswith("area: maximum") and "within 5 km" in chance.attrs["long_name"]
    with pytest.raises(ValueError, match="`neighbourhood` is of chances; ask for `thresholds`"):
        forecast(values, neighbourhood="5 km", **options)
    with pytest.raises(ValueError, match="`neighbourhood` must be a distance such as '10 km', got 'near'"):
        forecast(values, thresholds=[1], neighbourhood="near", **options)


def test_what_followed_is_drawn_beside_a_forecast_from_an_earlier_time():
    whole = rain_dataset(field(6, 20, 28))
    early = observe(whole, until="2020-06-01T12:10")
    found = forecast(early)
    assert found.forecast_reference_time.values == np.datetime64("2020-06-01T12:10")
    xr.testing.assert_allclose(found.rainfall_rate, forecast(whole.isel(time=slice(3))).rainfall_rate)
    observed = observed_maps(found, early)
    assert observed.time.values[-1] == whole.time.values[-1] > early.time[-1]
    np.testing.assert_allclose(observed[-1], whole.rain[-1], rtol=1e-6)


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_are_joined_and_the_last_stretch_is_forecast(tmp_path):
    whole = rain_dataset(field(6, 20, 28))
    for number in range(6):
        whole.isel(time=[number]).to_netcdf(tmp_path / f"rain_{number}.nc")
    whole.isel(time=[0]).assign_coords(time=whole.time[:1] - np.timedelta64(1, "D")).to_netcdf(tmp_path / "old.nc")
    expected = forecast(whole)
    paths = [str(tmp_path / f"rain_{number}.nc") for number in range(6)]
    for given in (tmp_path, str(tmp_path / "rain_*.nc"), paths):
        found = forecast(given)
        xr.testing.assert_allclose(found.rainfall_rate, expected.rainfall_rate)
        assert found.crs.attrs["grid_mapping_name"] == "lambert_azimuthal_equal_area"
    with pytest.raises(ValueError, match="`data`: 3 frames without a hole are needed, there are 2"):
        forecast(paths[-2:])


def test_a_file_of_an_array_needs_no_dates(tmp_path):
    values = field(4, 20, 28)
    np.save(tmp_path / "mine.npy", values)
    xr.testing.assert_allclose(forecast(tmp_path / "mine.npy", **STATED), forecast(values, **STATED))


def test_a_geotiff_of_chances_lies_where_the_data_do(tmp_path):
    rioxarray = pytest.importorskip("rioxarray")
    dataset = rain_dataset(field(3, 24, 32))
    found = forecast(dataset, tiny_pipeline(), num_inference_steps=1, ensemble_size=2, thresholds=[1, 5])
    save(found, tmp_path / "chance.tif")
    with rioxarray.open_rasterio(tmp_path / "chance.tif") as read:
        assert read.shape == (4, 24, 32)
        np.testing.assert_allclose(read.x, dataset.x)
        np.testing.assert_allclose(read[3], found.exceedance_probability[1, 1])
        assert read.rio.crs.to_dict()["proj"] == "laea"


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    found = forecast(field(3, 20, 28), **STATED)
    with pytest.raises(ValueError, match="`out` must end in one of"):
        save(found, tmp_path / "a.csv")
    save(found, tmp_path / "a.nc")
    with pytest.raises(ValueError, match="is there already"):
        save(found, tmp_path / "a.nc")
    before = (tmp_path / "a.nc").read_bytes()

    def full(self, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    with pytest.raises(ValueError, match="a.nc cannot be written: No space left on device"):
        save(found, tmp_path / "a.nc", overwrite=True)
    assert os.listdir(tmp_path) == ["a.nc"] and (tmp_path / "a.nc").read_bytes() == before


@pytest.mark.parametrize("name", ["a.nc", "a.zarr"])
def test_of_two_that_write_one_name_the_second_is_refused(tmp_path, monkeypatch, name):
    found = forecast(field(3, 20, 28), **STATED)
    other = found.assign(rainfall_rate=found.rainfall_rate + 1)

    def also_checked(path, overwrite=False):  # before the other one had written
        return path

    save(found, tmp_path / name)
    monkeypatch.setattr("earthformer_hf.forecasting.files.check_target", also_checked)
    with pytest.raises(ValueError, match=f"{name} came into being meanwhile|{name} cannot be written"):
        save(other, tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    with open_forecast(tmp_path / name) as read:
        np.testing.assert_allclose(read.rainfall_rate, found.rainfall_rate)
    save(other, tmp_path / name, overwrite=True)
    with open_forecast(tmp_path / name) as read:
        np.testing.assert_allclose(read.rainfall_rate, other.rainfall_rate)


def test_a_forecast_tells_its_options():
    options = {"num_inference_steps": 2, "ensemble_size": 2, "seed": 7, **STATED}
    attributes = forecast(field(3, 12, 16), tiny_pipeline(), resample_time="5m", **options).attrs
    told = {name: attributes[name] for name in ("seed", "num_inference_steps", "resample_time", "title")}
    expected = {"seed": 7, "num_inference_steps": 2, "resample_time": "5m", "title": "Forecast of rainfall rate"}
    assert told == expected and "guide" not in attributes and "coarsen_to" not in attributes


def test_messages_of_a_command_name_its_options(tmp_path):
    persistence().save_pretrained(tmp_path / "model")
    extractor().save_pretrained(tmp_path / "model")
    rain_dataset(field(4, 60, 60), spacing=1000.0).to_netcdf(tmp_path / "fine.nc")

    def told(*words):
        command = ["forecast", str(tmp_path / "fine.nc"), "--out", str(tmp_path / "out.nc"), "--model"]
        result = CliRunner().invoke(app, [*command, *words])
        assert result.exit_code == 1
        return result.stderr.splitlines()[-1]

    assert "`--coarsen-to '2 km'` takes means" in told(str(tmp_path / "model"))
    assert "`--threshold` is of an ensemble" in told(str(tmp_path / "model"), "--threshold", "1")
    assert f"no folder {tmp_path / 'modle'}; there are {tmp_path / 'model'}." in told(str(tmp_path / "modle"))
    assert "`--device`: there cannot be used here" in told(str(tmp_path / "model"), "--device", "there")


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"units": None}, "`units` states"),
        ({"units": "K"}, "`data` must be rain in mm/h.*got 'K'"),
        ({"time_step": None}, "its time step is unknown, the model takes 5m; state it by `time_step`"),
        ({"time_step": "10m"}, "a frame every 10m, the model takes one every 5m: `resample_time='5m'`"),
        ({"resample_time": "2m"}, "`resample_time` must be the model's 5m"),
        ({"grid_spacing": None}, "its grid spacing is unknown, the model takes 2 km"),
        ({"grid_spacing": "1 km"}, "a grid of 1 km, the model takes 2 km: `coarsen_to='2 km'`"),
        ({"grid_spacing": "5 km"}, "`coarsen_to` must not be finer"),
        ({"coarsen_to": "wide"}, "`coarsen_to` must be a spacing such as"),
        ({"lead": "7m"}, "`lead` must be a multiple of the model's time step, 5m"),
        ({"thresholds": [1]}, "`thresholds` is of an ensemble"),
        ({"guide": "change=+2sigma"}, "`guide` is for ensembles"),
        ({"grid": "mine"}, "`grid` must be 'input' or 'model'"),
        ({"max_memory": "1KB"}, "`max_memory`: the forecast alone takes"),
        ({"max_memory": "much"}, "`max_memory` must be such as '4GB'"),
        ({"overlap": 20}, "`overlap` must be 0 to 19 pixels"),
        ({"pattern": "*.nc"}, "`pattern` is for files"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        forecast(field(4, 30, 40), **STATED | options)


def test_values_that_are_none_are_refused():
    values = field(4, 20, 28)
    with pytest.raises(ValueError, match="`data`: 3 frames without a hole are needed, there are 2"):
        forecast(values[:2], **STATED)
    with pytest.raises(ValueError, match="nothing was observed"):
        forecast(np.full_like(values, np.nan), **STATED)
    values[-1, 3, 4] = -1
    with pytest.raises(ValueError, match=r"1 negative or infinite rain rates, the first is -1 at \(0, 3, 4\)"):
        forecast(values, **STATED)
    holed = rain_dataset(field(7, 20, 28)).isel(time=[0, 1, 2, 5, 6])
    with pytest.raises(ValueError, match="there is a hole in time, 2020-06-01T12:10:00 is followed by"):
        forecast(holed)
    with pytest.raises(ValueError, match="`feature_extractor`: the model has none"):
        earthformer_hf.forecast(persistence(), values)
    with pytest.raises(ValueError, match="`units`: the data say 'mm/h', got 'dBZ'"):
        forecast(rain_dataset(field(3, 20, 28)), units="dBZ")
    with pytest.raises(ValueError, match="`data`: no file is named like"):
        forecast("nowhere_*.nc")


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    persistence().save_pretrained(tmp_path / "model")
    extractor().save_pretrained(tmp_path / "model")
    rain_dataset(field(4, 30, 30)).to_netcdf(tmp_path / "a b.nc")
    command = ["forecast", str(tmp_path / "a b.nc"), "--model", str(tmp_path / "model"), "--out"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out.nc")])
    assert result.exit_code == 0, result.output
    assert "from 2020-06-01 12:15: 2020-06-01 12:20 to 2020-06-01 12:35" in result.output
    with xr.open_dataset(tmp_path / "out.nc", decode_timedelta=True) as read:
        assert read.rainfall_rate.shape == (4, 30, 30)
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out.nc")])
    assert result.exit_code == 1 and "error: `--out`: " in result.output and "is there already" in result.output
    result = CliRunner().invoke(app, [*command, str(tmp_path / "b.nc"), "--json", "--lead", "10m"])
    assert json.loads(result.stdout.splitlines()[-1])["variables"]["rainfall_rate"]["lead_time"] == 2
    result = CliRunner().invoke(app, ["info", str(tmp_path / "model"), "--json"])
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts == describe(tmp_path / "model") and facts["takes"].startswith("3 frames, 5m apart, of 20 x 28 pixels")


def test_a_dry_tile_stays_dry():
    values = np.zeros((3, 12, 60), "float32")
    values[:, 4:8, 50:54] = 20
    options = {"model": tiny_pipeline(), "num_inference_steps": 2, "ensemble_size": 2, **STATED}
    found = forecast(values, overlap=4, **options).rainfall_rate
    assert (found[..., :28] == 0).all() and (found[..., 44:] != 0).any()


def test_where_rain_enters_a_tile_its_neighbour_knows_better():
    """The first guess of a tile is 0 where it would come from outside; tiles together equal one guess of the map."""
    values = np.stack([blob(time, 24, 60) for time in (8, 9, 10, 11)])
    values += np.stack([blob(time - 12, 24, 60) for time in (8, 9, 10, 11)])
    model = tiny_model(first_guess="advection", image_size=(24, 32))
    context = context_of(values, extractor(scale=0.1), "5m", None)
    nowcaster = Nowcaster(model, extractor(scale=0.1), {})
    motion = advection.estimate_motion(torch.from_numpy(values[None, -3:] / 10))
    whole = 10 * advection.advect(torch.from_numpy(values[None, -1] / 10), motion, 4)[0][0].numpy()
    with_reach, without = (
        np.abs(roll_out(nowcaster, each, range(1), 4, 0, 16)[0] - whole).mean()
        for each in (context, replace(context, motion=None))
    )
    assert with_reach < without / 2, (with_reach, without)


def test_a_time_with_a_zone_is_that_time_in_utc():
    dataset = rain_dataset(field(6, 20, 28))
    for until in ("2020-06-01T12:10", "2020-06-01T14:10+02:00"):
        assert observe(dataset, until=until).time[-1] == np.datetime64("2020-06-01T12:10")


def test_a_pipeline_keeps_the_precision_that_its_owner_chose():
    pipeline = tiny_pipeline().to(torch.float64)
    values = field(3, 12, 16)
    found = forecast(values, pipeline, num_inference_steps=1, ensemble_size=1, device="cpu", **STATED)
    assert pipeline.unet.dtype == torch.float64 and np.isfinite(found.rainfall_rate).all()
