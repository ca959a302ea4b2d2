"""What a forecast starts from: files and arrays that are observations, in the right place and order, or refused."""

import numpy as np
import pytest
import xarray as xr
from test_forecasting import START, STATED, field, forecast, rain_dataset

from earthformer_hf.data import from_folder
from earthformer_hf.data.events import Events, usable
from earthformer_hf.forecasting import observe, save


MINUTE = np.timedelta64(1, "m")


# -- forecasts are no observations ------------------------------------------------------------------------------------


def test_a_forecast_beside_the_observations_is_left_out(tmp_path, caplog):
    whole = rain_dataset(field(4, 20, 28))
    for number in range(4):
        whole.isel(time=[number]).to_netcdf(tmp_path / f"rain_{number}.nc")
    expected = forecast(str(tmp_path / "*.nc"))
    save(expected, tmp_path / "nowcast.nc")
    found = forecast(str(tmp_path / "*.nc"))
    xr.testing.assert_allclose(found.rainfall_rate, expected.rainfall_rate)
    assert found.forecast_reference_time == whole.time[-1]
    assert "nowcast.nc is a forecast, no observation: it has lead times, 'lead_time'; it is left out" in caplog.text
    for alone in (tmp_path / "nowcast.nc", expected):
        with pytest.raises(ValueError, match="is a forecast, no observation: it has lead times, 'lead_time'"):
            forecast(alone)
    (tmp_path / "data").mkdir()
    (tmp_path / "nowcast.nc").rename(tmp_path / "data/nowcast.nc")
    table = from_folder(tmp_path / "data", "rainfall_rate", split="train", fractions=(1, 0, 0), cache_dir=tmp_path)
    (event,) = Events(usable(table, "folder"))  # a model may be trained on forecasts
    np.testing.assert_allclose(event["values"][:], expected.rainfall_rate, rtol=1e-6)


def test_a_reference_time_alone_makes_no_forecast():
    """As of the analyses of a weather service, whose lead time is 0; times after it do."""
    dataset = rain_dataset(field(3, 20, 28)).assign_coords(forecast_reference_time=START + 10 * MINUTE)
    dataset = dataset.assign_coords(step=("time", np.zeros(3), {"standard_name": "forecast_period", "units": "hours"}))
    assert len(observe(dataset).time) == 3
    with pytest.raises(ValueError, match="its times end at 2020-06-01T12:10:00, its reference time is 2020-06"):
        observe(dataset.assign_coords(forecast_reference_time=START))


# -- GeoTIFF ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """Eleven GeoTIFF of a frame each, 5 minutes apart, and the frames with their dates."""
    pytest.importorskip("rioxarray")
    dataset = rain_dataset(field(11, 20, 28)).drop_vars("crs")
    for number in range(11):
        image = dataset.rain.isel(time=number, drop=True).rio.write_crs("EPSG:3035")
        image.attrs.pop("grid_mapping", None)
        minute = str(dataset.time.values[number])[:16].translate({ord(sign): None for sign in "-:T"})
        for folder, name in (("dated", f"rain_{minute}.tif"), ("counted", f"r_{number}.tif")):
            (tmp_path / folder).mkdir(exist_ok=True)
            image.rio.to_raster(tmp_path / folder / name)
    return tmp_path, dataset


def test_the_time_is_in_a_part_of_the_name(images):
    folder, dataset = images
    for pattern in ("rain_%Y%m%d%H%M", "%Y%m%d%H%M", "rain_%Y%m%d%H%M.tif"):
        found = observe(folder / "dated", name_time=pattern)
        assert found.time.tolist() == dataset.time.values.astype("datetime64[s]").tolist()
    with pytest.raises(ValueError, match=r"^`start`: .* has no dates; .*`--option name_time=rain_%Y%m%d%H%M`"):
        observe(folder / "dated")
    for pattern in ("%Y%m%d", "%Y%m%d%H"):  # followed by further digits
        with pytest.raises(ValueError, match="^`name_time`: .* found none; write it such as .*name_time=rain_%Y%m"):
            observe(folder / "dated", name_time=pattern)


def test_undated_images_follow_each_other_in_the_order_of_their_names(images):
    folder, dataset = images
    found = observe(folder / "counted", start="2020-06-01T12:00", time_step="5m")
    assert found.time.tolist() == dataset.time.values.astype("datetime64[s]").tolist()
    np.testing.assert_array_equal(found.read(slice(8, 11)), dataset.rain[8:])  # r_10 is after r_9
    with pytest.raises(ValueError, match="`time_step`: .*r_0.tif and 10 more have no dates; state how far apart"):
        observe(folder / "counted", start="2020-06-01T12:00")


def test_an_image_lies_in_the_units_of_its_system(images):
    folder, dataset = images
    options = {"name_time": "%Y%m%d%H%M", "units": "mm/h"}
    found = forecast(folder / "dated", **options)
    assert observe(folder / "dated", **options).grid.spacing == "2 km"
    for side in "yx":
        assert found[side].attrs["units"] == "m"
        assert found[side].attrs["standard_name"] == f"projection_{side}_coordinate"
        np.testing.assert_allclose(found[side], dataset[side])
    xr.testing.assert_equal(found, forecast(folder / "dated", **options, grid_spacing="2 km"))
    with pytest.raises(ValueError, match="`grid_spacing`: the coordinates say '2 km', got '1 km'"):
        forecast(folder / "dated", **options, grid_spacing="1 km")
    degrees = rain_dataset(field(3, 20, 28), spacing=0.5).drop_vars("crs")
    for side in "yx":
        degrees[side].attrs.clear()
    assert observe(degrees, crs="EPSG:4326").grid.spacing == "0.5 degrees"


