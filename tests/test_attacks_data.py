"""Hostile and damaged data files, made here: none fills the memory, reads files of this machine or harms others."""

import json
import os
import shutil
import sys
import tarfile
import warnings
import zipfile
import zlib

import datasets
import h5py
import numpy as np
import pytest
import torch
from test_hosted import FACTS, encode, event, table_of
from test_source_folder import dataset, frames, needs
from tiny import ROOT

from earthformer_hf import windows
from earthformer_hf.data import load_dataset
from earthformer_hf.data.events import as_event
from earthformer_hf.data.guards import check_files, extract, load_npz, open_dataset, open_hdf5
from earthformer_hf.data.hosted import cached, prepare


sys.path.insert(0, str(ROOT / "conversion"))

from checkpoints import load_tensors  # noqa: E402


@pytest.fixture(scope="module")
def zeros():
    """2 GiB of zeros, deflated to 2 MB."""
    packer, block = zlib.compressobj(1), bytes(2**24)
    first, another = (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + 127 * another  # of which each stands on its own


# -- bombs ------------------------------------------------------------------------------------------------------------


def test_a_late_chunk_of_hdf5_that_declares_2_gib(tmp_path, zeros):
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file["fine"] = np.arange(6)
        data = file.create_dataset("data", (3, 2**31 - 1), "uint8", chunks=(1, 2**31 - 1), compression="gzip")
        data.id.write_direct_chunk((2, 0), zeros)
    assert os.path.getsize(tmp_path / "bomb.h5") < 16e6
    with pytest.raises(ValueError, match=r"'/data' has a chunk at \(2, 0\) of \d+ bytes that declares 214748"):
        open_hdf5(tmp_path / "bomb.h5")


@pytest.mark.parametrize("filters", [{"compression": "gzip"}, {"compression": "gzip", "shuffle": True}])
def test_a_late_chunk_of_hdf5_that_holds_more_than_it_declares(tmp_path, zeros, filters):
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        data = file.create_dataset("data", (64, 1024, 1024), "uint8", chunks=(1, 1024, 1024), **filters)
        for frame in range(63):
            data[frame] = np.full((1024, 1024), frame)
        data.id.write_direct_chunk((63, 0, 0), zeros)
    with pytest.raises(ValueError, match=r"'/data' has a chunk at \(63, 0, 0\) that decodes to more than the 1048576"):
        open_hdf5(tmp_path / "bomb.h5")


def test_a_chunk_that_is_deflated_twice(tmp_path, zeros):
    """2 GiB of 10 KB."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((1, 64, 64))
    creation.set_deflate(9)
    creation.set_filter(1, 0, (9,))
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        space = h5py.h5s.create_simple((3, 64, 64))
        data = h5py.Dataset(h5py.h5d.create(file.id, b"data", h5py.h5t.NATIVE_UINT8, space, creation))
        data[:2] = np.ones((2, 64, 64))
        data.id.write_direct_chunk((2, 0, 0), zlib.compress(zeros))
    assert os.path.getsize(tmp_path / "bomb.h5") < 1e5
    with pytest.raises(ValueError, match=r"'/data' has a chunk at \(2, 0, 0\) that decodes to more than the 4096"):
        open_hdf5(tmp_path / "bomb.h5")


@pytest.mark.parametrize("filters, mask", [([2, 1], 0b01), ([1, 3], 0b10)])
def test_a_chunk_that_leaves_out_another_filter_than_the_packing_one(tmp_path, zeros, filters, mask):
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((1, 64, 64))
    for number in filters:
        creation.set_filter(number, 0, (1,))
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        space = h5py.h5s.create_simple((3, 64, 64))
        data = h5py.Dataset(h5py.h5d.create(file.id, b"data", h5py.h5t.NATIVE_UINT8, space, creation))
        data.id.write_direct_chunk((2, 0, 0), zeros, mask)
    with pytest.raises(ValueError, match=r"'/data' has a chunk at \(2, 0, 0\) that decodes to more than the 4096"):
        open_hdf5(tmp_path / "bomb.h5")


@pytest.mark.parametrize("value", ["x" * 10**7, np.zeros(10**7, "uint8")], ids=["text", "list"])
def test_texts_or_lists_that_are_one_of_10_mb(tmp_path, value):
    kind = h5py.string_dtype() if isinstance(value, str) else h5py.vlen_dtype("uint8")
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        data = file.create_dataset("time", (1000,), kind, chunks=(1000,))
        data[0] = value
        data.id.write_direct_chunk((0,), data.id.read_direct_chunk((0,))[1][:16] * 1000)
    with pytest.raises(ValueError, match="'/time' takes more memory than a file of 100"):
        open_hdf5(tmp_path / "bomb.h5")


def test_honest_chunks_pass(tmp_path):
    """Large ones that are not packed or packed little, blank ones, and a damaged one, which its reader finds."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 1024, 1024), "uint8")
    with h5py.File(tmp_path / "fine.h5", "w") as file:
        file.create_dataset("noise", data=noise, chunks=(1, 1024, 1024), compression="gzip", fletcher32=True)
        file.create_dataset("blank", (8, 4096, 4096), "uint8", chunks=(1, 4096, 4096), compression="gzip")[0] = (
            np.zeros((4096, 4096))
        )
        file.create_dataset("lzf", data=noise, chunks=(2, 1024, 1024), compression="lzf", shuffle=True)
        damaged = file.create_dataset("damaged", data=noise, chunks=(1, 1024, 1024), compression="gzip")
        damaged.id.write_direct_chunk((1, 0, 0), noise[0].tobytes())
    file = open_hdf5(tmp_path / "fine.h5")
    assert np.array_equal(file["noise"][:], noise) and np.array_equal(file["lzf"][:], noise)
    with pytest.raises(OSError):
        file["damaged"][1]


def test_an_array_cut_into_43_million_chunks(tmp_path):
    with h5py.File(tmp_path / "cut.h5", "w") as file:
        file.create_dataset("data", (6600, 6600), "uint8", chunks=(1, 1))
    with pytest.raises(ValueError, match="'/data' is cut into 43560000 chunks of 1 bytes; not read"):
        open_hdf5(tmp_path / "cut.h5")
    zarr = pytest.importorskip("zarr")
    for version in (2, 3):
        store = tmp_path / f"{version}.zarr"
        zarr.create_array(store, name="data", shape=(6600, 6600), chunks=(1, 1), dtype="uint8", zarr_format=version)
        assert "data' is cut into 43560000 chunks of 1 bytes" in check_files([store])[store]


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_of_zarr_that_declares_2_gib(tmp_path, zeros, version):
    zarr, numcodecs = pytest.importorskip("zarr"), pytest.importorskip("numcodecs")
    group = zarr.open_group(tmp_path / "bomb.zarr", mode="w", zarr_format=version)
    codec = zarr.codecs.GzipCodec() if version == 3 else numcodecs.Zlib()
    group.create_array("data", shape=(3, 2**31), chunks=(1, 2**31), dtype="uint8", compressors=codec)
    place = tmp_path / "bomb.zarr" / "data" / ("c/2/0" if version == 3 else "2.0")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(zeros)
    problem = check_files([tmp_path / "bomb.zarr"])[tmp_path / "bomb.zarr"]
    assert f"{place}' has {len(zeros)} bytes and declares {2**31}; not read" in problem


def test_a_chunk_of_zarr_that_holds_more_than_it_declares(tmp_path, zeros):
    zarr, numcodecs = pytest.importorskip("zarr"), pytest.importorskip("numcodecs")
    group = zarr.open_group(tmp_path / "bomb.zarr", mode="w", zarr_format=2)
    array = group.create_array("data", shape=(64, 64), chunks=(1, 64), dtype="uint8", compressors=numcodecs.Zlib())
    array[:63] = 1
    (tmp_path / "bomb.zarr" / "data" / "63.0").write_bytes(zeros)
    problem = check_files([tmp_path / "bomb.zarr"])[tmp_path / "bomb.zarr"]
    assert "data' has a chunk [63, 0] that decodes to more than it declares; not read" in problem


def zarr_bomb(path, **options):
    """An array of version 3, and 2 GB that fit its codec, Zstandard."""
    zarr, numcodecs = pytest.importorskip("zarr"), pytest.importorskip("numcodecs")
    options = {"dtype": "uint8", "compressors": zarr.codecs.ZstdCodec()} | options
    zarr.open_group(path, mode="w", zarr_format=3).create_array("data", **options)
    return numcodecs.Zstd(1).encode(np.zeros(2**31 - 2**20, "uint8"))


def test_a_chunk_of_zarr_without_dimensions(tmp_path):
    bomb = zarr_bomb(tmp_path / "bomb.zarr", shape=(), dimension_names=())
    (tmp_path / "bomb.zarr/data/c").write_bytes(bomb)
    problem = check_files([tmp_path / "bomb.zarr"])[tmp_path / "bomb.zarr"]
    assert "data' has a chunk [] that decodes to more than it declares; not read" in problem


def test_a_chunk_within_a_shard_of_zarr(tmp_path):
    crc32c = pytest.importorskip("google_crc32c")
    options = {"shape": (64, 64), "chunks": (1, 64), "shards": (64, 64), "dimension_names": ("y", "x")}
    bomb = zarr_bomb(tmp_path / "bomb.zarr", **options)
    sys.modules["zarr"].open_array(tmp_path / "bomb.zarr/data")[:] = 1
    place = tmp_path / "bomb.zarr/data/c/0/0"
    chunks, index = place.read_bytes()[: -64 * 16 - 4], place.read_bytes()[-64 * 16 - 4 : -4]
    index = index[:-16] + np.array([len(chunks), len(bomb)], "<u8").tobytes()
    place.write_bytes(chunks + bomb + index + crc32c.value(index).to_bytes(4, "little"))
    problem = check_files([tmp_path / "bomb.zarr"])[tmp_path / "bomb.zarr"]
    assert "data' has a chunk [0, 0] that decodes to more than it declares; not read" in problem


def test_an_array_of_zarr_that_is_described_twice(tmp_path):
    """By version 3, which is read, and as something harmless by version 2."""
    store = tmp_path / "bomb.zarr"
    bomb = zarr_bomb(store, shape=(3, 2**31), chunks=(1, 2**31), dimension_names=("y", "x"), fill_value=1)
    (store / "data/c/2").mkdir(parents=True)
    (store / "data/c/2/0").write_bytes(bomb)
    harmless = {"shape": [3], "chunks": [3], "dtype": "|u1", "order": "C", "fill_value": 0}
    harmless |= {"zarr_format": 2, "compressor": None, "filters": None}
    (store / "data/.zarray").write_text(json.dumps(harmless))
    assert f"c/2/0' has {len(bomb)} bytes and declares {2**31}; not read" in check_files([store])[store]


@needs("rasterio", "rioxarray")
def test_a_geotiff_whose_tile_is_larger_than_its_map(tmp_path):
    import rasterio

    options = {"height": 64, "width": 64, "count": 1, "dtype": "uint8", "driver": "GTiff", "compress": "deflate"}
    with (
        warnings.catch_warnings(),
        rasterio.open(
            tmp_path / "bomb.tif", "w", tiled=True, blockxsize=16384, blockysize=32768, sparse_ok=True, **options
        ),
    ):
        warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match="bomb.tif: declares tiles of 32768 x 16384 pixels, the file has"):
        open_dataset(tmp_path / "bomb.tif")


