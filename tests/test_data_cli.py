"""`earthformer-hf data`: what can be used is written, what cannot is named with its file and row."""

import zipfile

import datasets
import h5py
import numpy as np
import pytest
import xarray as xr
from test_source_sevir import BEFORE, SUMMER, write_catalogue, write_raster
from tiny import DATA
from typer.testing import CliRunner

from earthformer_hf import EarthformerFeatureExtractor, load_dataset, windows
from earthformer_hf.cli import app
from earthformer_hf.data.events import as_event
from earthformer_hf.plotting import plot_events


def run(*command):
    return CliRunner().invoke(app, ["data", *map(str, command)])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def damage(path, row):
    """Overwrite the compressed frames of an event."""
    with h5py.File(path) as file:
        place = file["vil"].id.get_chunk_info_by_coord((row, 0, 0, 0)).byte_offset
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 1000)


@pytest.fixture
def sevir_lr(tmp_path):
    """SEVIR-LR with a trap in every other row."""
    folder = tmp_path / "sevir_lr"
    packed = {"chunks": (1, 128, 128, 25), "compression": "gzip", "compression_opts": 1}
    values = write_raster(folder / "data" / "vil/good.h5", 4, **packed)
    damage(folder / "data" / "vil/good.h5", 2)
    write_raster(folder / "data" / "vil/other.h5", 1, grid=(64, 25, "uint8"))
    write_raster(folder / "data" / "vil/wide.h5", 1, grid=(128, 25, "int16"))
    (folder / "data/vil/cut.h5").write_bytes((folder / "data/vil/other.h5").read_bytes()[:-500])
    with h5py.File(folder / "data/vil/link.h5", "w") as file:
        file["vil"] = h5py.ExternalLink("/etc/hostname", "/")
    rows = [
        ("S0", "vil/good.h5", 0, "vil", BEFORE, 0),
        ("S1", "vil/good.h5", 4, "vil", BEFORE, 0),
        ("S2", "vil/good.h5", 1, "vil", SUMMER, 0),
        ("S3", "vil/good.h5", 2, "vil", SUMMER, 0),
        ("S4", "vil/missing.h5", 0, "vil", SUMMER, 0),
        ("S5", "vil/other.h5", 0, "vil", SUMMER, 0),
        ("S6", "vil/wide.h5", 0, "vil", SUMMER, 0),
        ("S7", "vil/cut.h5", 0, "vil", SUMMER, 0),
        ("S8", "vil/link.h5", 0, "vil", SUMMER, 0),
        ("S9", "vil/good.h5", 3, "vil", SUMMER, 0),
    ]
    write_catalogue(folder, rows)
    return folder, values


def test_prepare_writes_the_good_and_names_the_bad(tmp_path, sevir_lr):
    folder, values = sevir_lr
    command = ("prepare", "sevir-lr", tmp_path / "out", "--data-dir", folder, "--max-shard-size", "800KB")
    result = run(*command)
    assert result.exit_code == 1 and "error: 7 events cannot be used" in result.output
    bad = [line.removeprefix("left out: ") for line in result.output.splitlines() if line.startswith("left out")]
    expected = {
        "train, event 'S1'": "vil/good.h5, row 4: .*4 rows",
        "test, event 'S3'": "good.h5, .*row 2.*`values`: .*",
        "test, event 'S4'": "vil/missing.h5, row 0: does not exist",
        "test, event 'S5'": r"vil/other.h5, row 0: .*\(1, 64, 64, 25\)",
        "test, event 'S6'": "vil/wide.h5, row 0: .*int16",
        "test, event 'S7'": "vil/cut.h5, row 0: .*truncated",
        "test, event 'S8'": "vil/link.h5, row 0: .*link to elsewhere",
    }
    assert len(bad) == len(expected)
    for line, (start, words) in zip(bad, expected.items()):
        assert line.startswith(start)
        with pytest.raises(ValueError, match=words):
            raise ValueError(line)
    for split, rows in {"train": [0], "test": [1, 3]}.items():
        events = [as_event(row) for row in datasets.load_dataset(str(tmp_path / "out"), split=split, streaming=True)]
        for row, event in zip(rows, events, strict=True):
            np.testing.assert_array_equal(event["values"], values[row].transpose(2, 0, 1))
    again = run(*command)
    assert again.exit_code == 1 and again.output.count("left out") == 7

    info = run("info", "sevir-lr", "--data-dir", folder)
    assert info.exit_code == 1 and "event 'S3'" in info.output  # whose frames are only found bad when they are read
    info = run("info", "sevir-lr", "--data-dir", folder, "--sample", 1)
    assert info.exit_code == 0 and "units:              1\n" in info.output
    assert "test:               3 events, 75 frames, 5 events cannot be used; 0.000% missing in" in info.output
    info = run("info", tmp_path / "out")
    assert info.exit_code == 0 and "| test | 2 | 50 |" in info.output and bad[0] in info.output


