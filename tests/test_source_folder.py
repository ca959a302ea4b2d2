"""A user's own files."""

import importlib.util

import h5py
import numpy as np
import pytest
import xarray as xr

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.data import from_folder, windows


encode = EarthformerFeatureExtractor(fill_value=0).encode
HOUR = np.timedelta64(1, "h")
DAYS_OF_360 = {"units": "days since 2020-01-01", "calendar": "360_day"}


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing} (pip install earthformer-hf[geo])")


def hours(first, number):
    return np.datetime64(first, "ns") + HOUR * np.arange(number)


def frames(first, number, shape=(4, 6)):
    """Frames of which each holds its number, to be told apart, plus a slope."""
    values = np.arange(first, first + number)[:, None, None] + np.arange(np.prod(shape)).reshape(shape) / 100
    return values.astype("float32")


def dataset(first=0, number=10, start="2020-01-01", **changes):
    coordinates = {"time": hours(start, number) + first * HOUR, "lat": [50.0, 49, 48, 47], "lon": np.arange(6.0)}
    return xr.Dataset({"rain": (("time", "lat", "lon"), frames(first, number))}, coordinates | changes)


def events(folder, split="train", **options):
    options = {"fractions": (1, 0, 0), "streaming": True} | options
    return list(from_folder(folder, split=split, cache_dir=folder.parent / "cache", **options))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# -- formats ----------------------------------------------------------------------------------------------------------


def test_netcdf(folder):
    written = dataset()
    written["rain"].values[2, 1, 3] = np.nan
    written.to_netcdf(folder / "a.nc", encoding={"rain": {"_FillValue": -9.0}})
    (event,) = events(folder)
    assert event["id"] == "a.nc:0" and event["values"].shape == (10, 4, 6) and event["values"].dtype == "float32"
    np.testing.assert_array_equal(event["values"][:], written["rain"])
    np.testing.assert_array_equal(event["values"][8:1:-3], written["rain"][8:1:-3])
    np.testing.assert_array_equal(event["time"], written["time"].values.astype("datetime64[s]"))
    assert event["geo"] == {
        "file": "a.nc",
        "y": [50, 49, 48, 47],
        "y_name": "lat",
        "x": [0, 1, 2, 3, 4, 5],
        "x_name": "lon",
        "crs": "EPSG:4326",
    }
    items = windows([event], encode, 2, 2, stride=6)
    assert len(items) == 2 and not items[0]["future_observed_mask"][0, 1, 3, 0]
    assert items[1]["past_values"][:, 0, 0, 0].tolist() == [6, 7]
    table = from_folder(folder / "a.nc", "rain", "test", cache_dir=folder.parent / "cache")  # one file
    assert table[0]["id"] == "a.nc:9" and table[0]["values"][:].shape == (1, 4, 6)


def test_dimensions_are_found_by_their_meaning(folder):
    """In another order, under names of their own, told by CF attributes."""
    written = dataset().rename(time="when", lat="south_north", lon="west_east").transpose("west_east", ...)
    written["south_north"].attrs["units"], written["west_east"].attrs["axis"] = "degrees_north", "X"
    written["mapping"] = xr.DataArray(0, attrs={"crs_wkt": "PROJCS[...]"})
    written["rain"].attrs["grid_mapping"] = "mapping"
    written["height"] = (("south_north", "west_east"), np.zeros((4, 6)))
    written.to_netcdf(folder / "a.nc")
    (event,) = events(folder, variable="rain")
    np.testing.assert_array_equal(event["values"][:], frames(0, 10))
    np.testing.assert_array_equal(event["values"][3:7:2], frames(0, 10)[3:7:2])
    assert event["geo"]["y_name"] == "south_north" and event["geo"]["crs"] == "PROJCS[...]"
    (event,) = events(folder, variable="rain", dims={"y": "west_east", "x": "south_north"})
    np.testing.assert_array_equal(event["values"][:], frames(0, 10).swapaxes(1, 2))