def test_arrays_of_an_npz_that_are_large_together(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", **{name: np.zeros(2**26, "uint8") for name in "abcde"})
    with pytest.raises(ValueError, match=r"bomb.npz: unpacks \d+ bytes to 33554\d+; not read"):
        load_npz(tmp_path / "bomb.npz")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_a_tar_archive_of_2_gib(tmp_path, zeros, kind):
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, 2**31
    head = zlib.compressobj(1, wbits=-15)
    content = head.compress(info.tobuf()) + head.flush(zlib.Z_FULL_FLUSH) + zeros[2:]
    (tmp_path / "bomb.tar.gz").write_bytes(b"\x1f\x8b\x08" + bytes(7) + content)
    with pytest.raises(ValueError, match="has a header of 2147483648 bytes"):
        extract(tmp_path / "bomb.tar.gz", tmp_path / "out", 10**9)


def test_an_array_of_an_npz_of_2_gib(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("x.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, {"shape": (2**29,), "fortran_order": False, "descr": "|u1"})
            for _ in range(32):
                file.write(bytes(2**24))
    with pytest.raises(ValueError, match=r"bomb.npz: unpacks \d+ bytes to 53687"):
        load_npz(tmp_path / "bomb.npz")


def test_checkpoints_that_unpack_to_more_than_they_store(tmp_path):
    torch.save({"a": torch.zeros(2**24)}, tmp_path / "fine.pt")
    with zipfile.ZipFile(tmp_path / "fine.pt") as fine, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for name in fine.namelist():
            bomb.writestr(name, fine.read(name), zipfile.ZIP_DEFLATED, compresslevel=1)
    assert os.path.getsize(tmp_path / "bomb.pt") < 2e6
    with pytest.raises(ValueError, match="bomb.pt: refused, its 'fine/data.pkl' is compressed, as torch never"):
        load_tensors(tmp_path / "bomb.pt")
    torch.save({"a": torch.zeros(1).expand(2**29)}, tmp_path / "view.pt")
    with pytest.raises(ValueError, match="view.pt: its tensors declare 2147483648 bytes, and it stores"):
        load_tensors(tmp_path / "view.pt")
    assert load_tensors(tmp_path / "fine.pt")["a"].shape == (2**24,)


def test_a_checked_file_is_known_by_more_than_size_and_time(tmp_path):
    """Another file in its place, of the same size and time of change, is checked again."""
    for name in ("fine.h5", "crafted.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["data"] = np.arange(6)
            if name == "fine.h5":
                file["link"] = h5py.SoftLink("/etc/hostname:/data")
            else:
                file["link"] = h5py.ExternalLink("/etc/hostname", "/data")
    fine, crafted = tmp_path / "fine.h5", tmp_path / "crafted.h5"
    assert os.path.getsize(fine) == os.path.getsize(crafted) and not check_files([fine])
    state = os.stat(fine)
    shutil.copyfile(crafted, fine)  # the same inode
    os.utime(fine, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert os.stat(fine).st_mtime_ns == state.st_mtime_ns
    with pytest.raises(ValueError, match="'/link' is a link to elsewhere; not read"):
        open_hdf5(fine)


# -- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder_name", [None, "cache", "sevir", "parquet"])
def test_a_saved_table_of_a_stranger_reads_no_local_file(tmp_path, builder_name):
    np.save(tmp_path / "values.npy", np.zeros((9, 4, 6)))
    secret = {"source": "cache", "path": str(tmp_path), "first": 0, "length": 9}
    row = {"id": "e", "length": 9, "geo": "{}", "time": event(0)["time"].astype("datetime64[s]").tolist()}
    for reference in (json.dumps(secret), f"{'0' * 64} {json.dumps(secret)}", "[" * 10**5, "ü", ""):
        table = datasets.Dataset.from_list([row | {"reference": reference}])
        table.info.builder_name = builder_name
        table.save_to_disk(tmp_path / "crafted")
        for in_memory in (False, True):
            table = datasets.load_from_disk(tmp_path / "crafted", keep_in_memory=in_memory)
            for read in (
                lambda table: windows(table, encode, 3, 2),
                lambda table: list(windows(table.to_iterable_dataset(), encode, 3, 2)),
                lambda table: as_event(table[0]),
                lambda table: cached(table, tmp_path / "cache"),
            ):
                with pytest.raises(ValueError, match="must hold its frames, not refer to files; not read"):
                    read(table)
            problems = prepare({"train": table}, tmp_path / "prepared", FACTS)
            assert len(problems) == 1 and "not refer to files" in problems[0]
            shutil.rmtree(tmp_path / "prepared")


def test_a_table_of_this_machine_may_be_saved(tmp_path):
    kept = cached(table_of([event(0), event(1)]), tmp_path / "cache")
    kept.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    assert len(windows(loaded, encode, 3, 2)) == 10
    np.testing.assert_array_equal(as_event(loaded[1])["values"], event(1)["values"])


# -- one damaged file -------------------------------------------------------------------------------------------------


def damage(path, name="rain"):
    """Overwrite the last chunk of a variable of a NetCDF file."""
    with h5py.File(path) as file:
        chunks = []
        file[name].id.chunk_iter(chunks.append)
    with open(path, "r+b") as file:
        file.seek(chunks[-1].byte_offset)
        file.write(b"\xff" * chunks[-1].size)


def packed(path, values):
    encoding = {"rain": {"zlib": True, "chunksizes": (1, 4, 6)}}
    values.to_netcdf(path, encoding=encoding)


def prepared(folder, **options):
    """Problems, and the events as id -> first values of the frames."""
    options = {"fractions": (1, 0, 0), "keep_bad": True, "cache_dir": folder.parent / "cache"} | options
    problems = prepare(load_dataset("folder", folder, **options), folder.parent / "out", FACTS)
    table = datasets.load_dataset(str(folder.parent / "out"), split="train", streaming=True)
    found = {row["id"]: as_event(row)["values"][:][:, 0, 0].astype(int).tolist() for row in table}
    assert all(len(row["time"]) == len(found[row["id"]]) for row in table)
    return problems, found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@needs("rasterio", "rioxarray")
def test_a_cut_geotiff(folder):
    import rasterio

    options = {"height": 64, "width": 64, "count": 1, "dtype": "float32", "driver": "GTiff", "blockysize": 8}
    for hour in range(4):
        with warnings.catch_warnings(), rasterio.open(folder / f"r_{hour:02d}.tif", "w", **options) as file:
            warnings.simplefilter("ignore")
            file.write(frames(hour, 1, (64, 64)))
    content = (folder / "r_02.tif").read_bytes()
    (folder / "r_02.tif").write_bytes(content[: len(content) // 2])
    problems, found = prepared(folder, name_time="r_%H.tif")
    assert found == {"r_00.tif:0": [0, 1], "r_03.tif:0": [3]}
    assert len(problems) == 1 and "r_02.tif" in problems[0]


def test_a_damaged_chunk_is_of_its_file_and_costs_no_other(folder):
    for number, name in enumerate("abcde"):
        packed(folder / f"{name}.nc", dataset(3 * number, 3))
    damage(folder / "c.nc")
    problems, found = prepared(folder)
    assert found == {"a.nc:0": list(range(6)), "d.nc:0": list(range(9, 15))}
    assert len(problems) == 1 and str(folder / "c.nc") in problems[0]
    assert not any(f"{name}.nc" in problems[0] for name in "abde")


def test_a_damaged_copy_leaves_the_other(folder):
    packed(folder / "a.nc", dataset(0, 6))
    packed(folder / "b.nc", dataset(3, 6))  # three frames of both, of which the last of a.nc is damaged
    damage(folder / "a.nc")
    problems, found = prepared(folder)
    assert found == {"b.nc:0": list(range(3, 9))}
    assert len(problems) == 1 and str(folder / "a.nc") in problems[0] and "b.nc" not in problems[0]


@needs("zarr")
def test_a_damaged_chunk_of_zarr(folder):
    for first in (0, 3, 6):
        dataset(first, 3).to_zarr(folder / f"{first}.zarr", encoding={"rain": {"chunks": (1, 4, 6)}}, zarr_format=2)
    (folder / "3.zarr" / "rain" / "2.0.0").write_bytes(b"damaged")
    problems, found = prepared(folder)
    assert found == {"0.zarr:0": [0, 1, 2], "6.zarr:0": [6, 7, 8]}
    assert len(problems) == 1 and str(folder / "3.zarr") in problems[0]


def test_odd_arrays(folder):
    """Of types, shapes and headers that no map has."""
    for hour in range(2):
        np.save(folder / f"{hour:02d}.npy", frames(hour, 1)[0])
    odd = {
        "02": np.zeros((4, 6), [("a", "f4")]), "03": np.array(1.0), "04": np.zeros((0, 4, 6)),
        "05": np.zeros((4, 6), "M8[s]"), "06": np.zeros((4, 6), "c8"), "07": np.zeros((4, 6), "S3"),
        "08": np.zeros((4, 6), object), "09": np.zeros((2, 2, 2, 2, 2)), "10": np.zeros((4, 0)),
        "11": np.full((4, 6), np.nan), "14": np.zeros((4, 6), np.longdouble),
    }  # fmt: skip
    for name, array in odd.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "12.npy").write_bytes(b"\x93NUMPY\x01\x00" + b"\xff" * 40)
    (folder / "13.npy").write_bytes(b"")
    np.save(folder / "15.npy", np.asfortranarray(frames(15, 1)[0]).astype(">f8"))
    problems, found = prepared(folder, name_time="%H.npy", time_step="1h")
    expected = sorted([*odd, "12", "13"])
    assert [sum(f"{name}.npy" in problem for problem in problems) for name in expected] == [1] * len(expected)
    assert found == {"00.npy:0": [0, 1], "15.npy:0": [15]}


# -- open radar -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tiles_train": [[0, 0], [0, 5]]}, r"the tile at \(0, 5\) of 4 pixels lies beyond the mosaic of 8 x 8"),
        ({"tiles_train": [[-4, 0]]}, r"the tile at \(-4, 0\) of 4 pixels lies beyond"),
        ({"tiles_train": [0, 4, 0]}, r"must be rows of y and x, got \(3,\)"),
        ({"size": -4}, "tile_size and dt_minutes must be at least 1, got -4 and 2"),
        ({"size": 16}, r"of 16 pixels lies beyond the mosaic"),
        ({"minutes": 0}, "tile_size and dt_minutes must be at least 1, got 4 and 0"),
        ({"code": np.zeros((2, 8, 8), "uint8")}, r"for the \(T,\) of `time`, got uint8 \(2, 8, 8\) and \(3,\)"),
        ({"code": np.zeros((3, 8, 8), "int16")}, "`code` must be uint8"),
        ({"code": np.zeros((3, 64), "uint8")}, "`code` must be uint8"),
        ({"vil_lut": np.zeros(7, "uint8")}, "'vil_lut' of the file, uint8"),
        ({"time": [b"noon", b"later", b"night"]}, "noon"),
        ({"time": [1, 2, 3]}, "decode"),
    ],
)
def test_open_radar_whose_parts_do_not_fit(tmp_path, change, message):
    times = [f"2024-05-09T00:0{2 * step}:00Z".encode() for step in range(3)]
    made = {
        "code": np.zeros((3, 8, 8), "uint8"),
        "time": times,
        "tiles_train": [[0, 0], [4, 4]],
        "size": 4,
        "minutes": 2,
    }
    made |= {"vil_lut": np.arange(256, dtype="uint8")} | change
    with h5py.File(tmp_path / "radar.h5", "w") as file:
        file["vil_lut"] = made["vil_lut"]
        for name in ("code", "time", "tiles_train"):
            file[f"mrms_a/{name}"] = made[name]
        file["mrms_a"].attrs.update(tile_size=made["size"], dt_minutes=made["minutes"])
    with pytest.raises(ValueError, match=f"radar.h5, 'mrms_a': .*{message}"):
        load_dataset("open-radar", tmp_path, "train", file="radar.h5", cache_dir=tmp_path / "cache")