def test_a_table_without_leave_for_bad_events(tmp_path, sevir_lr):
    folder, _ = sevir_lr
    with pytest.raises(ValueError, match="sevir-lr, event 'S1': vil/good.h5, row 4"):
        load_dataset("sevir-lr", folder, cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="sevir-lr, event 'S4': vil/missing.h5, row 0"):
        load_dataset("sevir-lr", folder, "test", cache_dir=tmp_path / "cache")
    table = load_dataset("sevir-lr", folder, "test", keep_bad=True, cache_dir=tmp_path / "cache")
    encode = EarthformerFeatureExtractor().encode
    assert len(windows(table.with_format(None).select([0, 7]), encode, 13, 12)) == 2
    items = windows(table, encode, 13, 12)
    with pytest.raises(ValueError, match="event 'S3' .*good.h5.* row 2"):
        items[1]
    with pytest.raises(ValueError, match="26 frames or more, the longest has 25"):
        windows(table, encode, 13, 13)


def test_times_that_do_not_rise(tmp_path):
    (tmp_path / "mine").mkdir()
    values = np.random.default_rng(0).normal(size=(6, 4, 5)).astype("float32")
    time = np.datetime64("2020-01-01", "ns") + np.arange(6) * np.timedelta64(1, "h")
    for name, order in {"good.nc": slice(None), "bad.nc": [0, 1, 3, 2, 4, 5]}.items():
        shifted = time[order] + (np.timedelta64(30, "D") if name == "bad.nc" else np.timedelta64(0, "D"))
        grid = xr.Dataset({"rain": (("time", "y", "x"), values)}, {"time": shifted})
        grid.to_netcdf(tmp_path / "mine" / name)
    options = ("--data-dir", tmp_path / "mine", "-o", "fractions=[1, 0, 0]")
    result = run("prepare", "folder", tmp_path / "out", *options)
    assert result.exit_code == 1 and "bad.nc" in result.output and "frame 3" in result.output
    (row,) = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True)
    np.testing.assert_array_equal(as_event(row)["values"], values)


def test_wrong_commands(tmp_path):
    write_catalogue(tmp_path / "lr", [])
    for command, words in {
        ("info", "nothing/"): "nothing",
        ("info", "sevir-lr", "--data-dir", tmp_path / "absent"): "absent does not exist",
        ("info", "sevir-lr", "--data-dir", tmp_path / "lr", "-o", "color=blue"): "got ['color']",
        ("info", "sevir-lr", "--data-dir", tmp_path / "lr", "-o", "color"): "NAME=VALUE",
        ("info", "sevir-lr", "--data-dir", tmp_path / "lr", "-o", "color=[1"): "--option color",
        ("preview", "sevir-lr", tmp_path / "a.png", "--data-dir", tmp_path / "lr", "--split", "dev"): "`--split`",
        ("prepare", "nothing", tmp_path / "out"): "`name` must be one of",
        ("push", tmp_path, "someone/events"): "SHA256SUMS",
        ("downsample", tmp_path / "absent", tmp_path / "out"): "CATALOG.csv",
    }.items():
        result = run(*command)
        assert result.exit_code == 1 and words in result.output, (command, result.output)
        assert "Traceback" not in result.output


def test_a_preview_that_cannot_be_written(tmp_path, sevir_lr):
    (tmp_path / "file").touch()
    for output, words in {tmp_path / "a.nothing": "nothing", tmp_path / "file" / "a.png": "file"}.items():
        result = run("preview", "sevir-lr", output, "--data-dir", sevir_lr[0])
        assert type(result.exception) is SystemExit and result.exit_code == 1, result.exception
        last = result.output.strip().splitlines()[-1]
        assert last.startswith("error: ") and words in last


