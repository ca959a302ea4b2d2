"""Hosted tables and memory maps hold what their source holds, whole or not at all, and stream without loss."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.utils import logging as transformers_logging

from earthformer_hf import EarthformerFeatureExtractor, windows
from earthformer_hf.data.events import ARRAYS, HOSTED_FEATURES, Facts, as_event
from earthformer_hf.data.frames import compressed, decompressed
from earthformer_hf.data.hosted import cached, prepare, push


SCALING = {"scale": 0.5, "missing_value": 255, "fill_value": 0}
FACTS = Facts("rain", "mm/h", "as is", "5m", "4 x 6", "CC0", "nobody", "by hand", "a test", SCALING)
encode = EarthformerFeatureExtractor(**SCALING).encode


def event(number, length=9, dtype="uint8", extras=False):
    random = np.random.default_rng(number)
    values = random.integers(0, 200, (length, 4, 6)).astype(dtype)
    values[:, 0, 0], values[:, 1, 1] = number, 255
    made = {"id": f"e{number}", "time": np.arange(length).astype("datetime64[m]"), "values": values, "geo": {"x": 1}}
    if extras:
        made["observed"] = random.random((length, 4, 6)) < 0.8
        made["covariates"] = random.normal(size=(length, 4, 6, 2)).astype("float32")
        made["series"] = {"index": random.normal(size=length), "place": random.normal(size=(length, 3, 2))}
    return made


def table_of(events):
    rows = []
    for made in events:
        series = {name: numbers.tolist() for name, numbers in made.get("series", {}).items()}
        rows.append(
            {
                "id": made["id"], "length": len(made["values"]), "geo": json.dumps(made["geo"]),
                "time": made["time"].astype("datetime64[s]").tolist(), "missing": 0, "series": json.dumps(series),
            }
            | {name: compressed(made[name]) if name in made else None for name in ARRAYS}
        )  # fmt: skip
    return datasets.Dataset.from_list(rows, features=HOSTED_FEATURES)


def same_events(found, expected):
    assert [made["id"] for made in found] == [made["id"] for made in expected]
    for one, other in zip(found, expected):
        assert set(one) == set(other) and one["geo"] == other["geo"]
        np.testing.assert_array_equal(one["time"], other["time"])
        for name in set(ARRAYS) & set(one):
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(np.asarray(one[name]), other[name])
        for name, series in one.get("series", {}).items():
            np.testing.assert_array_equal(series, other["series"][name])


def hosted(folder, number=12, shards=4, **options):
    """A folder with a split of that many events and shards."""
    size = 9 * 24 * number // shards
    assert not prepare({"train": table_of(map(event, range(number)))}, folder, FACTS, size, **options)
    return folder


def stream(folder, split="train"):
    return datasets.load_dataset(str(folder), split=split, streaming=True)


# -- frames -----------------------------------------------------------------------------------------------------------


def test_frames_are_decompressed_as_they_are_asked_for():
    frames = event(3)["values"]
    stored = compressed(frames)
    lazy = decompressed(stored)
    assert lazy.shape == frames.shape and lazy.dtype == frames.dtype
    for key in (slice(2, 7, 2), slice(None), -1, (slice(1, 3), 2), (4, slice(None), 0)):
        np.testing.assert_array_equal(lazy[key], frames[key])
    stored["frames"][5] = stored["frames"][5][:-3]
    np.testing.assert_array_equal(decompressed(stored)[:5], frames[:5])
    with pytest.raises(ValueError, match="frame 5 does not hold 24 bytes of uint8"):
        decompressed(stored)[4:6]
    with pytest.raises(ValueError, match="plain numbers"):
        decompressed(stored | {"dtype": "object"})
    with pytest.raises(ValueError, match="declare 1099511627776 bytes each"):
        decompressed(stored | {"shape": [2**20, 2**20]})[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"geo": "{"}, "Expecting property name"),
        ({"geo": "[" * 100_000}, "recursion"),
        ({"series": '{"index": [1]}'}, "the series 'index' must hold a number for each of 9 frames"),
        ({"series": '{"index": ["a", "b", "c", "d", "e", "f", "g", "h", "i"]}'}, "must hold a number"),
        ({"values": {"frames": [], "shape": [4, 6], "dtype": "uint8"}}, "holds no frames"),
        ({"time": [None] * 3}, "5 frames or more, the longest has 3"),
    ],
)
def test_rows_that_are_no_events(change, message):
    rows = [row | change for row in table_of([event(0)]).to_list()]
    with pytest.raises(ValueError, match=message):
        windows(datasets.Dataset.from_list(rows, features=HOSTED_FEATURES), encode, 3, 2)[0]


# -- prepare ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extras", [False, True])
def test_a_hosted_table_is_its_source(tmp_path, extras):
    events = [event(number, 5 + number, extras=extras) for number in range(7)]
    tables = {"train": table_of(events[:5]), "test": table_of(events[5:])}
    assert prepare(tables, tmp_path, FACTS, max_shard_size=300) == []
    loaded = datasets.load_dataset(str(tmp_path), cache_dir=tmp_path / "cache")
    same_events([as_event(row) for row in loaded["train"]], events[:5])
    same_events([as_event(row) for row in stream(tmp_path, "test")], events[5:])
    options = {"series": ["index"] if extras else [], "stride": 2}
    expected = windows(events[:5], encode, 3, 2, **options)
    for found in (
        windows(loaded["train"], encode, 3, 2, **options),
        windows(stream(tmp_path), encode, 3, 2, **options),
    ):
        found = list(found)
        assert len(found) == len(expected) == 9
        for one, other in zip(found, expected):
            assert set(one) == set(other)
            for name in other:
                torch.testing.assert_close(torch.as_tensor(one[name]), other[name], rtol=0, atol=0)


def test_missing_values_are_counted(tmp_path):
    made = event(0, extras=True)
    known = made["observed"] & (made["values"] != 255)
    prepare({"train": table_of([made])}, tmp_path, FACTS)
    assert next(iter(stream(tmp_path)))["missing"] == known.size - known.sum() > 9
    assert f"| train | 1 | 9 | {1 - known.mean():.3%} |" in (tmp_path / "README.md").read_text()
    prepare({"train": table_of([made])}, tmp_path, replace(FACTS, feature_extractor=SCALING | {"missing_value": None}))
    assert next(iter(stream(tmp_path)))["missing"] == (~made["observed"]).sum()  # counted anew by another rule


def test_what_cannot_be_used_is_listed_and_the_rest_written(tmp_path):
    events = [event(number, dtype="float32") for number in range(6)]
    events[1]["values"][:] = np.nan
    events[2]["observed"] = np.zeros((9, 4, 6), bool)
    events[3]["values"] = events[3]["values"][:8]
    table = table_of(events).to_list()
    table[3]["length"] = 9
    table[4]["values"]["frames"][7] = b"no frame"
    table = datasets.Dataset.from_list(table, features=HOSTED_FEATURES)
    problems = prepare({"val": table}, tmp_path, FACTS, max_shard_size=2000)
    assert problems == [
        "val, event 'e1': none of its values was observed.",
        "val, event 'e2': none of its values was observed.",
        "val, event 'e3': `values` must be numbers (9, H, W) or (9, H, W, C), got float32 (8, 4, 6).",
        problems[3],
    ]
    assert "event 'e4', `values`: frame 7 does not hold 96 bytes" in problems[3]
    assert [row["id"] for row in stream(tmp_path, "val")] == ["e0", "e5"]
    assert problems[3] in (tmp_path / "README.md").read_text()
    assert prepare({"val": table}, tmp_path, FACTS, max_shard_size=2000) == problems  # told again


def checksums(folder):
    return (folder / "SHA256SUMS").read_text()


def test_finished_shards_are_kept(tmp_path):
    table = table_of(map(event, range(12)))
    prepare({"train": table}, tmp_path, FACTS, max_shard_size=700)
    shards, before = sorted((tmp_path / "data").iterdir()), checksums(tmp_path)
    assert len(shards) == 4 and len(before.splitlines()) == 4
    content = bytearray(shards[1].read_bytes())
    content[100] ^= 1  # damaged
    shards[1].write_bytes(content)
    shards[2].unlink()
    times = [path.stat().st_mtime_ns for path in (shards[0], shards[3])]
    prepare({"train": table}, tmp_path, FACTS, max_shard_size=700, num_proc=2)
    assert checksums(tmp_path) == before and sorted((tmp_path / "data").iterdir()) == shards
    assert times == [path.stat().st_mtime_ns for path in (shards[0], shards[3])]
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match="shards of other tables"):
        prepare({"train": table}, tmp_path, FACTS, max_shard_size=10_000)
    (tmp_path / "README.md").write_text("by hand")
    prepare({"train": table}, tmp_path, FACTS, max_shard_size=700)
    assert (tmp_path / "README.md").read_text() == "by hand"
    shards[0].write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="differs from its checksum"):
        push(tmp_path, "someone/events")


def test_tables_that_cannot_be_prepared(tmp_path):
    with pytest.raises(ValueError, match="no events"):
        prepare({"train": table_of([event(1)]).select([])}, tmp_path, FACTS)
    with pytest.raises(ValueError, match="`facts` must be given"):
        prepare({"train": table_of([event(1)])}, tmp_path)
    with pytest.raises(ValueError, match="must hold SHA256SUMS"):
        push(tmp_path, "someone/events")


def test_what_a_downloaded_table_may_not_do(tmp_path):
    np.save(tmp_path / "values.npy", np.zeros((9, 4, 6)))
    secret = {"source": "cache", "path": str(tmp_path), "first": 0, "length": 9}
    row = {"id": "e", "length": 9, "geo": "{}", "time": event(0)["time"].astype("datetime64[s]").tolist()}
    made = datasets.Dataset.from_list([row | {"reference": json.dumps(secret)}])
    made.to_parquet(tmp_path / "crafted" / "train.parquet")
    for streaming in (False, True):
        table = datasets.load_dataset(
            str(tmp_path / "crafted"), split="train", streaming=streaming, cache_dir=tmp_path / "cache"
        )
        with pytest.raises(ValueError, match="must hold its frames, not refer to files"):
            windows(table, encode, 3, 2)
    rows = table_of([event(0)]).to_list()
    rows[0]["length"] = 2**31 - 1  # windows of this many frames would fill the memory
    assert len(windows(datasets.Dataset.from_list(rows, features=HOSTED_FEATURES), encode, 3, 2)) == 5


def test_events_shorter_than_a_window_are_named(tmp_path, caplog):
    table = table_of([event(0), event(1, length=4)])
    prepare({"train": table}, tmp_path, FACTS)
    logger = transformers_logging.get_logger("earthformer_hf")
    logger.addHandler(caplog.handler)
    try:
        assert len(windows(table, encode, 3, 2)) == len(list(windows(stream(tmp_path), encode, 3, 2))) == 5
    finally:
        logger.removeHandler(caplog.handler)
    assert "1 of 2 events are shorter than a window of 5 frames and left out, such as 'e1' with 4" in caplog.text
    assert "event 'e1', `values` holds 4 frames, a window needs 5: left out" in caplog.text


# -- streaming --------------------------------------------------------------------------------------------------------


def numbers_of(items):
    """Event and first frame of windows, from their values."""
    return [(int(2 * item["past_values"][0, 0, 0, 0]), float(item["past_values"].sum())) for item in items]


def expected_numbers(count):
    return numbers_of(windows(list(map(event, range(count))), encode, 3, 2, stride=2))


def _read_share(folder, rank, size, workers, results):
    share = windows(split_dataset_by_node(stream(folder), rank, size), encode, 3, 2, stride=2)
    results.put(numbers_of(DataLoader(share, batch_size=None, num_workers=workers)))


@pytest.mark.parametrize("shards", [4, 3])  # a multiple of the processes, or not
def test_processes_and_workers_share_a_stream(tmp_path, shards):
    hosted(tmp_path, 12, shards)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_share, args=(tmp_path, rank, 2, 2, results)) for rank in range(2)]
    for process in processes:
        process.start()
    shares = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert all(len(share) == len(shares[0]) for share in shares)
    assert sorted(shares[0] + shares[1]) == sorted(expected_numbers(12))


def test_a_stream_goes_on_in_the_middle_of_an_event(tmp_path):
    hosted(tmp_path, 6, 3)
    expected = expected_numbers(6)
    assert numbers_of(windows(stream(tmp_path), encode, 3, 2, stride=2)) == expected
    for stop in range(0, len(expected), 4):
        first = windows(stream(tmp_path), encode, 3, 2, stride=2)
        iterator = iter(first)
        seen = numbers_of([next(iterator) for _ in range(stop)])
        state = json.loads(json.dumps(first.state_dict()))
        rest = windows(stream(tmp_path), encode, 3, 2, stride=2)
        rest.load_state_dict(state)
        assert seen + numbers_of(rest) == expected


def test_a_loader_with_workers_goes_on(tmp_path):
    hosted(tmp_path, 8, 4)

    def loader():
        items = windows(stream(tmp_path), encode, 3, 2, stride=2)
        return StatefulDataLoader(items, batch_size=None, num_workers=2)

    whole = numbers_of(loader())
    first = loader()
    iterator = iter(first)
    seen = numbers_of([next(iterator) for _ in range(7)])
    rest = loader()
    rest.load_state_dict(first.state_dict())
    assert seen + numbers_of(rest) == whole and sorted(whole) == sorted(expected_numbers(8))


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extras", [False, True])
def test_the_cache_is_its_table(tmp_path, extras):
    events = [event(number, 5 + number, extras=extras) for number in range(7)]
    table = table_of(events)
    kept = cached(table, tmp_path, max_shard_size=300)
    same_events([as_event(row) for row in kept], events)
    assert isinstance(as_event(kept[2])["values"], np.memmap)
    assert len(list(windows(kept.to_iterable_dataset(), encode, 3, 2))) == len(windows(kept, encode, 3, 2))
    items = windows(kept, encode, 3, 2)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len({path.parent for path in files}) > 1
    again = windows(cached(table, tmp_path, max_shard_size=300, num_proc=2), encode, 3, 2)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    batches = DataLoader(again, batch_size=4, num_workers=2)
    found = torch.cat([batch["past_values"] for batch in batches])
    torch.testing.assert_close(found, torch.stack([item["past_values"] for item in items]))


def test_events_that_do_not_fit_the_cache(tmp_path):
    other = event(2)
    other["values"] = other["values"][:, :3]
    with pytest.raises(ValueError, match=r"event 'e2' holds .*\(3, 6\).*those before it .*\(4, 6\)"):
        cached(table_of([event(0), event(1), other]), tmp_path)
    assert not list(tmp_path.rglob("0*[0-9]"))  # no finished shard
    wrong = table_of([event(0)]).to_list()
    wrong[0]["values"]["frames"][2] = b""
    with pytest.raises(ValueError, match="event 'e0', `values`: frame 2"):
        cached(datasets.Dataset.from_list(wrong, features=HOSTED_FEATURES), tmp_path)


# -- kill -------------------------------------------------------------------------------------------------------------

KILLED = """
import sys
from test_hosted import FACTS, event, prepare, table_of
prepare({"train": table_of([event(n, 200) for n in range(200)])}, sys.argv[1], FACTS, 25_000, num_proc=2)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    def start(folder):
        tests = Path(__file__).parent
        environment = os.environ | {"PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-c", KILLED, folder]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)

    assert start(tmp_path / "whole").wait() == 0
    process = start(tmp_path / "killed")
    while len(list((tmp_path / "killed").glob("data/*.parquet"))) < 10:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("data/*.parquet")}
    assert 10 <= len(done) < 40 and not (tmp_path / "killed" / "SHA256SUMS").exists()
    assert start(tmp_path / "killed").wait() == 0
    assert checksums(tmp_path / "killed") == checksums(tmp_path / "whole")
    kept = [path.stat().st_mtime_ns == changed for path, changed in done.items()]
    assert sum(kept) >= len(done) - 2  # but those whose record was not written yet
    assert not list((tmp_path / "killed").rglob("*.part"))
