"""Crafted files, made here, are refused by name, and do not take this process down."""

import gzip
import io
import json
import os
import signal
import stat
import tarfile
import threading
import time
import zipfile

import h5py
import numpy as np
import pytest
import xarray as xr
from tiny import DATA

from earthformer_hf.data import guards
from earthformer_hf.data.guards import check_files, extract, load_npz, open_dataset, open_hdf5, open_npy


# -- HDF5 -------------------------------------------------------------------------------------------------------------


def external_link(file):
    file["group/other"] = h5py.ExternalLink("/etc/hostname", "/")


def soft_link_through_an_external_one(file):
    file["group/other"] = h5py.ExternalLink("/etc/hostname", "/")
    file["alias"] = h5py.SoftLink("/group/other/data")


def external_storage(file):
    file.create_dataset("group/other", (4,), "uint8", external=[("/etc/hostname", 0, 4)])


def virtual_data(file):
    layout = h5py.VirtualLayout((4,), "uint8")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "data", (4,))
    file.create_virtual_dataset("group/other", layout)


def shape_bomb(file):
    file.create_dataset("group/other", (2**17, 2**17), "uint8", chunks=(256, 256))


def overflowing_shape(file):
    file.create_dataset("group/other", (2**33, 2**33), "float64", chunks=(16, 16))


def write_hdf5(path, attack=None):
    with h5py.File(path, "w") as file:
        file["data"] = np.arange(6)
        file.create_group("group")["numbers"] = np.ones((2, 3))
        if attack:
            attack(file)
    return path


@pytest.mark.parametrize("attack", [external_link, soft_link_through_an_external_one, external_storage, virtual_data])
def test_hdf5_that_reads_elsewhere(tmp_path, attack):
    path = write_hdf5(tmp_path / "crafted.h5", attack)
    with pytest.raises(ValueError, match="crafted.h5: '/group/other' is .* elsewhere; not read"):
        open_hdf5(path)


def test_a_soft_link_stays_in_the_file(tmp_path):
    def links(file):
        file["alias"], file["lost"] = h5py.SoftLink("/data"), h5py.SoftLink("/nowhere")

    assert open_hdf5(write_hdf5(tmp_path / "linked.h5", links))["alias"][:].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("attack", [shape_bomb, overflowing_shape])
def test_hdf5_that_holds_less_than_it_says(tmp_path, attack):
    path = write_hdf5(tmp_path / "crafted.h5", attack)
    with pytest.raises(ValueError, match="crafted.h5: '/group/other' declares"):
        open_hdf5(path)


def test_sound_hdf5_is_read_and_kept_open(tmp_path):
    path = write_hdf5(tmp_path / "sound.h5", lambda file: file["group"].__setitem__("ring", file["group"]))
    assert open_hdf5(path)["data"][:].tolist() == [0, 1, 2, 3, 4, 5]
    assert open_hdf5(path) is open_hdf5(str(path))
    write_hdf5(tmp_path / "other.h5", external_link).replace(path)  # another file now
    with pytest.raises(ValueError, match="not read"):
        open_hdf5(path)


def test_damaged_files(tmp_path):
    """Any byte of a file may be wrong: it is refused or read, and this process lives."""
    content = write_hdf5(tmp_path / "sound.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.h5: .*truncated"):
        open_hdf5(tmp_path / "cut.h5")
    random, refused = np.random.default_rng(0), 0
    for number in range(60):
        changed = bytearray(content)
        for place in random.integers(8, len(content), 8):
            changed[place] = random.integers(256)
        path = tmp_path / f"{number}.h5"
        path.write_bytes(changed)
        refused += bool(check_files([path]))
    assert 10 < refused < 60