# -- places -----------------------------------------------------------------------------------------------------------


def test_a_system_that_is_none_is_left_out(caplog):
    pytest.importorskip("pyproj")
    dataset = rain_dataset(field(3, 20, 28))
    expected = forecast(dataset)
    dataset.crs.attrs = {"grid_mapping_name": "nonsense"}
    found = forecast(dataset)
    np.testing.assert_array_equal(found.rainfall_rate, expected.rainfall_rate)
    assert "crs" not in found.coords and "grid_mapping" not in found.rainfall_rate.attrs
    assert "`crs`: 'nonsense' is no coordinate reference system" in caplog.text
    assert forecast(dataset, crs="EPSG:3035").crs.attrs["grid_mapping_name"] == "lambert_azimuthal_equal_area"
    with pytest.raises(ValueError, match="`crs`: 'EPSG:99999999' is no coordinate reference system"):
        observe(dataset, crs="EPSG:99999999")


def test_a_curvilinear_grid_keeps_its_places(tmp_path):
    down, right = np.mgrid[:20, :28].astype("float64")
    degrees = {"lat": 50 - 0.02 * down + 0.001 * right, "lon": 179.7 + 0.02 * right + 0.001 * down}
    degrees["lon"] = (degrees["lon"] + 180) % 360 - 180  # across the date line
    dataset = rain_dataset(field(3, 20, 28)).drop_vars(["y", "x", "crs"])
    units = {"lat": "degrees_north", "lon": "degrees_east"}
    dataset = dataset.assign_coords({name: (("y", "x"), degrees[name], {"units": units[name]}) for name in degrees})
    dataset.to_netcdf(tmp_path / "curved.nc")
    with pytest.raises(ValueError, match="its grid spacing is unknown, .* state it by `grid_spacing`"):
        forecast(dataset)
    south_up = {"y": slice(None, None, -1)}
    for data, order in ((dataset, {}), (tmp_path / "curved.nc", {}), (dataset.isel(south_up), south_up)):
        found = forecast(data, grid_spacing="2 km").isel(order)
        np.testing.assert_allclose(found.rainfall_rate[-1], dataset.rain[-1], rtol=1e-5)
        for name in degrees:
            np.testing.assert_allclose(found[name], degrees[name])
            assert found[name].dims == ("y", "x") and found[name].attrs["units"] == units[name]
    save(found, tmp_path / "out.nc")
    with xr.open_dataset(tmp_path / "out.nc") as read:
        assert {"lat", "lon"} <= set(read.rainfall_rate.coords)
    coarse = forecast(dataset, grid_spacing="1 km", coarsen_to="2 km", grid="model")
    np.testing.assert_allclose(coarse.lat, degrees["lat"].reshape(10, 2, 14, 2).mean((1, 3)))
    east = (degrees["lon"] % 360).reshape(10, 2, 14, 2).mean((1, 3))
    np.testing.assert_allclose(coarse.lon % 360, east)


# -- what is missing or contradicts -----------------------------------------------------------------------------------


def test_a_last_frame_without_values_is_refused():
    dataset = rain_dataset(field(6, 20, 28))
    dataset["rain"][-2:] = np.nan
    words = "nothing was observed in the last frame, of 2020-06-01T12:25:00; the last that was observed is of 2020-06-"
    with pytest.raises(ValueError, match=f"{words}01T12:15:00: `until='2020-06-01T12:15:00'`"):
        forecast(dataset)
    found = forecast(dataset, until="2020-06-01T12:15:00")
    np.testing.assert_allclose(found.rainfall_rate[-1], dataset.rain[3], rtol=1e-5)
    with pytest.raises(ValueError, match="in the last frame, frame 5; end the data at frame 3"):
        forecast(dataset.rain.values, **STATED)


def test_a_value_that_stands_for_missing_ones(tmp_path):
    dataset = rain_dataset(field(3, 20, 28))
    dataset["rain"][:, 3:6, 4:9] = -999
    dataset.to_netcdf(tmp_path / "rain.nc")
    with pytest.raises(ValueError, match=r"the first is -999 at \(0, 3, 4\); .* `--option missing_value=-999`"):
        forecast(tmp_path / "rain.nc")
    found = forecast(tmp_path / "rain.nc", missing_value=-999)
    xr.testing.assert_equal(found.rainfall_rate, forecast(dataset.where(dataset != -999)).rainfall_rate)
    assert np.isnan(found.rainfall_rate[:, 3:6, 4:9]).all()


def test_a_time_step_that_contradicts_the_dates_is_refused(tmp_path):
    dataset = rain_dataset(field(5, 20, 28))
    dataset.to_netcdf(tmp_path / "rain.nc")
    for data in (dataset, tmp_path / "rain.nc"):
        with pytest.raises(ValueError, match="`time_step`: the times are 5m apart, got '10m'"):
            forecast(data, time_step="10m")
        assert observe(data, time_step="5m").facts.time_step == "5m"


def test_errors_begin_with_what_is_wrong(tmp_path):
    dataset = rain_dataset(field(5, 20, 28))
    dataset.assign(snow=dataset.rain).to_netcdf(tmp_path / "two.nc")
    with pytest.raises(ValueError, match="^`variable` must be one of .'rain', 'snow'., which .*two.nc holds"):
        observe(tmp_path / "two.nc")
    dataset.isel(time=[0, 1, 3, 4]).to_netcdf(tmp_path / "hole.nc")
    with pytest.raises(ValueError, match="there are 2 from 2020-06-01T12:15:00 to 2020-06-01T12:20:00; .* `until`"):
        forecast(tmp_path / "hole.nc")
