"""A user's own files: what they state of values, times and places, and what may be joined."""

import h5py
import numpy as np
import pytest
import xarray as xr
from test_own_files import folder, messages, problems, raw_times, written  # noqa: F401  fixtures
from test_source_folder import dataset, events, numbers

from earthformer_hf.data.events import make_builder
from earthformer_hf.data.file_joining import series_of
from earthformer_hf.data.sst_anomalies import _on_nodes, sst_anomalies


def test_a_range_of_unpacked_values(folder):  # noqa: F811
    data = dataset(0, 2)
    data["rain"].values[:, 0, :3] = 1, 30, 250
    data["rain"].attrs["valid_range"] = np.array([0, 200], "float32")
    packed = {"rain": {"dtype": "int16", "scale_factor": 0.01, "_FillValue": np.int16(-1)}}
    data.to_netcdf(folder / "a.nc", encoding=packed)
    np.testing.assert_allclose(events(folder)[0]["values"][0, 0, :3], [1, 30, np.nan], rtol=1e-6)


def test_two_flags_beside_units(folder):  # noqa: F811
    data = dataset(0, 2)
    data["rain"].attrs |= {"units": "mm", "flag_values": np.array([-1, -2], "float32"), "flag_meanings": "dry lost"}
    data["rain"].values[0, 0, :3] = -1, -2, 5
    written(folder / "a.nc", data)
    np.testing.assert_array_equal(events(folder)[0]["values"][0, 0, :3], [np.nan, np.nan, 5])


def odim(path, products, quantity="DBZH"):
    with h5py.File(path, "w") as file:
        file.create_group("what").attrs.update(object="COMP", date="20200101", time="120000")
        for number in range(1, products + 1):
            file[f"dataset{number}/data1/data"] = np.array([[-9999000.0, -8888000, 23 + number]])
            what = {"gain": 1.0, "offset": 0.0, "nodata": -9999000.0, "undetect": -8888000.0}
            what |= {"quantity": quantity} if quantity else {}
            file.create_group(f"dataset{number}/data1/what").attrs.update(what)


def test_what_an_odim_file_did_not_detect_and_its_places(folder):  # noqa: F811
    odim(folder / "a.h5", 1)
    for options in ({}, {"variable": "DBZH"}, {"variable": "dataset1/data1"}, {"variable": "dataset1/data1/data"}):
        np.testing.assert_array_equal(events(folder, **options)[0]["values"][0], [[np.nan, -32, 24]])
    with pytest.raises(ValueError, match="composite of ODIM without maps in 'dataset7'"):
        events(folder, variable="dataset7/data1")
    odim(folder / "b.h5", 2)
    with pytest.raises(ValueError, match=r"\['dataset1/data1', 'dataset2/data1'\]"):
        events(folder / "b.h5")
    np.testing.assert_array_equal(
        events(folder / "b.h5", variable="dataset2/data1")[0]["values"][0], [[np.nan, -32, 25]]
    )
    odim(folder / "c.h5", 1, None)
    np.testing.assert_array_equal(events(folder / "c.h5")[0]["values"][0], [[np.nan, np.nan, 24]])


def test_files_that_differ_are_named(folder, messages):  # noqa: F811
    for number, (change, reason) in enumerate(
        [
            (lambda d: d.rename(rain="precip"), "the variable"),
            (lambda d: d.isel(lat=slice(0, 3)), "the shape"),
            (lambda d: d.isel(lat=slice(None, None, -1)), "y, whose order is reversed"),
            (lambda d: d.assign(rain=d["rain"].assign_attrs(units="mm")), "the units"),
        ]
    ):
        first, second = dataset(0, 3), dataset(3, 3)
        for data in (first, second):
            data["rain"].attrs["units"] = "mm/h"
        written(folder / f"{number}/a.nc", first)
        written(folder / f"{number}/b.nc", change(second))
        messages.clear()
        assert len(events(folder / f"{number}")) == 2
        assert f"b.nc and a.nc differ in {reason}" in messages.text
    second["rain"].attrs["units"] = "mm h-1"
    written(folder / "same/a.nc", first)
    written(folder / "same/b.nc", second)
    assert [numbers(event) for event in events(folder / "same")] == [list(range(6))]


def test_numbers_of_stations_are_no_dates_and_each_series_has_its_step(folder):  # noqa: F811
    from pathlib import Path

    for name in ("06410", "06477", "radar1", "201013", "20201301", "123"):
        assert series_of(Path(f"{name}/a.nc"), None) == (name,)
    for name in ("2020", "01", "202001", "20200131", "2020-01-31", "2020013112", "month=1", "2020/123"):
        assert series_of(Path(f"{name}/a.nc"), None) == ()
    step = np.timedelta64(5, "m")
    start = np.datetime64("2020-01-01", "ns")
    written(folder / "06410/a.nc", dataset(0, 10, time=start + step * np.arange(10)))
    written(folder / "06477/a.nc", dataset(0, 6, time=start + 2 * step * np.arange(6)))
    assert sorted(len(event["values"]) for event in events(folder)) == [6, 10]


def test_fractions_of_days_are_rounded(folder):  # noqa: F811
    raw_times(folder / "a.nc", "days since 1970-01-01", np.arange(24) * 5 / 1440 + 18262)
    (event,) = events(folder)
    np.testing.assert_array_equal(event["time"], np.datetime64("2020-01-01", "s") + 300 * np.arange(24))


def test_a_repaired_file_is_read_again_and_a_ring_of_links_is_named(folder, monkeypatch):  # noqa: F811
    from earthformer_hf.data import folder as reader

    written(folder / "a.nc", dataset(0, 3))
    listed = reader._listed
    monkeypatch.setattr(reader, "_listed", lambda config, path: {"path": str(path), "problem": "no library"})
    assert problems(folder) == {"a.nc": "no library"}
    monkeypatch.setattr(reader, "_listed", listed)
    builder = make_builder("folder", folder / "a.nc", folder.parent / "cache", keep_bad=True)  # one file
    assert [file["name"] for file in builder.files] == ["a.nc"]
    assert len(make_builder("folder", folder, folder.parent / "cache", keep_bad=True).files[0]["time"]) == 3
    (folder / "self").symlink_to("self")
    (folder / "b.nc").symlink_to("b.nc")
    found = problems(folder)
    assert set(found) == {"a.nc:0", "b.nc"} and "is a link to nowhere" in found["b.nc"]


def test_a_node_outside_the_source_is_missing(tmp_path):
    lat, lon = np.arange(-30.0, 31), np.arange(120.0, 281)
    nodes = _on_nodes(np.ones((1, len(lat), len(lon))), lat, lon)[0]
    seen = np.isfinite(nodes)
    assert seen[5:18, 25:56].all() and seen[6:17, 24:57].all()  # -30..30, 120..280
    assert seen.sum() == 13 * 33 - 4  # of its corners, 0.36 is covered
    single = xr.Dataset({"sst": (("time", "lat", "lon"), np.ones((1, 1, 3)))}, {"lat": [0.0], "lon": [0.0, 1, 2]})
    single["time"] = np.array(["2000-01"], "datetime64[ns]")
    single.to_netcdf(tmp_path / "a.nc")
    with pytest.raises(ValueError, match="must have two latitudes and longitudes or more"):
        sst_anomalies(tmp_path / "a.nc", tmp_path / "b.nc")
    with pytest.raises(ValueError, match="`target` must be another file than the source"):
        sst_anomalies(tmp_path / "a.nc", tmp_path / "a.nc")