def test_the_first_bytes_decide(tmp_path):
    (tmp_path / "text.h5").write_text("a text")
    (tmp_path / "data.unknown").write_text("a text")
    np.save(tmp_path / "array.npy", np.arange(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.nc")
    folder, missing = tmp_path / "folder.h5", tmp_path / "missing.h5"
    folder.mkdir()
    paths = [*sorted(tmp_path.iterdir()), missing]
    problems = {path.name: problem for path, problem in check_files(paths).items()}
    assert problems == {
        "array.nc": "is not hdf5 or netcdf3, it begins with b'\\x93NUMPY\\x01\\x00'",
        "data.unknown": problems["data.unknown"],
        "folder.h5": "is not a file",
        "missing.h5": "does not exist",
        "text.h5": "is not hdf5, it begins with b'a text'",
    }


def test_the_child_may_die(tmp_path):
    """Killed as by a system that runs out of memory, or by a crash of a library: that file is refused."""
    zeros = gzip.compress(bytes(2**26))
    (tmp_path / "long.gz").write_bytes(zeros * 60)  # takes seconds
    found = {}
    asking = threading.Thread(target=lambda: found.update(check_files([tmp_path / "long.gz"])))
    asking.start()
    while not (guards._child.process and guards._child.lock.locked()):
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(guards._child.process.pid, signal.SIGKILL)
    asking.join()
    assert found == {tmp_path / "long.gz": "crashed the process that checked it (exit status -9)"}
    assert open_hdf5(write_hdf5(tmp_path / "sound.h5"))["data"].shape == (6,)


def test_a_fork_has_its_own_child_and_handles(tmp_path):
    path, other = write_hdf5(tmp_path / "a.h5"), write_hdf5(tmp_path / "b.h5")
    handle, child = open_hdf5(path), guards._child.process.pid
    if not (fork := os.fork()):
        fine = open_hdf5(path) is not handle and open_hdf5(other)["data"][5] == 5
        os._exit(0 if fine and guards._child.process.pid != child else 1)
    assert os.waitpid(fork, 0)[1] == 0
    assert open_hdf5(path) is handle and guards._child.process.pid == child


# -- NetCDF and Zarr --------------------------------------------------------------------------------------------------


def grid():
    return xr.Dataset({"rain": (("time", "y", "x"), np.arange(24.0).reshape(2, 3, 4))})


@pytest.mark.parametrize("unlimited", [[], ["time"]])
@pytest.mark.parametrize("kind", ["NETCDF4", "NETCDF3_CLASSIC", "NETCDF3_64BIT", "NETCDF3_64BIT_DATA"])
def test_netcdf(tmp_path, kind, unlimited):
    path = tmp_path / "grid.nc"
    sound = grid().assign(index=("time", np.arange(2, dtype="int16"))).assign_attrs(title="a grid")
    sound.to_netcdf(path, format=kind, unlimited_dims=unlimited, engine="netcdf4")
    with open_dataset(path) as dataset:
        xr.testing.assert_equal(dataset, sound)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="grid.nc: .*truncated"):
        open_dataset(path)


def test_netcdf4_is_hdf5(tmp_path):
    grid().to_netcdf(tmp_path / "grid.nc")
    with h5py.File(tmp_path / "grid.nc", "a") as file:
        file["other"] = h5py.ExternalLink("/etc/hostname", "/")
    with pytest.raises(ValueError, match="'/other' is a link to elsewhere"):
        open_dataset(tmp_path / "grid.nc")


def test_netcdf3_that_declares_more_than_it_holds(tmp_path):
    grid().to_netcdf(tmp_path / "grid.nc", format="NETCDF3_64BIT")
    content = (tmp_path / "grid.nc").read_bytes()
    name = content.index(b"\0\0\0\1x") + 8  # the length of dimension x follows its name
    (tmp_path / "grid.nc").write_bytes(content[:name] + (2**30).to_bytes(4, "big") + content[name + 4 :])
    with pytest.raises(ValueError, match="grid.nc: must have 51539607700 bytes"):
        open_dataset(tmp_path / "grid.nc")


def test_zarr(tmp_path):
    pytest.importorskip("zarr")
    grid().to_zarr(tmp_path / "grid.zarr", zarr_format=2)
    with open_dataset(tmp_path / "grid.zarr") as dataset:
        xr.testing.assert_equal(dataset.load(), grid())
    (tmp_path / "grid.zarr" / "rain" / "elsewhere").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="elsewhere' is a link"):
        open_dataset(tmp_path / "grid.zarr")
    (tmp_path / "grid.zarr" / "rain" / "elsewhere").unlink()
    header = tmp_path / "grid.zarr" / "rain" / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"filters": [{"id": "pickle", "protocol": 5}]}))
    with pytest.raises(ValueError, match="asks for pickled objects"):
        open_dataset(tmp_path / "grid.zarr")