def test_downsample(tmp_path):
    values = write_raster(tmp_path / "sevir/data/vil/a.h5", 1, grid=(384, 49, "uint8"))
    write_catalogue(tmp_path / "sevir", [("S0", "vil/a.h5", 0, "vil", SUMMER, 0)])
    result = run("downsample", tmp_path / "sevir", tmp_path / "lr")
    assert result.exit_code == 0, result.output
    (event,) = load_dataset("sevir-lr", tmp_path / "lr", "test", streaming=True)
    blocks = values[0, ..., ::2].reshape(128, 3, 128, 3, 25).max((1, 3))
    np.testing.assert_array_equal(event["values"], blocks.transpose(2, 0, 1))


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_a_contact_sheet():
    rows = {"a": np.arange(24.0).reshape(3, 2, 4), "b": np.full((2, 2, 4), np.nan)}
    figure = plot_events(rows, {"a": ["1", "2", "3"], "b": ["4", "5"]}, "rain, mm/h", "a test")
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in maps] == ["1", "2", "3", "4", "5"]
    np.testing.assert_array_equal(maps[1].images[0].get_array(), rows["a"][1])
    assert maps[3].images[0].get_array().mask.all()
    assert len({image.get_clim() for axis in maps for image in axis.images}) == 1
    assert figure.axes[-1].get_ylabel() == "rain, mm/h"


@pytest.mark.skipif(not (DATA / "radar_open_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
def test_a_preview_of_real_radar(tmp_path):
    result = run("preview", "open-radar", tmp_path / "a.png", "--data-dir", DATA, "--split", "test", "--events", 2)
    assert result.exit_code == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG"), result.output


def test_own_files_by_plain_text_options_and_the_reasons_of_bad_ones(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for hour in range(3):
        np.save(folder / f"r_2020010100{hour:02d}.npy", np.full((1, 4, 4), hour, "float32"))
    (folder / "r_202001010003.npy").write_bytes(b"no array")
    options = ["-o", "name_time=r_%Y%m%d%H%M.npy", "-o", "pattern=*.npy", "-o", "time_step=1m"]
    result = run("info", "folder", "--data-dir", folder, *options)
    assert result.exit_code == 0 and "1 events, 2 frames, 1 events cannot be used" in result.output
    assert f"  r_202001010003.npy: {folder / 'r_202001010003.npy'}: is not npy" in result.output
    result = run("info", "folder", "--data-dir", folder, "-o", "pattern=*3.npy", *options[:2])
    assert result.exit_code == 1 and "is not npy" in result.output and "no event can be used" in result.output


def test_an_archive_is_unpacked_or_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("deep/x.txt", "x" * 2000)
    result = run("unpack", tmp_path / "a.zip", tmp_path / "out", "--limit", "2KB")
    assert result.exit_code == 0 and (tmp_path / "out/deep/x.txt").read_text() == "x" * 2000
    for folder, limit in ((tmp_path / "out", "2KB"), (tmp_path / "small", "1KB")):
        result = run("unpack", tmp_path / "a.zip", folder, "--limit", limit)
        assert result.exit_code == 1 and result.output.startswith("error: ")
    assert not (tmp_path / "small").exists()


def test_options_may_hold_brackets_and_what_is_done_anyway(tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("a.nc", "z.nc"):
        values = xr.DataArray(np.ones((3, 2, 2)), dims=("time", "y", "x"))
        time = np.datetime64("2020-01-01", "ns") + np.arange(3) * np.timedelta64(1, "h")
        values.assign_coords(time=time + np.timedelta64(9 * (name == "z.nc"), "h")).to_dataset(name="rate").to_netcdf(
            tmp_path / "files" / name
        )
    options = ("-o", "pattern=[a-c]*.nc", "-o", "keep_bad=true", "-o", "fractions=[1, 0, 0]")
    result = run("info", "folder", "--data-dir", tmp_path / "files", *options)
    assert result.exit_code == 0 and "1 events, 3 frames" in result.output, result.output


def test_info_says_what_the_events_of_a_folder_are(tmp_path):
    (tmp_path / "files").mkdir()
    time = np.datetime64("2020-01-01", "ns") + np.arange(4) * np.timedelta64(5, "m")
    places = {name: (name, 3000.0 * np.arange(6), {"units": "m"}) for name in "yx"}
    values = xr.DataArray(np.ones((4, 6, 6)), dims=("time", "y", "x"), attrs={"units": "mm/h"})
    values.assign_coords(time=time, **places).to_dataset(name="rate").to_netcdf(tmp_path / "files/a.nc")
    result = run("info", "folder", "--data-dir", tmp_path / "files/a.nc", "-o", "fractions=[1, 0, 0]")
    assert result.exit_code == 0 and "in mm/h, 6 x 6 pixels, grid spacing 3 km, time step 5m" in result.output
