"""SEVIR: from the catalogue to events and windows, on files of SEVIR's layout that the tests write."""

import csv
import importlib.util
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny import DATA, GOLDENS

from earthformer_hf import EarthformerFeatureExtractor, load_dataset
from earthformer_hf.data import sevir
from earthformer_hf.data.events import make_builder
from earthformer_hf.data.hosted import prepare
from earthformer_hf.data.windows import Windows


encode = EarthformerFeatureExtractor(**sevir.Sevir.FACTS.feature_extractor).encode
HEADER = ("id", "file_name", "file_index", "img_type", "time_utc", "pct_missing", "llcrnrlat", "proj")
GRIDS = {"vil": (128, 25, "uint8"), "ir069": (192, 49, "int16")}  # of SEVIR-LR, and of SEVIR


def write_catalogue(folder, rows):
    """`rows`: (id, file_name, file_index, img_type, time_utc, pct_missing)."""
    folder.mkdir(exist_ok=True)
    with open(folder / "CATALOG.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows([*row, 33.25, "+proj=laea"] for row in rows)


def write_raster(path, rows, kind="vil", grid=None, **options):
    """Random frames in a file of axes N, H, W, T."""
    size, frames, dtype = grid or GRIDS[kind]
    values = np.random.default_rng(rows).integers(0, 255, (rows, size, size, frames)).astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(kind, data=values, **options)
        file["id"] = np.array([str(row) for row in range(rows)], "S")
    return values


def load(folder, split=None, name="sevir-lr", **options):
    return load_dataset(name, folder, split, cache_dir=folder.parent / "cache", **options)


# -- the catalogue ----------------------------------------------------------------------------------------------------

BEFORE, FIRST, SPRING, LAST, SUMMER = (
    "2018-08-01 12:00:00",
    "2019-01-01 00:00:00",  # the last moment of training
    "2019-03-01 12:00:00",
    "2019-06-01 00:00:00",  # the last moment of validation
    "2019-06-01 00:00:01",
)
A, B, K, J = "vil/2018/a.h5", "vil/2019/b.h5", "ir069/2018/i.h5", "ir069/2019/j.h5"
TRAPS = [
    ("S900", B, 3, "vil", SUMMER, 0),
    ("S1000", B, 0, "vil", SUMMER, 0),  # before "S900" as text
    ("S1000", J, 0, "ir069", SUMMER, 0),
    ("R12", A, 2, "vil", BEFORE, 0),
    ("R12", A, 1, "vil", BEFORE, 0.5),  # a clean and an incomplete copy: an event
    ("R12", K, 1, "ir069", BEFORE, 0),
    ("R13", A, 3, "vil", BEFORE, 0),
    ("R13", A, 4, "vil", BEFORE, 0.0),  # two clean copies: none
    ("R14", A, 5, "vil", BEFORE, 0),
    ("R14", B, 4, "vil", SUMMER, 0),  # a clean copy on either side: an event of both
    ("R2", A, 0, "vil", FIRST, 0),
    ("R2", K, 0, "ir069", FIRST, 0),
    ("r1", B, 1, "vil", LAST, 0),
    ("R3", B, 2, "vil", SPRING, ""),  # nobody knows how much is missing
    ("R4", B, 2, "vil", SPRING, 0.01),
    ("R5", J, 1, "ir069", SPRING, 0),  # no radar
    ("R6", B, 2, "vil", SPRING, 0),
    ("R6", J, 1, "ir069", SPRING, 0.2),  # its satellite image is incomplete
    ("R7", A, 1, "vil", "2018-01-01", 0),
    ("R8", B, 5, "vil", SPRING, 0),
    ("R8", J, 1, "ir069", SPRING, 0),
]


def naive_events(rows, types, after, until):
    """The rule, a row at a time."""
    kept = [r for r in rows if (after is None or r[4] > after) and (until is None or r[4] <= until)]
    kept = [r for r in kept if r[5] in (0, 0.0) and r[5] != "" and r[3] in types]
    events = {}
    for row in kept:
        events.setdefault(row[0], []).append(row)
    whole = {k: v for k, v in events.items() if {r[3] for r in v} == set(types) and len(v) == len(types)}
    return [whole[k] for k in sorted(whole)]


@pytest.mark.parametrize("types", [("vil",), ("vil", "ir069"), ("ir069",)])
@pytest.mark.parametrize("dates", [(None, None), (None, FIRST), (FIRST, LAST), (LAST, None), (None, LAST)])
def test_events_follow_the_rule(tmp_path, types, dates):
    write_catalogue(tmp_path, TRAPS)
    events = sevir.events_of(sevir.read_catalogue(tmp_path / "CATALOG.csv"), types, *dates)
    expected = [row for rows in naive_events(TRAPS, types, *dates) for row in rows]
    found = list(zip(events.id, events.file_name, events.file_index, events.img_type))
    assert sorted(found) == sorted(row[:4] for row in expected) and len(found) >= len(types)
    assert [row[0] for row in found] == [row[0] for row in expected]


@pytest.fixture
def lr_folder(tmp_path):
    """SEVIR-LR's files for the made-up catalogue, and what is in them."""
    write_catalogue(tmp_path / "lr", TRAPS)
    values = {name: write_raster(tmp_path / "lr" / "data" / name, 6) for name in (A, B)}
    return tmp_path / "lr", values


def test_splits_rows_and_frames(lr_folder):
    folder, values = lr_folder
    tables = load(folder)
    ids = {split: table["id"][:] for split, table in tables.items()}
    assert ids == {"train": ["R12", "R14", "R2", "R7"], "val": ["R6", "R8", "r1"], "test": ["R14", "S1000", "S900"]}
    rows = [(A, 2), (A, 5), (A, 0), (A, 1)]
    for event, (name, row) in zip(tables["train"], rows):
        np.testing.assert_array_equal(event["values"], values[name][row].transpose(2, 0, 1))
    event = tables["val"][0]
    assert event["values"].shape == (25, 128, 128) and event["values"].dtype == "uint8"
    assert event["geo"] == {"minutes": 10, "grid_spacing": "3 km", "llcrnrlat": 33.25, "proj": "+proj=laea"}
    assert str(event["time"][0]) == "2019-03-01T10:00:00" and str(event["time"][12]) == "2019-03-01T12:00:00"
    assert set(np.diff(event["time"])) == {np.timedelta64(10, "m")}
    streamed = load(folder, "train", streaming=True)
    assert [event["id"] for event in streamed] == ids["train"]
    np.testing.assert_array_equal(next(iter(streamed))["values"], values[A][2].transpose(2, 0, 1))


def test_other_splits_and_the_shuffled_order(lr_folder):
    import pandas as pd

    folder, _ = lr_folder
    with pytest.raises(ValueError, match=r"must be of \['train', 'test'\] with these options, got 'val'"):
        load(folder, "val", split_rule="prediff")
    tables = load(folder, split_rule="prediff", shuffle=True)
    assert set(tables) == {"train", "test"} and tables["test"]["id"][:] == ["R14", "S1000", "S900"]
    pool = pd.Series(["R12", "R14", "R2", "R6", "R7", "R8", "r1"])
    expected = pool.sample(frac=1, random_state=1).sample(frac=1, random_state=1).tolist()
    assert tables["train"]["id"][:] == expected != pool.tolist()
    with pytest.raises(ValueError, match="val"):
        load(folder, "val", split_rule="mit")
    for options in ({"split_rule": "paper"}, {"image_type": "ir069"}, {"image_types": ("lght",)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            load(folder, **options)


def test_image_types_hold_the_same_events(tmp_path):
    folder = tmp_path / "sevir"
    write_catalogue(folder, TRAPS)
    for name in (K, J):
        write_raster(folder / "data" / name, 2, "ir069")
    for name in (A, B):
        (folder / "data" / name).parent.mkdir(parents=True)
        with h5py.File(folder / "data" / name, "w") as file:
            file.create_dataset("vil", (6, 384, 384, 49), "uint8", chunks=(1, 384, 384, 49))
    both = {"image_types": ("vil", "ir069"), "name": "sevir"}
    vil, infrared = (load(folder, "train", image_type=kind, **both) for kind in ("vil", "ir069"))
    assert vil["id"][:] == infrared["id"][:] == ["R12", "R2"]
    assert vil[0]["values"].shape == (49, 384, 384) and infrared[0]["values"].shape == (49, 192, 192)
    assert infrared[0]["values"][:].dtype == "int16"
    facts = make_builder("sevir", folder, image_type="ir069").facts
    assert (facts.units, facts.grid) == ("0.01 degrees Celsius", "192 x 192 at 2 km, 49 frames")
    assert EarthformerFeatureExtractor(**facts.feature_extractor).encode(np.full((1, 1), -3683.58))[0] == 0
    table = load(folder, "train", "sevir", image_type="ir069")
    prepare({"train": table}, folder.parent / "hosted")
    assert "| units | 0.01 degrees Celsius |" in (folder.parent / "hosted" / "README.md").read_text()
    assert len(load(folder, "train", name="sevir")) == 4
    assert str(vil[1]["time"][24]) == FIRST.replace(" ", "T") and np.diff(vil[1]["time"])[0] == np.timedelta64(5, "m")


# -- what is wrong with a file is named -------------------------------------------------------------------------------


def test_events_that_cannot_be_read_are_named(tmp_path):
    rows = [
        ("a", A, 0, "vil", BEFORE, 0),
        ("b", A, 6, "vil", BEFORE, 0),
        ("c", "vil/2018/gone.h5", 3, "vil", BEFORE, 0),
        ("d", B, 0, "vil", BEFORE, 0),
        ("e", K, 0, "vil", BEFORE, 0),
        ("f", A, "", "vil", BEFORE, 0),
        ("g", "", 0, "vil", BEFORE, 0),
        ("h", A, -1, "vil", BEFORE, 0),
        ("i", "vil/short.h5", 0, "vil", BEFORE, 0),
        ("j", "vil/group.h5", 0, "vil", BEFORE, 0),
    ]
    folder = tmp_path / "lr"
    write_catalogue(folder, rows)
    write_raster(folder / "data" / A, 6)
    write_raster(folder / "data" / B, 1, grid=(128, 24, "uint8"))
    write_raster(folder / "data" / K, 1, "ir069")
    (folder / "data/vil/short.h5").write_bytes((folder / "data" / A).read_bytes()[:5000])
    with h5py.File(folder / "data/vil/group.h5", "w") as file:
        file.create_group("vil")
    events = load(folder, "train", keep_bad=True).with_format(None)
    problems = dict(zip(events["id"], events["problem"]))
    assert problems.pop("a") == "" and len(problems) == 9
    expected = {
        "b": f"{A}, row 6: the file has 6 rows",
        "c": "vil/2018/gone.h5, row 3: does not exist",
        "d": f"{B}, row 0: needs 'vil' .N, 128, 128, 25. uint8, found .1, 128, 128, 24. uint8",
        "e": f"{K}, row 0: needs 'vil' .N, 128, 128, 25. uint8, found .'id', 'ir069'.",
        "f": f"{A}, row nan: the file has 6 rows",
        "g": "^, row 0: ",
        "h": f"{A}, row -1: the file has 6 rows",
        "i": "vil/short.h5, row 0: .*truncated",
        "j": "vil/group.h5, row 0: needs 'vil' .N, 128, 128, 25. uint8, found .'vil'.",
    }
    assert [name for name, text in expected.items() if not re.search(text, problems[name])] == []
    with pytest.raises(ValueError, match="sevir-lr, event 'b': .*a.h5, row 6"):
        load(folder, "train")


@pytest.mark.parametrize(
    "rows, text",
    [
        ([("a", "../b.h5", 0, "vil", BEFORE, 0)], "leads out"),
        ([("a", "/b.h5", 0, "vil", BEFORE, 0)], "leads out"),
        ([("a", A, 0, "vil", "yesterday", 0)], "yesterday"),
        ([("a", A, "first", "vil", BEFORE, 0)], "first"),
    ],
)
def test_broken_catalogues_are_refused(tmp_path, rows, text):
    write_catalogue(tmp_path / "lr", rows)
    with pytest.raises(ValueError, match=text):
        load(tmp_path / "lr")


def test_a_catalogue_must_be_there_and_have_its_columns(tmp_path):
    (tmp_path / "lr").mkdir()
    with pytest.raises(ValueError, match="CATALOG.csv does not exist"):
        load(tmp_path / "lr")
    (tmp_path / "lr/CATALOG.csv").write_text("id,file_name\na,b\n")
    with pytest.raises(ValueError, match="'file_index', 'img_type'"):
        load(tmp_path / "lr")


# -- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [None, (1, 128, 128, 25), (1, 64, 64, 5), (2, 128, 128, 1)])
def test_frames_are_those_of_the_file_however_it_is_chunked(tmp_path, chunks):
    folder = tmp_path / "lr"
    write_catalogue(folder, [("a", A, 1, "vil", SUMMER, 0)])
    stored = write_raster(folder / "data" / A, 3, chunks=chunks)[1].transpose(2, 0, 1)
    frames = load(folder, "test")[0]["values"]
    for part in (slice(None), slice(3, 11), slice(2, 20, 3), slice(None, None, -2), slice(9, 9), 7, -1):
        np.testing.assert_array_equal(frames[part], stored[part])
    np.testing.assert_array_equal(frames[4:9, 10:20, 5], stored[4:9, 10:20, 5])


def test_processes_read_files_that_their_parent_has_open(lr_folder):
    windows = Windows(load(lr_folder[0], "train"), encode, 7, 6, stride=6)
    expected = [item["future_values"] for item in windows]
    loader = torch.utils.data.DataLoader(windows, batch_size=None, num_workers=2)
    for item, frames in zip(loader, expected, strict=True):
        assert (item["future_values"] == frames).all()


@pytest.mark.parametrize("frames, context, prediction, stride", [(49, 13, 12, 12), (25, 7, 6, 6)])
def test_three_windows_an_event(frames, context, prediction, stride):
    events = [{"id": "a", "values": np.broadcast_to(np.uint8(1), (frames, 2, 2))}]
    counts = {"train": 11_906, "val": 3_020, "test": 4_053}
    windows = {name: Windows(events * count, encode, context, prediction, stride) for name, count in counts.items()}
    assert {name: len(w) for name, w in windows.items()} == {"train": 35_718, "val": 9_060, "test": 12_159}
    assert windows["val"].index[:4].tolist() == [[0, 0], [0, stride], [0, 2 * stride], [1, 0]]


def test_windows_of_prediff():
    train, val = sevir.prediff_window_split(14_926)
    assert (len(train), len(val)) == (40_301, 4_477)
    assert sorted([*train, *val]) == list(range(44_778))
    assert set(train // 3) & set(val // 3)  # windows of one event fall on both sides
    np.testing.assert_array_equal(sevir.prediff_window_split(14_926)[1], val)
    assert [len(part) for part in sevir.prediff_window_split(14_926, 25)] == [335_835, 37_315]


@pytest.mark.skipif(not GOLDENS.exists(), reason="recorded outputs: set EARTHFORMER_HF_GOLDENS")
@pytest.mark.parametrize("name, scaling", [("01", {"scale": 1 / 255}), ("sevir", sevir.SCALINGS["vil"])])
def test_scalings_are_those_of_the_original(name, scaling):
    golden = load_file(GOLDENS / "sevir_rescale.safetensors")
    raw = golden["input/raw_NHWT"][0].transpose(2, 0, 1)  # (T, H, W)
    extractor = EarthformerFeatureExtractor(**scaling)
    values, _ = extractor.encode(raw)
    np.testing.assert_allclose(values, golden[f"output/forward_{name}"][0, ..., 0], rtol=2e-7, atol=2e-7)
    np.testing.assert_allclose(extractor.decode(values), golden[f"output/back_{name}"][0, ..., 0], atol=5e-5)
    if name == "01":
        np.testing.assert_array_equal(values, encode(raw)[0])
        np.testing.assert_array_equal(values, golden["output/forward_01"][0, ..., 0])


# -- flashes ----------------------------------------------------------------------------------------------------------


def test_flashes_are_counted_where_and_when_they_were():
    flashes = [  # seconds, unused, unused, x, y
        (-7200, 0, 0, 0, 0),
        (-9000, 0, 0, 0, 0),  # before the first frame: in the first
        (-6900.5, 0, 0, 0, 0),
        (-6900, 0, 0, 0, 0),  # on an edge: the frame that begins
        (0, 0, 0, 47.9, 3.2),
        (7199.9, 0, 0, 5, 6),
        (7200, 0, 0, 5, 6),
        (9000, 0, 0, 5, 6),  # after the last frame: in the last
        (0, 0, 0, 48, 3),
        (0, 0, 0, -0.5, 3),
        (0, 0, 0, 3, 48),  # outside the grid
    ]
    counts = sevir.count_flashes(np.array(flashes))
    known = {(0, 0, 0): 3, (1, 0, 0): 1, (24, 3, 47): 1, (47, 6, 5): 1, (48, 6, 5): 2}  # t, y, x
    assert counts.shape == (49, 48, 48) and counts.dtype == "int16" and counts.sum() == sum(known.values())
    assert {place: counts[place] for place in known} == known
    assert not sevir.count_flashes(np.empty((0, 5))).any()


def test_flashes_as_events(tmp_path):
    folder, name = tmp_path / "sevir", "lght/2019/l.h5"
    write_catalogue(folder, [(i, name, 0, "lght", SUMMER, 0) for i in ("S1", "S2", "S3", "S4")])
    (folder / "data/lght/2019").mkdir(parents=True)
    with h5py.File(folder / "data" / name, "w") as file:
        file["S1"] = np.array([[301.0, 40, -90, 7, 9]] * 3)
        file["S2"] = np.empty((0, 5))
        file["S3"] = np.empty((4, 4))
    table = load(folder, "test", "sevir", image_type="lght", keep_bad=True)
    first, second = table[0], table[1]
    assert first["values"][25, 9, 7] == 3 and first["values"][:].sum() == 3 and first["values"].shape == (49, 48, 48)
    assert first["values"][25:23:-1][0, 9, 7] == 3 and not second["values"][:].any()
    problems = table.with_format(None)["problem"][2:]
    assert (
        "needs 'S3' (N, 5) numbers, found (4, 4)" in problems[0] and "'S4' (N, 5) numbers, found ['S1'" in problems[1]
    )


# -- SEVIR-LR from SEVIR ----------------------------------------------------------------------------------------------


def test_downsampling_is_a_block_maximum_of_every_second_frame(tmp_path):
    rows = [
        ("a", A, 1, "vil", BEFORE, 0),
        ("b", A, 0, "vil", BEFORE, 0.3),  # its row is written all the same
        ("c", B, 0, "vil", SUMMER, 0.3),  # its file holds no event
        ("d", "vil/2019/c.h5", 0, "vil", SUMMER, 0),
    ]
    source, target = tmp_path / "sevir", tmp_path / "lr"
    write_catalogue(source, rows)
    values = write_raster(source / "data" / A, 2, grid=(384, 49, "uint8"))
    write_raster(source / "data" / B, 1, grid=(384, 49, "uint8"))
    with pytest.raises(ValueError, match="1 files could not be read: .*c.h5: does not exist"):
        sevir.downsample(source, target)
    assert sorted(path.name for path in target.rglob("*.*")) == ["CATALOG.csv", "a.h5"]
    assert (target / "CATALOG.csv").read_bytes() == (source / "CATALOG.csv").read_bytes()
    (event,) = load(target, "train", keep_bad=True)
    expected = np.zeros((25, 128, 128), "uint8")
    for y in range(128):
        for x in range(128):
            expected[:, y, x] = values[1, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3, ::2].max((0, 1))
    np.testing.assert_array_equal(event["values"], expected)
    # what is there is kept, the rest is made
    state = (target / "data" / A).stat().st_mtime_ns
    write_raster(source / "data/vil/2019/c.h5", 1, grid=(384, 49, "uint8"))
    sevir.downsample(source, target)
    assert (target / "data" / A).stat().st_mtime_ns == state
    assert len(load(target, "test")) == 1 and not list(target.rglob("*.part"))


@pytest.mark.skipif(not (DATA / "radar_open_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
def test_real_radar_in_the_layout_of_sevir(tmp_path):
    spec = importlib.util.spec_from_file_location("radar_open", DATA / "radar_open.py")
    radar_open = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(radar_open)
    radar = DATA / "radar_open_3km.h5"
    number = radar_open.export_sevir(radar, tmp_path / "lr/data", "test", 25, 12, sources=("mrms_20190610",), limit=12)
    shutil.move(tmp_path / "lr/data/CATALOG.csv", tmp_path / "lr/CATALOG.csv")
    sequences = radar_open.list_sequences(radar, "test", 25, 1, 12, ("mrms_20190610",))[:12]
    codes = [radar_open.load(radar, sequence, kind="code") for sequence in sequences]
    whole = [i for i, code in enumerate(codes) if round(float((code == 255).mean()), 4) == 0]
    table = load(tmp_path / "lr", "test")
    assert number == 12 and table["id"][:] == [f"R{i:07d}" for i in whole] and 0 < len(whole)
    for event, i in zip(table, whole):
        np.testing.assert_array_equal(event["values"], radar_open.load(radar, sequences[i]))
    windows = Windows(table, encode, 7, 6, stride=6)
    assert len(windows) == 3 * len(whole)
    expected = radar_open.load(radar, sequences[whole[0]])[6:19].astype("float32") * np.float32(1 / 255)
    item = windows[1]
    np.testing.assert_array_equal(item["past_values"][..., 0], expected[:7])
    np.testing.assert_array_equal(item["future_values"][..., 0], expected[7:])
