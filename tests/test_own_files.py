"""A user's own files as they really are: found, grouped, joined and refused as their owner would expect."""

import logging
import shutil

import datasets
import h5py
import netCDF4
import numpy as np
import pytest
import xarray as xr
from test_source_folder import HOUR, dataset, encode, events, frames, hours, needs, numbers

from earthformer_hf.data import TrainingWindows, file_search, from_folder, windows
from earthformer_hf.data.file_search import find_files
from earthformer_hf.data.file_times import follows, most_common_step


MINUTE = np.timedelta64(60, "s")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def messages(caplog):
    """What the folder reader logs."""
    logger = logging.getLogger("earthformer_hf")
    logger.addHandler(caplog.handler)
    level, logger.level = logger.level, logging.INFO
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def written(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    values.to_netcdf(path)


def problems(folder, **options):
    options = {"fractions": (1, 0, 0), "keep_bad": True, "cache_dir": folder.parent / "cache"} | options
    rows = from_folder(folder, split="train", **options).with_format(None)
    return {row["id"]: row["problem"] for row in rows}


# -- found ------------------------------------------------------------------------------------------------------------


def test_hidden_files_links_and_stores(folder):
    written(folder / "a.nc", dataset(0, 3))
    written(folder / ".ipynb_checkpoints/a-checkpoint.nc", dataset(0, 3))
    (folder / "._a.nc").write_bytes(b"\0\5\x16\7 Mac OS X")
    written(folder / ".store/2020/b.nc", dataset(3, 2))
    (folder / "2020").symlink_to(".store/2020")
    (folder / "again.nc").symlink_to("a.nc")
    (folder / "circle").symlink_to(folder)
    written(folder.parent / "elsewhere/c.nc", dataset(5, 2))
    (folder / "outside").symlink_to(folder.parent / "elsewhere")
    paths, passed = find_files(folder)
    assert [path.relative_to(folder).as_posix() for path in paths] == ["2020/b.nc", "a.nc"]
    assert len(passed) == 1 and "outside the folder; `follow_links` takes it" in passed[0]
    assert len(find_files(folder, follow_links=True)[0]) == 3
    assert [path.name for path in find_files(folder, "**/?.nc")[0]] == ["b.nc", "a.nc"]
    assert [path.name for path in find_files(folder, "*.nc")[0]] == ["a.nc"]
    (event,) = events(folder)
    assert numbers(event) == [0, 1, 2, 3, 4]


@needs("zarr")
def test_a_zarr_store_is_known_by_its_content(folder):
    dataset(0, 4).to_zarr(folder / "store", consolidated=False)
    (event,) = events(folder)
    assert numbers(event) == [0, 1, 2, 3]
    (event,) = events(folder / "store")
    assert numbers(event) == [0, 1, 2, 3]


def test_one_file_is_not_slowed_by_what_lies_beside_it(folder, monkeypatch):
    written(folder / "a.nc", dataset(0, 4))
    monkeypatch.setattr(file_search, "_walk", None)
    assert find_files(folder, "a.nc")[0] == [folder / "a.nc"]
    assert numbers(events(folder / "a.nc")[0]) == [0, 1, 2, 3]


def test_endings_and_big_endian_numbers(folder):
    for name in ("a.hdf", "b.he5"):
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("rain", data=frames(0, 3), compression="lzf")
        (event,) = events(folder / name, start="2020-01-01", time_step="1h")
        np.testing.assert_array_equal(event["values"][::-1], frames(0, 3)[::-1])
    np.save(folder / "a.npy", frames(0, 3).astype(">f4"))
    (event,) = events(folder / "a.npy", start="2020-01-01", time_step="1h")
    assert event["values"].dtype == np.dtype("float32").newbyteorder("=") and numbers(event) == [0, 1, 2]


# -- joined -----------------------------------------------------------------------------------------------------------


def test_two_radars_in_subfolders_stay_apart(folder):
    for frame in range(4):
        written(folder / f"A/{frame}.nc", dataset(frame, 1))
        written(folder / f"B/{frame}.nc", dataset(frame, 1) + 100)
    assert [numbers(event) for event in events(folder)] == [[0, 1, 2, 3], [100, 101, 102, 103]]


def test_folders_named_by_dates_are_one_series(folder):
    for frame in range(4):
        written(folder / f"2020/01/0{1 + frame}/r.nc", dataset(frame, 1))
        written(folder / f"radar_B/year=2020/month={1 + frame}/r.nc", dataset(frame, 1) + 100)
    assert [numbers(event) for event in events(folder)] == [[0, 1, 2, 3], [100, 101, 102, 103]]


def test_series_by_a_pattern(folder):
    for frame in range(3):
        written(folder / f"rad10{frame}.nc", dataset(frame, 1))
        written(folder / f"rad20{frame}.nc", dataset(frame, 1) + 100)
    assert [numbers(event) for event in events(folder, series=r"rad(\d)")] == [[0, 1, 2], [100, 101, 102]]
    assert all("at the same time" in problem for problem in problems(folder).values())
    assert "`series`: 'x(.)' does not occur in rad100.nc" in problems(folder, series="x(.)")["rad100.nc"]


def test_files_that_take_turns_are_one_event(folder):
    whole = dataset(0, 9)
    written(folder / "even.nc", whole.isel(time=slice(0, None, 2)))
    written(folder / "odd.nc", whole.isel(time=slice(1, None, 2)))
    (event,) = events(folder)
    np.testing.assert_array_equal(event["values"][:], frames(0, 9))
    np.testing.assert_array_equal(event["values"][7:1:-3], frames(0, 9)[7:1:-3])


def test_a_grid_that_differs_by_rounding_or_packing_is_one(folder):
    written(folder / "a.nc", dataset(0, 3))
    written(folder / "b.nc", dataset(3, 3, lat=np.array([50.0, 49, 48, 47]) * (1 + 1e-12)))
    packed = {"rain": {"dtype": "int16", "scale_factor": 0.01, "_FillValue": -1}}
    dataset(6, 3).to_netcdf(folder / "c.nc", encoding=packed)
    (event,) = events(folder)
    assert numbers(event) == list(range(9))
    np.testing.assert_allclose(event["values"][:], frames(0, 9), atol=0.006)
    written(folder / "d.nc", dataset(9, 3, lat=np.array([50.0, 49, 48, 47]) + 0.01))
    assert [len(event["values"]) for event in events(folder)] == [9, 3]


def test_the_same_times_twice(folder, messages):
    written(folder / "a.nc", dataset(0, 6))
    written(folder / "b.nc", dataset(3, 6))  # three hours of which are copies
    (event,) = events(folder)
    assert numbers(event) == list(range(9)) and "b.nc: 3 frames are copies of those in" in messages.text
    written(folder / "c.nc", dataset(8, 2) + 1)
    found = problems(folder)
    assert {name for name, problem in found.items() if problem} == {"b.nc", "c.nc"}
    assert "holds other values than" in found["b.nc"] and "c.nc at the same time 2020-01-01T08" in found["b.nc"]
    with pytest.raises(ValueError, match="b.nc: holds other values than .*c.nc at the same time"):
        events(folder)


def test_every_cut_has_its_reason(folder, messages):
    written(folder / "a.nc", dataset(0, 3))
    written(folder / "b.nc", dataset(5, 3))
    assert [numbers(event) for event in events(folder)] == [[0, 1, 2], [5, 6, 7]]
    assert "1 events end early: a.nc at 2020-01-01T02:00:00, then b.nc at 2020-01-01T05:00:00: a gap" in messages.text


# -- times ------------------------------------------------------------------------------------------------------------


def test_jittering_scans(folder):
    jitter = np.array([0, 45, -45, 30, -40, 45, -45, 0]) * np.timedelta64(1, "s")
    time = hours("2020-01-01", 1)[0] + 5 * MINUTE * np.arange(8) + jitter
    written(folder / "a.nc", dataset(0, 8, time=time))
    assert len(events(folder)) > 1
    (event,) = events(folder, time_tolerance="45s")
    assert numbers(event) == list(range(8))
    np.testing.assert_array_equal(event["time"], time.astype("datetime64[s]"))
    assert most_common_step([time.astype("datetime64[s]")], np.timedelta64(45, "s")) == 5 * MINUTE
    gap = np.delete(time, 4)
    written(folder / "gap/a.nc", dataset(0, 7, time=gap))
    assert [numbers(event) for event in events(folder / "gap", time_tolerance="45s")] == [[0, 1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="`time_tolerance` must be such as"):
        events(folder, time_tolerance="45")
    assert follows(time[:1], time[1:2], 5 * MINUTE).tolist() == [False]


def raw_times(path, units, values, calendar="standard"):
    """A file with times as numbers."""
    with netCDF4.Dataset(path, "w") as file:
        for name, size in zip(("time", "lat", "lon"), (len(values), 4, 6)):
            file.createDimension(name, size)
        time = file.createVariable("time", "f8", ("time",))
        time.units, time.calendar = units, calendar
        time[:] = values
        file.createVariable("rain", "f4", ("time", "lat", "lon"))[:] = frames(0, len(values))


def test_calendars_and_units_that_xarray_refuses(folder):
    raw_times(folder / "noleap.nc", "days since 2020-02-27", [0, 1, 2], "noleap")
    (first, second) = events(folder / "noleap.nc")  # 29 February is not in the file
    assert [str(t)[:10] for t in first["time"]] == ["2020-02-27", "2020-02-28"] and len(second["time"]) == 1
    raw_times(folder / "months.nc", "months since 1960-01-01", np.arange(4) + 0.5)
    (event,) = events(folder / "months.nc")
    assert [str(t)[:10] for t in event["time"]] == ["1960-01-16", "1960-02-15", "1960-03-16", "1960-04-16"]
    raw_times(folder / "years.nc", "years since 1960-01-01", [0, 1, 2])
    assert [str(t)[:10] for t in events(folder / "years.nc")[0]["time"]] == ["1960-01-01", "1961-01-01", "1962-01-01"]
    raw_times(folder / "360.nc", "days since 2020-02-29", [0, 1, 2], "360_day")
    with pytest.raises(ValueError, match="360.nc.*2020-02-30.*state `start` and `time_step`"):
        events(folder / "360.nc")
    (event,) = events(folder / "360.nc", start="2020-02-29", time_step="1D")
    assert numbers(event) == [0, 1, 2]


def test_a_missing_time_is_named(folder):
    values = np.array([0, 1, 2, netCDF4.default_fillvals["f8"], 4])
    raw_times(folder / "a.nc", "hours since 2020-01-01", values)
    with pytest.raises(ValueError, match="a.nc, 'rain': the time of frame 3 is missing"):
        events(folder)


def test_a_scalar_time_and_a_reference_time_with_steps(folder):
    for frame in range(2):
        single = dataset(frame, 1).isel(time=0, drop=True)
        single["valid_time"] = ((), hours("2020-01-01", 2)[frame], {"standard_name": "time"})
        written(folder / f"{frame}.nc", single)
    assert numbers(events(folder)[0]) == [0, 1]
    forecast = dataset(0, 3).drop_vars("time").rename(time="step")
    forecast = forecast.assign_coords(step=np.arange(1, 4) * HOUR, time=np.datetime64("2020-01-01T12", "ns"))
    written(folder / "forecast/f.nc", forecast)
    (event,) = events(folder / "forecast")
    assert event["time"].astype("datetime64[h]").astype(str).tolist() == [f"2020-01-01T{h}" for h in (13, 14, 15)]


def test_members_and_levels_are_never_time(folder):
    member = (
        dataset(0, 3).rename(time="member").assign_coords(member=[0, 1, 2], time=np.datetime64("2020-01-01", "ns"))
    )
    written(folder / "a.nc", member)
    for options in ({}, {"start": "2020-01-01", "time_step": "1h"}):
        with pytest.raises(ValueError, match=r"name the time in `dims`, .*select=\{'member': ...\}"):
            events(folder, **options)
    assert numbers(events(folder, select={"member": 2})[0]) == [2]
    plain = {"start": "2020-01-01", "time_step": "1h"}
    assert numbers(events(folder, dims={"time": "member"}, name_time="a.nc", time_step="1h")[0]) == [0, 1, 2]
    level = dataset(0, 3).rename(time="step_up").assign_coords(step_up=("step_up", [1, 2, 3], {"axis": "Z"}))
    written(folder / "b.nc", level)
    with pytest.raises(ValueError, match="name the time in `dims`"):
        events(folder / "b.nc", **plain)


# -- groups and fields ------------------------------------------------------------------------------------------------


def test_groups(folder):
    with netCDF4.Dataset(folder / "a.nc", "w") as file:
        group = file.createGroup("PRODUCT")
        for name, size in zip(("time", "y", "x"), (5, 4, 6)):
            group.createDimension(name, size)
        group.createVariable("rain", "f4", ("time", "y", "x"))[:] = frames(0, 5)
    with h5py.File(folder / "b.h5", "w") as file:
        file["2020/rain"] = frames(0, 5)
        file["latest"] = h5py.SoftLink("/2020/rain")
    plain = {"start": "2020-01-01", "time_step": "1h"}
    with pytest.raises(ValueError, match=r"`variable` must be one of \['PRODUCT/rain'\]"):
        events(folder / "a.nc", **plain)
    for name, variable in (("a.nc", "PRODUCT/rain"), ("b.h5", "2020/rain"), ("b.h5", "latest")):
        assert numbers(events(folder / name, variable=variable, **plain)[0]) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="b.h5 has no group '2021'"):
        events(folder / "b.h5", variable="2021/rain", **plain)


def test_an_odim_composite(folder):
    stored = np.array([[0, 1, 2], [3, 255, 254]], "uint8")
    with h5py.File(folder / "a.h5", "w") as file:
        file["dataset1/data1/data"], file["dataset1/data2/data"] = stored, stored
        rate = {"quantity": "RATE", "gain": 0.5, "offset": -0.5, "nodata": 255.0, "undetect": 0.0}
        file.create_group("dataset1/data1/what").attrs.update(rate)
        file.create_group("dataset1/data2/what").attrs.update(rate | {"quantity": "DBZH", "offset": -32.0})
        file.create_group("dataset1/what").attrs.update(enddate="20200101", endtime="120500")
        file.create_group("what").attrs.update(object="COMP", date="20200101", time="120000")
        file.create_group("where").attrs.update(projdef="+proj=stere")
    with pytest.raises(ValueError, match=r"\['DBZH', 'RATE'\]"):
        events(folder)
    (event,) = events(folder, variable="RATE")
    np.testing.assert_array_equal(event["values"][0], [[0, 0, 0.5], [1, np.nan, 126.5]])  # no echo is no rain
    assert str(event["time"][0]) == "2020-01-01T12:05:00" and event["geo"]["crs"] == "+proj=stere"
    (event,) = events(folder, variable="DBZH")
    np.testing.assert_array_equal(event["values"][0], [[-32, -31.5, -31], [-30.5, np.nan, 95]])


def test_an_odim_composite_lies_where_its_corner_does(folder):
    pyproj = pytest.importorskip("pyproj")
    projection = "+proj=laea +lat_0=55 +lon_0=10 +x_0=1950000 +y_0=-2100000 +units=m +ellps=WGS84"
    to_degrees = pyproj.Transformer.from_crs(projection, "EPSG:4326", always_xy=True)
    longitude, latitude = to_degrees.transform(1_000_000, -3_000_000)  # of the outer corner
    with h5py.File(folder / "a.h5", "w") as file:
        file["dataset1/data1/data"] = np.zeros((3, 2), "uint8")
        file.create_group("dataset1/data1/what").attrs.update(quantity="RATE", gain=1.0, offset=0.0)
        file.create_group("what").attrs.update(object="COMP", date="20200101", time="120000")
        place = {"xscale": 2000.0, "yscale": 1000.0, "UL_lon": longitude, "UL_lat": latitude}
        file.create_group("where").attrs.update(place | {"projdef": np.bytes_(projection)})
    (event,) = events(folder)
    assert event["geo"]["crs"] == projection
    np.testing.assert_allclose(event["geo"]["y"], [-3_000_500, -3_001_500, -3_002_500], atol=0.01)  # centres
    np.testing.assert_allclose(event["geo"]["x"], [1_001_000, 1_003_000], atol=0.01)
    shutil.copy(folder / "a.h5", folder / "b.h5")
    with h5py.File(folder / "b.h5", "a") as file:
        del file["where"].attrs["UL_lon"]  # its place is not known: coordinates without a system
    (event,) = events(folder / "b.h5")
    assert "crs" not in event["geo"] and event["geo"]["y"] == [0, -1000, -2000]


def test_a_knmi_composite(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        file["image1/image_data"] = np.array([[0, 150, 65535], [3, 4, 5]], "uint16")
        file["image1"].attrs["image_geo_parameter"] = b"PRECIP_[MM]"
        calibration = file.create_group("image1/calibration").attrs
        calibration.update(calibration_formulas=b"GEO = 0.01 * PV + 0.0", calibration_out_of_image=np.array([65535]))
        file.create_group("overview").attrs["product_datetime_end"] = b"31-DEC-2020;23:55:00.000"
    (event,) = events(folder)
    np.testing.assert_allclose(event["values"][0], [[0, 1.5, np.nan], [0.03, 0.04, 0.05]])
    assert str(event["time"][0]) == "2020-12-31T23:55:00"
    shutil.copy(folder / "a.h5", folder / "b.h5")
    with h5py.File(folder / "b.h5", "a") as file:
        sizes = {"geo_pixel_size_y": -1.0, "geo_pixel_size_x": 1.0, "geo_dim_pixel": b"KM,KM"}
        file.create_group("geographic").attrs.update(sizes | {"geo_row_offset": 3650.0, "geo_column_offset": 0.0})
        projection = b"+proj=stere +lat_0=90 +lon_0=0.0 +lat_ts=60.0 +a=6378.137 +b=6356.752 +x_0=0 +y_0=0"
        file.create_group("geographic/map_projection").attrs["projection_proj4_params"] = projection
    (event,) = events(folder / "b.h5")
    assert event["geo"]["y"] == [-3650.5, -3651.5] and event["geo"]["x"] == [0.5, 1.5, 2.5]
    assert event["geo"]["crs"].startswith("+proj=stere")


@needs("cfgrib", "eccodes")
def test_grib_with_two_kinds_of_messages_or_a_missing_end(folder):
    import eccodes

    parts = []
    for level in ("surface", "isobaricInhPa"):
        message = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
        for name, value in {"Ni": 6, "Nj": 4, "dataDate": 20200101, "typeOfLevel": level, "shortName": "t"}.items():
            eccodes.codes_set(message, name, value)
        eccodes.codes_set_values(message, frames(len(parts), 1).ravel().astype("float64"))
        parts.append(eccodes.codes_get_message(message))
    (folder / "a.grib2").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match="choose some by `grib_keys`, such as {'typeOfLevel': 'surface'}"):
        events(folder)
    assert numbers(events(folder, grib_keys={"typeOfLevel": "isobaricInhPa"})[0]) == [1]
    (folder / "a.grib2").write_bytes(parts[0] * 3 + parts[0][:-30])
    with pytest.raises(ValueError, match="a.grib2: message 4 has .* truncated"):
        events(folder)


def test_values_outside_their_range_bounds_and_flags(folder):
    values = dataset(0, 3)
    values["rain"].values[0, 0, :2] = -32768, 600
    values["rain"].attrs["valid_range"] = np.array([0.0, 500.0], "float32")
    values["lat"].attrs["bounds"] = "lat_bounds"
    values["lat_bounds"] = (("lat", "edge"), np.zeros((4, 2)))
    values["quality"] = (
        ("lat", "lon"),
        np.zeros((4, 6), "int8"),
        {"flag_meanings": "good bad", "flag_values": [0, 1]},
    )
    values.to_netcdf(folder / "a.nc", encoding={"rain": {"_FillValue": None}})
    (event,) = events(folder)
    assert np.isnan(event["values"][0, 0]).tolist() == [True, True] + 4 * [False]
    packed = dataset(0, 3)
    packed["rain"].attrs |= {"valid_min": np.int16(0), "units": "mm", "flag_values": np.array([250], "int16")}
    encoding = {"rain": {"dtype": "int16", "scale_factor": 0.01, "_FillValue": np.int16(-9)}}
    packed["rain"].values[0, 0, :2] = -1, 2.5
    packed.to_netcdf(folder / "b.nc", encoding=encoding)
    (event,) = events(folder / "b.nc")  # the limits are those of the stored numbers
    assert np.isnan(event["values"][0, 0]).tolist() == [True, True] + 4 * [False]


# -- damage -----------------------------------------------------------------------------------------------------------


@needs("zarr")
def test_any_error_is_the_problem_of_its_file(folder):
    import zarr

    written(folder / "good.nc", dataset(0, 3))
    dataset(3, 3).assign(rain=lambda d: d["rain"].assign_attrs(scale_factor="0.1")).to_netcdf(folder / "text.nc")
    (folder / "nowhere.nc").symlink_to("/nowhere/b.nc")
    dataset(6, 3).to_zarr(folder / "chunk.zarr", consolidated=False)
    for chunk in (folder / "chunk.zarr/rain").rglob("*"):
        if chunk.is_file() and not chunk.name.startswith((".", "zarr.json")):
            chunk.write_bytes(chunk.read_bytes()[:10])
    found = problems(folder)
    assert {name for name, problem in found.items() if not problem} == {"good.nc:0"}
    assert set(found) == {"good.nc:0", "text.nc", "nowhere.nc", "chunk.zarr"}
    assert all("\n" not in problem and name in problem for name, problem in found.items() if problem)
    assert "is a link to nowhere" in found["nowhere.nc"]
    store = zarr.open_group(str(folder / "sparse.zarr"), mode="w")
    options = {"chunks": (10, 700, 1000), "fill_value": 0.0, "dimension_names": ["time", "y", "x"]}
    store.create_array("rain", shape=(3000, 700, 1000), dtype="f4", **options)[0, 0, 0] = 1.0
    plain = {"start": "2020-01-01", "time_step": "1h"}
    with pytest.raises(ValueError, match="declares 8400000000 bytes.* unless `allow_sparse`"):
        events(folder / "sparse.zarr", **plain)
    (event,) = events(folder / "sparse.zarr", allow_sparse=True, **plain)
    assert event["values"].shape == (3000, 700, 1000) and event["values"][0, 0, :2].tolist() == [1, 0]


def test_the_time_of_a_check_is_limited(folder, monkeypatch):
    from earthformer_hf.data import guards

    written(folder / "a.nc", dataset(0, 3))
    child = guards._Child()
    monkeypatch.setattr(guards, "SECONDS", 0.0)
    assert "could not be checked within 0.0 s" in child.ask(str(folder / "a.nc"), False)
    monkeypatch.setattr(guards, "SECONDS", 120)
    assert child.ask(str(folder / "a.nc"), False) is None  # by another process
    child.process.kill()


# -- parts of a grid --------------------------------------------------------------------------------------------------


def test_tiles_cover_the_grid_and_know_where_they_lie(folder):
    values = np.arange(3 * 7 * 9, dtype="float32").reshape(3, 7, 9)
    coordinates = {"time": hours("2020-01-01", 3), "lat": np.arange(7.0), "lon": 10 + np.arange(9.0)}
    written(folder / "a.nc", xr.Dataset({"rain": (("time", "lat", "lon"), values)}, coordinates))
    found = events(folder, tile=(4, 4))
    assert [event["id"] for event in found] == [f"a.nc:0:{row}:{column}" for row in (0, 3) for column in (0, 4, 5)]
    seen = np.zeros((7, 9), int)
    for event in found:
        row, column = event["geo"]["row"], event["geo"]["column"]
        np.testing.assert_array_equal(event["values"][:], values[:, row : row + 4, column : column + 4])
        assert event["geo"]["y"] == list(range(row, row + 4)) and event["geo"]["x"][0] == 10 + column
        seen[row : row + 4, column : column + 4] += 1
    assert seen.min() == 1
    (event,) = events(folder, crop=(1, 6, 2, 9))
    np.testing.assert_array_equal(event["values"][::-1], values[::-1, 1:6, 2:9])
    assert len(events(folder, crop=(1, 6, 2, 9), tile=(4, 4), stride=(1, 3))) == 2 * 2
    for options, message in [
        ({"crop": (0, 8, 0, 9)}, "`crop` must lie within 7 rows and 9 columns"),
        ({"tile": (8, 4)}, "`tile` and `stride` must be at least 1 and fit 7 rows and 9 columns"),
    ]:
        with pytest.raises(ValueError, match=message):
            events(folder, **options)


def test_coarser_pixels_are_means_of_what_was_observed(folder):
    values = np.arange(2 * 4 * 6, dtype="float32").reshape(2, 4, 6)
    values[0, :2, :2] = [[1, np.nan], [np.nan, 4]]
    values[0, :2, 2:4] = [[np.nan, np.nan], [np.nan, 4]]
    data = xr.Dataset(
        {"rain": (("time", "lat", "lon"), values)}, {"time": hours("2020-01-01", 2), "lat": np.arange(4.0)}
    )
    written(folder / "a.nc", data)
    (event,) = events(folder, coarsen=2, crop=(0, 2, 0, 2))
    np.testing.assert_array_equal(event["values"][0], [[2.5, np.nan], values[0, 2:].reshape(2, 3, 2).mean((0, 2))[:2]])
    assert event["geo"]["y"] == [0.5, 2.5]
    rates = np.array([[0.5, 8.0], [2.0, 3.0]])
    dbz = xr.Dataset({"dbz": (("y", "x"), 10 * np.log10(200 * rates**1.6), {"units": "dBZ"})})
    written(folder / "dbz/a.nc", dbz)
    (event,) = events(folder / "dbz", coarsen=2, start="2020-01-01")
    np.testing.assert_allclose(10 ** (event["values"][0] / 10), 200 * rates.mean() ** 1.6, rtol=1e-5)  # of the rain


def test_a_listing_is_kept_until_a_file_changes(folder, monkeypatch):
    from earthformer_hf.data import folder as reader
    from earthformer_hf.data.events import make_builder

    written(folder / "a.nc", dataset(0, 3))
    written(folder / "b.nc", dataset(3, 3))
    described = []
    listed = reader._listed
    monkeypatch.setattr(reader, "_listed", lambda config, path: described.append(path.name) or listed(config, path))

    def files(**options):
        described.clear()
        return make_builder("folder", folder, folder.parent / "cache", **options).files

    first = files()
    assert described == ["a.nc", "b.nc"]
    again = files()
    assert described == [] and [f["path"] for f in again] == [f["path"] for f in first]
    np.testing.assert_array_equal(again[1]["time"], first[1]["time"])
    written(folder / "c.nc", dataset(6, 3))
    assert len(files()) == 3 and described == ["c.nc"]
    files(select={"lat": 50.0})
    assert described == ["a.nc", "b.nc", "c.nc"]


# -- outages ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def outage():
    """30 frames, of which 12 to 21 were lost, and frame 5 in part."""
    values = np.arange(30.0)[:, None, None] + np.zeros((30, 4, 4))
    values[12:22] = np.nan
    values[5, :2] = np.nan
    return [{"id": "a", "values": values.astype("float32")}]


def test_windows_of_an_outage_count_for_nothing(outage, messages):
    items = windows(outage, encode, 3, 3)
    masks = [items[start]["future_observed_mask"] for start in range(len(items))]
    empty = {start for start, mask in enumerate(masks) if not mask.any()}
    # no frame of the context (start .. start + 2), or of the future, was seen
    assert empty == {9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19} == items.left_out
    assert not masks[0][2, :2].any() and masks[0][2, 2:].all()  # a future seen in part keeps its mask
    assert "1 of 25 windows so far have no observed context or future" in messages.text and "10 of 25" in messages.text
    with pytest.raises(ValueError, match="nothing was observed in the future of event 'a', frames 12 to 14"):
        windows(outage, encode, 3, 3, on_missing="stop")[9]
    with pytest.raises(ValueError, match="`on_missing` must be one of"):
        windows(outage, encode, 3, 3, on_missing="fill")


def test_training_draws_other_windows_and_always_the_same_ones(outage):
    items = windows(outage, encode, 3, 3)
    drawn, again = (TrainingWindows(items, seed=1) for _ in range(2))
    order = list(range(60))
    first = [drawn[n]["future_values"][0, 3, 0, 0].item() for n in order]
    assert all(drawn[n]["future_observed_mask"].any() for n in order)
    assert [again[n]["future_values"][0, 3, 0, 0].item() for n in order[::-1]] == first[::-1]
    lost = [{"id": "a", "values": np.full((8, 4, 4), np.nan, "float32")}]
    with pytest.raises(ValueError, match="none of 1000 windows drawn has an observed context"):
        TrainingWindows(windows(lost, encode, 3, 3), seed=0)[0]


def test_a_stream_leaves_windows_without_observation_out(outage, messages):
    event = outage[0] | {"time": hours("2020-01-01", 30).astype("datetime64[s]"), "geo": {}}
    stream = datasets.IterableDataset.from_generator(
        lambda: iter([{k: str(v) if k == "geo" else v for k, v in event.items()}])
    )
    found = list(windows(stream, encode, 3, 3))
    assert len(found) == 25 - 11 and all(item["future_observed_mask"].any() for item in found)
    assert "11 of 25 windows of event 'a' have no observed context or future: left out" in messages.text
