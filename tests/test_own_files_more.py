"""Own files of kinds that were once read wrongly: each with its right value."""

import h5py
import numpy as np
import pytest
import xarray as xr
from netCDF4 import Dataset

from earthformer_hf.data import from_folder
from earthformer_hf.data.events import Events, usable
from earthformer_hf.data.file_joining import DATED_FOLDER
from earthformer_hf.data.sst_anomalies import sst_anomalies


HOUR = np.timedelta64(1, "h")
START = np.datetime64("2020-01-01", "ns")


def write(path, values, first=0, step=HOUR, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    time = START + first * HOUR + np.arange(len(values)) * step
    array = xr.DataArray(
        np.asarray(values, "float32"), dims=("time", "y", "x"), coords={"time": time}, attrs=attributes
    )
    array.to_dataset(name="rate").to_netcdf(path)


def events(tmp_path, folder, **options):
    table = from_folder(folder, split="train", fractions=(1, 0, 0), cache_dir=tmp_path / "cache", **options)
    return list(Events(usable(table, "folder")))


def test_a_valid_range_in_unpacked_units_is_not_scaled_again(tmp_path):
    path = tmp_path / "files/packed.nc"
    path.parent.mkdir()
    for packed, expected in (
        (np.array([0.0, 200.0]), [1, 30, np.nan]),
        (np.array([0, 2000], "int16"), [1, np.nan, np.nan]),
    ):
        with Dataset(path, "w") as file:
            for name, size in (("time", 3), ("y", 2), ("x", 2)):
                file.createDimension(name, size)
            time = file.createVariable("time", "f8", ("time",))
            time.units, time[:] = "hours since 2020-01-01", [0, 1, 2]
            rain = file.createVariable("rain", "i2", ("time", "y", "x"))
            rain.scale_factor = 0.01
            rain.set_auto_maskandscale(False)
            rain[:] = np.array([100, 3000, 30000])[:, None, None]
        with h5py.File(path, "a") as file:
            file["rain"].attrs["valid_range"] = packed  # netCDF4 would write it in the type of the field
        (event,) = events(tmp_path, path.parent)
        np.testing.assert_allclose(event["values"][:, 0, 0], expected, rtol=1e-5)
        path.unlink()


def test_several_flags_are_missing_and_the_field_stays(tmp_path):
    values = np.array([1.0, -1, -2, 4])[:, None, None] * np.ones((2, 2))
    flags = {"flag_values": np.array([-1.0, -2.0]), "flag_meanings": "clutter outage", "units": "mm/h"}
    write(tmp_path / "files/a.nc", values, **flags)
    (event,) = events(tmp_path, tmp_path / "files")
    np.testing.assert_array_equal(event["values"][:, 0, 0], [1, np.nan, np.nan, 4])


@pytest.mark.parametrize("quantity, dry", [("RATE", 0.0), ("DBZH", -32.0)])
def test_no_echo_of_a_composite_is_dry_and_no_data_is_missing(tmp_path, quantity, dry):
    (tmp_path / "files").mkdir()
    for hour in range(2):
        with h5py.File(tmp_path / f"files/{hour}.h5", "w") as file:
            file.create_group("what").attrs.update(object="COMP", date="20200101", time=f"{hour:02d}0000")
            data = file.create_group("dataset1/data1")
            data["data"] = np.array([[-8888000.0, 23.0], [-9999000.0, 5.0]])
            data.create_group("what").attrs.update(
                quantity=quantity, gain=1.0, offset=0.0, nodata=-9999000.0, undetect=-8888000.0
            )
    (event,) = events(tmp_path, tmp_path / "files")
    np.testing.assert_array_equal(event["values"][1], np.array([[dry, 23], [np.nan, 5]], "float32"))


def test_a_copy_of_a_refused_file_is_not_lost(tmp_path):
    """a and b agree, c contradicts both: all frames are in an event or named."""
    good, other = np.ones((3, 2, 2)), np.full((3, 2, 2), 2.0)
    for name, values in (("a", good), ("b", good), ("c", other)):
        write(tmp_path / f"files/{name}.nc", values)
    table = from_folder(
        tmp_path / "files", split="train", fractions=(1, 0, 0), cache_dir=tmp_path / "cache", keep_bad=True
    ).with_format(None)
    problems = {row["id"]: row["problem"] for row in table if row["problem"]}
    held = {row["id"].partition(":")[0] for row in table if not row["problem"]}
    assert held | problems.keys() == {"a.nc", "b.nc", "c.nc"} and "c.nc" in problems


def test_numbers_of_stations_are_no_dates(tmp_path):
    for name in (
        "2020",
        "07",
        "20200715",
        "2020-07-15",
        "2020_07",
        "20200715T1230",
        "year=2020",
        "month=07",
        "hour=12",
    ):
        assert DATED_FOLDER.fullmatch(name), name
    for name in ("06410", "06477", "10392", "0_5", "3067", "1.5", "99"):
        assert not DATED_FOLDER.fullmatch(name), name
    for station, value in (("06410", 1.0), ("06477", 2.0)):
        write(tmp_path / f"files/{station}/2020/a.nc", np.full((4, 2, 2), value))
    found = events(tmp_path, tmp_path / "files")
    assert sorted(float(np.unique(event["values"][:]).item()) for event in found) == [1, 2]


def test_fractions_of_a_day_are_whole_seconds(tmp_path):
    values = np.ones((6, 2, 2), "float32")
    days = xr.DataArray(np.arange(6) * 5 / 1440, dims="time", attrs={"units": "days since 2020-01-01"})
    (tmp_path / "files").mkdir()
    xr.Dataset({"rate": (("time", "y", "x"), values)}, {"time": days}).to_netcdf(tmp_path / "files/a.nc")
    (event,) = events(tmp_path, tmp_path / "files")
    np.testing.assert_array_equal(np.diff(event["time"]), np.timedelta64(300, "s"))
    assert event["time"][5] == np.datetime64("2020-01-01T00:25:00")


def test_a_ring_of_links_is_one_bad_file(tmp_path):
    write(tmp_path / "files/a.nc", np.ones((3, 2, 2)))
    (tmp_path / "files/ring.nc").symlink_to(tmp_path / "files/ring.nc")
    (event,) = events(tmp_path, tmp_path / "files", keep_bad=True)
    assert event["values"].shape == (3, 2, 2)


def test_nodes_beyond_a_regional_source_are_missing(tmp_path):
    lat, lon, months = np.arange(-30.0, 31), np.arange(120.0, 281), np.datetime64("2000-01", "M") + np.arange(24)
    values = 20 + np.sin(np.arange(24))[:, None, None] + np.zeros((24, len(lat), len(lon)))
    coordinates = {"time": months.astype("datetime64[ns]"), "lat": lat, "lon": lon}
    xr.Dataset({"sst": (("time", "lat", "lon"), values, {"units": "degC"})}, coordinates).to_netcdf(tmp_path / "in.nc")
    sst_anomalies(tmp_path / "in.nc", tmp_path / "out.nc", (2000, 2001))
    with xr.open_dataset(tmp_path / "out.nc") as written:
        known = np.isfinite(written.ssta).all("time")
        assert known.sum() == 13 * 33 - 4  # of the corners, less than half is observed
        assert not known.sel(lat=60, lon=0) and not known.sel(lat=-30, lon=120) and known.sel(lat=-30, lon=125)
    with pytest.raises(ValueError, match="`target` must be another file than the source"):
        sst_anomalies(tmp_path / "in.nc", tmp_path / "in.nc", (2000, 2001))


@pytest.mark.parametrize(
    "options",
    [
        {"start": "yesterday"},
        {"coarsen": 0},
        {"coarsen": 2.5},
        {"tile": 2},
        {"tile": (8,)},
        {"stride": 1},
        {"crop": (0, 2)},
        {"crop": (0, 2, 0, 2.5)},
        {"pattern": [1]},
        {"series": "("},
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(tmp_path, options):
    write(tmp_path / "files/a.nc", np.ones((3, 2, 2)))
    with pytest.raises(ValueError, match=f"^`{next(iter(options))}` must be "):
        events(tmp_path, tmp_path / "files", **options)


def test_a_damaged_file_and_its_frames_are_named(tmp_path):
    write(tmp_path / "files/a.nc", np.ones((3, 2, 2)))
    write(tmp_path / "files/b.nc", np.ones((3, 2, 2)), first=3)
    (event,) = events(tmp_path, tmp_path / "files")
    (tmp_path / "files/b.nc").write_bytes(b"no NetCDF")
    with pytest.raises(ValueError, match="b.nc") as refused:
        event["values"][2:5]
    assert str(refused.value).count("b.nc") == 1