def test_hdf5_without_coordinates(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file["rain"], file["other"] = frames(0, 5, (4, 4)), np.zeros((5, 3, 3))
    (event,) = events(folder, variable="rain", start="2020-01", time_step="1M")
    np.testing.assert_array_equal(event["values"][:], frames(0, 5, (4, 4)))
    assert event["time"].astype("datetime64[D]").astype(str).tolist()[:3] == ["2020-01-01", "2020-02-01", "2020-03-01"]
    with pytest.raises(ValueError, match="`start`: of .*a.h5 must be the first of a month"):
        events(folder, variable="rain", start="2020-01-31", time_step="1M")


def test_npy(folder):
    np.save(folder / "202001010000.npy", frames(0, 5))
    np.save(folder / "202001010500.npy", frames(5, 5))
    (event,) = events(folder, name_time="%Y%m%d%H%M.npy", time_step="1h")
    np.testing.assert_array_equal(event["values"][:], frames(0, 10))
    np.testing.assert_array_equal(event["values"][3:8], frames(3, 5))
    np.testing.assert_array_equal(event["values"][8:1:-3], frames(0, 10)[8:1:-3])
    np.save(folder / "202001020000.npy", np.stack([frames(0, 2), frames(2, 2)], axis=-1))
    two = events(folder, pattern="202001020000.npy", start="2020-01-02", time_step="1D")[0]
    assert two["values"].shape == (2, 4, 6, 2) and two["values"][:][1, 0, 0].tolist() == [1, 3]


@needs("zarr")
def test_zarr(folder):
    dataset().to_zarr(folder / "a.zarr", consolidated=False)
    (event,) = events(folder)
    np.testing.assert_array_equal(event["values"][4:6], frames(4, 2))


@needs("rasterio", "rioxarray")
def test_geotiff(folder):
    """One image per file, the time in its name; or one file, whose bands are times or channels."""
    import rasterio

    for hour in range(3):
        options = {"height": 4, "width": 6, "count": 1, "dtype": "float32", "crs": "EPSG:3035", "driver": "GTiff"}
        transform = rasterio.transform.from_origin(1000, 2000, 10, 10)
        with rasterio.open(folder / f"r_{hour:02d}.tif", "w", transform=transform, **options) as file:
            file.write(frames(hour, 1))
    (event,) = events(folder, name_time="r_%H.tif")
    np.testing.assert_array_equal(event["values"][:], frames(0, 3))
    assert event["geo"]["y"] == [1995, 1985, 1975, 1965] and "3035" in event["geo"]["crs"]
    with rasterio.open(folder / "bands.tif", "w", transform=transform, **options | {"count": 5}) as file:
        file.write(frames(0, 5))
    one = {"pattern": "bands.tif", "start": "2020-01-01"}
    (event,) = events(folder, dims={"time": "band"}, time_step="5m", **one)
    np.testing.assert_array_equal(event["values"][1:3], frames(1, 2))
    (event,) = events(folder, dims={"channel": "band"}, **one)
    np.testing.assert_array_equal(event["values"][:], frames(0, 5).transpose(1, 2, 0)[None])


@needs("cfgrib", "eccodes")
def test_grib(folder):
    import eccodes

    with (folder / "a.grib").open("wb") as file:
        for step in range(4):
            message = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
            grid = {"Ni": 6, "Nj": 4, "iDirectionIncrementInDegrees": 1, "jDirectionIncrementInDegrees": 1}
            first = {"latitudeOfFirstGridPointInDegrees": 50, "longitudeOfFirstGridPointInDegrees": 0}
            last = {"latitudeOfLastGridPointInDegrees": 47, "longitudeOfLastGridPointInDegrees": 5}
            when = {"dataDate": 20200101, "dataTime": 600, "forecastTime": 3 * step, "shortName": "2t"}
            for name, value in (grid | first | last | when).items():
                eccodes.codes_set(message, name, value)
            eccodes.codes_set_values(message, frames(step, 1).ravel().astype("float64"))
            eccodes.codes_write(message, file)
            eccodes.codes_release(message)
    (event,) = events(folder)
    np.testing.assert_allclose(event["values"][:], frames(0, 4), atol=1e-3)
    expected = np.datetime64("2020-01-01T06", "s") + 3 * HOUR * np.arange(4)  # of a forecast, when it is valid
    np.testing.assert_array_equal(event["time"], expected)
    assert event["geo"]["y"] == [50, 49, 48, 47] and event["geo"]["y_name"] == "latitude"


def test_channels_and_selected_levels(folder):
    written = dataset()
    written["snow"] = written["rain"] * 2
    written["wind"] = xr.concat([written["rain"] + 1000, written["rain"] + 500], dim="level").assign_coords(
        level=[1000, 500]
    )
    written.to_netcdf(folder / "a.nc")
    (event,) = events(folder, variable=("rain", "snow"))
    assert event["values"].shape == (10, 4, 6, 2)
    np.testing.assert_array_equal(event["values"][2:5], np.stack([frames(2, 3), 2 * frames(2, 3)], axis=-1))
    (event,) = events(folder, variable="wind", select={"level": 500})
    np.testing.assert_array_equal(event["values"][:], frames(0, 10) + 500)
    (event,) = events(folder, variable="wind", dims={"channel": "level"})
    np.testing.assert_array_equal(event["values"][1], np.stack([frames(1, 1)[0] + 1000, frames(1, 1)[0] + 500], -1))
    for options, message in [
        ({"variable": "wind"}, r"`dims`: 'wind' of .*a.nc must have a time, a y and an x, got .*'level': 2"),
        ({"variable": "wind", "select": {"level": 7}}, "`select`: 'wind' of .*a.nc has no {'level': 7}"),
        ({"variable": ("rain", "wind"), "dims": {"channel": "level"}}, "a.nc"),
        ({}, r"`variable` must be one of \['rain', 'snow', 'wind'\], which .*a.nc holds"),
        ({"variable": "hail"}, r"`variable`: .*a.nc holds \['rain', 'snow', 'wind'\], not \['hail'\]"),
        ({"variable": "rain", "dims": {"y": "row"}}, r"`dims`: 'rain' of .*a.nc has dimensions .*, not \['row'\]"),
        ({"variable": "rain", "dims": {"row": "lat"}}, r"`dims` must name .*, got \['row'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            events(folder, **options)


# -- events and splits ------------------------------------------------------------------------------------------------


def numbers(event):
    return event["values"][:][:, 0, 0].astype(int).tolist()


def test_gaps_end_an_event_and_files_go_on(folder):
    """Files out of order, one that goes on, one after a gap, a gap inside, one of another grid."""
    dataset(0, 4).to_netcdf(folder / "b.nc")
    dataset(4, 3).to_netcdf(folder / "a.nc")
    later = dataset(20, 8)
    later.isel(time=[0, 1, 2, 5, 6, 7]).to_netcdf(folder / "c.nc")
    dataset(28, 2, lon=np.arange(6.0) + 1).to_netcdf(folder / "d.nc")
    (folder / "deeper").mkdir()
    dataset(40, 2).to_netcdf(folder / "deeper/e.nc")
    found = events(folder)
    assert [event["id"] for event in found] == ["b.nc:0", "c.nc:0", "c.nc:3", "d.nc:0", "deeper/e.nc:0"]
    assert [numbers(event) for event in found] == [
        list(range(7)),
        [20, 21, 22],
        [25, 26, 27],
        [28, 29],
        [40, 41],
    ]
    for event in found:
        hour = (event["time"] - np.datetime64("2020-01-01")) / HOUR
        assert hour.tolist() == numbers(event)
    first = found[0]["values"]
    assert first[2:6][:, 0, 0].astype(int).tolist() == [2, 3, 4, 5] and first[5:6].shape == (1, 4, 6)
    assert first[0:7:5][:, 0, 0].astype(int).tolist() == [0, 5] and first[6, 0, 0].astype(int) == 6


def test_months_and_uneven_scans(folder):
    months = np.datetime64("2019-11", "M") + np.arange(8)
    dataset(0, 8, time=months.astype("datetime64[ns]")).isel(time=[0, 1, 2, 3, 5, 6, 7]).to_netcdf(folder / "a.nc")
    assert [numbers(event) for event in events(folder)] == [[0, 1, 2, 3], [5, 6, 7]]
    late = hours("2020-01-01", 6) + np.array([0, 20, -100, 0, 3600, 3600]) * np.timedelta64(1, "s")
    dataset(0, 6, time=late).to_netcdf(folder / "b.nc")
    assert [numbers(event) for event in events(folder, pattern="b.nc", time_step="1h")] == [[0, 1, 2, 3], [4, 5]]


def test_splits_are_intervals_of_time_and_lose_nothing(folder):
    dataset(0, 12).to_netcdf(folder / "a.nc")
    dataset(30, 8).to_netcdf(folder / "b.nc")
    dataset(3, 4, lat=[5.0, 4, 3, 2]).to_netcdf(folder / "elsewhere.nc")  # the same times in another place
    parts = {split: events(folder, split, fractions=(0.5, 0.25, 0.25)) for split in ("train", "val", "test")}
    assert {split: [numbers(event) for event in part] for split, part in parts.items()} == {
        "train": [list(range(8)), [3, 4, 5, 6]],
        "val": [list(range(8, 12)), [30, 31]],
        "test": [list(range(32, 38))],
    }
    assert [event["id"] for event in parts["val"]] == ["a.nc:8", "b.nc:0"] and parts["test"][0]["id"] == "b.nc:2"
    dates = {"train": ("2020-01-01T01", "2020-01-01T04"), "test": ("2020-01-02", "2020-01-02")}
    parts = {split: events(folder, split, dates=dates) for split in ("train", "test")}
    assert [numbers(event) for event in parts["train"]] == [[1, 2, 3, 4], [3, 4]]
    assert [numbers(event) for event in parts["test"]] == [list(range(30, 38))]
    cache = {"cache_dir": folder.parent / "cache"}
    assert set(from_folder(folder, dates=dates, **cache)) == {"train", "test"}
    tables = from_folder(folder, fractions=(0.99, 0.01, 0), **cache)
    assert {name: table.num_rows for name, table in tables.items()} == {"train": 3}  # no frame is left for val
    for options, message in [
        ({"dates": {"train": ("2020", "2021"), "val": ("2021", "2022")}}, "do not overlap"),
        ({"dates": {"dev": ("2020", "2021")}}, "`dates` must name splits"),
        ({"fractions": (0.5, 0.2, 0.2)}, "sum to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            events(folder, **options)


# -- bad files --------------------------------------------------------------------------------------------------------


def test_bad_files_are_named(folder):
    good = dataset()
    bad = {
        "empty": (good.where(False), "all 10 frames hold nothing but missing values"),
        "falls": (good.isel(time=[0, 1, 3, 2]), r"time must rise, but frame 3 \(2020-01-01T02:00:00\) follows"),
        "twice": (good.isel(time=[0, 1, 1, 2]), r"time must rise, but frame 2 \(2020-01-01T01:00:00\) follows"),
        "text": (good.assign(rain=good["rain"].astype(str)), "must hold real numbers, got"),
        "none": (good.isel(time=slice(0)), "must not be empty, got"),
        "flat": (good.isel(lon=0, drop=True), "must have a time, a y and an x"),
        "calendar": (
            good.drop_vars("time").assign_coords(time=("time", 58 + np.arange(10), DAYS_OF_360)),
            "2020-02-30.* of the calendar '360_day' is no date of ours",
        ),
        "undated": (good.drop_vars("time"), "`time_step`: .*undated.nc has no dates along its 10 frames"),
    }
    for name, (written, message) in bad.items():
        written.to_netcdf(folder / f"{name}.nc")
        with pytest.raises(ValueError, match=f"{name}.nc.*{message}|{message}.*{name}.nc"):
            events(folder, pattern=f"{name}.nc")
    (folder / "broken.nc").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    np.save(folder / "complex.npy", np.zeros((3, 4, 6), complex))
    np.save(folder / "line.npy", np.zeros(3))
    for name, message in [
        ("broken.nc", "broken.nc"),
        ("complex.npy", "must hold real numbers, got complex128"),
        ("line.npy", r"must be \(H, W\), .*got \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            events(folder, pattern=name, start="2020", time_step="1h")
    for options, message in [
        ({"time_step": "1h"}, "`start`: .*undated.nc has no dates"),
        ({"time_step": "hourly", "start": "2020"}, "`time_step` must be such as"),
        ({"name_time": "%Y.nc"}, "`time_step`"),
        ({"name_time": "%Y.nc", "time_step": "1h"}, "`name_time`: .*undated.nc"),
    ]:
        with pytest.raises(ValueError, match=message):
            events(folder, pattern="undated.nc", **options)
    good.to_netcdf(folder / "good.nc")
    rows = from_folder(
        folder, split="train", keep_bad=True, pattern="*.nc", fractions=(1, 0, 0), cache_dir=folder.parent / "cache"
    ).with_format(None)
    assert dict(zip(rows["id"], map(bool, rows["problem"]))) == {"good.nc:0": False, "broken.nc": True} | {
        f"{name}.nc": True for name in bad
    }
    with pytest.raises(ValueError, match="holds no file"):
        events(folder, pattern="*.csv")


def test_names_and_dates_as_users_have_them(folder):
    dataset().to_netcdf(folder / "a[1].nc")
    (folder / "nowhere").symlink_to(folder / "absent")
    for options in ({}, {"dates": {"train": (2020, 2020)}}):  # a year is a number in YAML
        found = from_folder(folder / "a[1].nc", cache_dir=folder.parent / "cache", **options)
        assert sum(len(event["values"]) for table in found.values() for event in table) == 10