# -- numpy ------------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os._exit, (1,)


def header_of(shape, dtype="<f8"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue()


def test_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(12.0).reshape(3, 4))
    array = open_npy(tmp_path / "a.npy")
    assert isinstance(array, np.memmap) and array[2].tolist() == [8, 9, 10, 11] and not array.flags.writeable
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(content[:-8])
    (tmp_path / "bomb.npy").write_bytes(header_of((2**40,)) + bytes(8))
    (tmp_path / "below.npy").write_bytes(header_of((-1, -1)) + bytes(8))
    np.save(tmp_path / "pickle.npy", np.array([Evil()], object), allow_pickle=True)
    problems = {"cut": "truncated", "bomb": "takes 8796093022", "pickle": "pickled objects", "below": r"\(-1, -1\)"}
    for name, words in problems.items():
        with pytest.raises(ValueError, match=f"{name}.npy: .*{words}"):
            open_npy(tmp_path / f"{name}.npy")
        assert check_files([tmp_path / f"{name}.npy"])
    for header in (b"(" * 500, b"'''", b"-" * 9000 + b"1", b"  x\n y"):  # Python's parser stumbles
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        (tmp_path / "header.npy").write_bytes(content)
        with pytest.raises(ValueError, match="header.npy: "):
            open_npy(tmp_path / "header.npy")


def test_npz(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(3), y=np.zeros((2, 2)))
    assert {name: array.shape for name, array in load_npz(tmp_path / "a.npz").items()} == {"x": (3,), "y": (2, 2)}
    assert list(load_npz(tmp_path / "a.npz", ["y"])) == ["y"]
    with pytest.raises(ValueError, match=r"holds \['x', 'y'\], not \['z'\]"):
        load_npz(tmp_path / "a.npz", ["z"])
    np.savez(tmp_path / "pickle.npz", x=np.array([Evil()], object))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header_of((2**40,)) + bytes(64))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("x.npy", "a text")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    np.savez_compressed(tmp_path / "deflate.npz", x=np.random.default_rng(0).integers(0, 9, 9999))
    damaged = bytearray((tmp_path / "deflate.npz").read_bytes())
    damaged[200:260] = b"\xff" * 60
    (tmp_path / "deflate.npz").write_bytes(damaged)
    np.save(tmp_path / "other.npy", np.arange(3))
    (tmp_path / "other.npy").rename(tmp_path / "other.npz")
    problems = {"pickle": "pickled objects", "bomb": "takes 8796093022", "text": "magic", "cut": "zip", "other": "zip"}
    problems["deflate"] = "decompressing"
    for name, words in problems.items():
        with pytest.raises(ValueError, match=f"(?s){name}.npz: .*{words}"):
            load_npz(tmp_path / f"{name}.npz")
        assert check_files([tmp_path / f"{name}.npz"])


# -- archives ---------------------------------------------------------------------------------------------------------


def write_zip(path, members, link=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        if link:
            info = zipfile.ZipInfo("link")
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, link)
    return path


def write_tar(path, members, link=None):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)
    return path


KINDS = [("a.zip", write_zip), ("a.tar", write_tar), ("a.tar.gz", write_tar)]


@pytest.mark.parametrize("name, write", KINDS)
def test_extract(tmp_path, name, write):
    archive = write(tmp_path / name, {"x.txt": b"one", "deep/er/y.txt": b"two"})
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine.txt").write_text("of somebody else")
    folder = extract(archive, tmp_path / "out", 6)
    assert (folder / "x.txt").read_bytes() == b"one" and (folder / "deep/er/y.txt").read_bytes() == b"two"
    assert (tmp_path / "out.part" / "mine.txt").read_text() == "of somebody else"
    with pytest.raises(ValueError, match="exists already"):
        extract(archive, folder, 6)
    with pytest.raises(ValueError, match="more than 5 bytes"):
        extract(archive, tmp_path / "small", 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out", "out.part"])


@pytest.mark.parametrize("name, write", KINDS)
@pytest.mark.parametrize("member", ["../out.txt", "/out.txt", "a/../../out.txt", "..\\out.txt", "C:out.txt"])
def test_archives_that_lead_out_of_the_folder(tmp_path, name, write, member):
    archive = write(tmp_path / name, {"fine.txt": b"one", member: b"two"})
    with pytest.raises(ValueError, match=f"{name}: holds the path .* leads out of the folder"):
        extract(archive, tmp_path / "out", 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    assert "leads out" in check_files([archive])[archive]


@pytest.mark.parametrize("name, write", KINDS)
def test_archives_with_links(tmp_path, name, write):
    archive = write(tmp_path / name, {"fine.txt": b"one"}, link="/etc/hostname")
    with pytest.raises(ValueError, match="'link' is a link or a device"):
        extract(archive, tmp_path / "out", 100)
    assert check_files([archive])


def test_a_zip_bomb(tmp_path):
    """Two names of the same 3 GiB of zeros, which take 3 MB."""
    block = bytes(2**24)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("zeros", "w", force_zip64=True) as file:
            file.write(block)
    content = (tmp_path / "bomb.zip").read_bytes()
    size = len(block).to_bytes(4, "little")
    central = content.rindex(b"PK\1\2")
    changed = content[:central] + content[central:].replace(size, (2**32 - 16).to_bytes(4, "little"))
    (tmp_path / "bomb.zip").write_bytes(changed)  # which now says that it unpacks to 4 GiB
    write_zip(tmp_path / "small.zip", {"zeros": block})
    assert not check_files([tmp_path / "small.zip"])
    with pytest.raises(ValueError, match="more than 100000000 bytes"):
        extract(tmp_path / "bomb.zip", tmp_path / "out", 10**8)


def test_gzip(tmp_path):
    (tmp_path / "data.npy.gz").write_bytes(gzip.compress(b"content" * 100))
    folder = extract(tmp_path / "data.npy.gz", tmp_path / "out", 700)
    assert (folder / "data.npy").read_bytes() == b"content" * 100
    with pytest.raises(ValueError, match="more than 699 bytes"):
        extract(tmp_path / "data.npy.gz", tmp_path / "again", 699)
    (tmp_path / "cut.gz").write_bytes((tmp_path / "data.npy.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match="cut.gz"):
        extract(tmp_path / "cut.gz", tmp_path / "again", 700)


def test_an_archive_may_name_a_file_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("x", "one")
        archive.writestr("x", "two")
    with pytest.raises(ValueError, match="x"):
        extract(tmp_path / "a.zip", tmp_path / "out", 100)


@pytest.mark.skipif(not DATA.exists(), reason="open data: set EARTHFORMER_HF_DATA")
def test_real_files_pass():
    assert not check_files(path for path in DATA.iterdir() if path.suffix in (".h5", ".nc", ".npz"))


def test_a_large_process_checks_many_files_in_one_child(tmp_path):
    """What the parent holds is not counted as the child's, which would end after every file."""
    held = np.ones(2**30 // 8)  # more than half of what the child may take
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.arange(number + 2))
    guards._child.process = None
    assert check_files([tmp_path / "0.npy"]) == {}
    child = guards._child.process
    assert check_files([tmp_path / "1.npy", tmp_path / "2.npy"]) == {}
    assert guards._child.process is child and child.poll() is None and held.all()
