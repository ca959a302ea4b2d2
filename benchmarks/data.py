"""How fast events become windows, side by side with the plainest way to read the same bytes.

    python benchmarks/data.py                # about five minutes; needs 2 GB below the folder of temporary files
    python benchmarks/data.py --windows 1000 # a shorter epoch for the memory

Random windows of 25 frames of 384 x 384 uint8, from made-up events in SEVIR's shape (49 frames, three quarters zeros),
with warm caches. The ways of a row take turns, and the fastest of their turns counts: 1.00 is as fast as the other.
"""

import argparse
import csv
import re
import tempfile
import time
from pathlib import Path

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from nbody_loop import nbody_loop

import earthformer_hf
from earthformer_hf.data import nbody_mnist, simulated
from earthformer_hf.data.events import as_event
from earthformer_hf.data.hosted import cached, prepare
from earthformer_hf.data.windows import Windows


FRAMES, SIZE, LENGTH = 49, 384, 25
TURNS = 5


def made_up(count: int) -> np.ndarray:
    """Events (count, 49, 384, 384) uint8: a few simulated ones, turned and shifted."""
    rain = np.stack([event["values"] for event in simulated.rain_events(4, FRAMES, SIZE)])
    codes = np.clip(60 * rain**0.5, 0, 254).astype("uint8")
    return np.stack([np.roll(np.rot90(codes[n % 4], n // 4, (1, 2)), 37 * n, 1) for n in range(count)])


def write_sevir(folder: Path, values: np.ndarray, **layout) -> Path:
    """A SEVIR data set of one file, whose events are all of the split "test"."""
    (folder / "data" / "vil").mkdir(parents=True)
    with h5py.File(folder / "data" / "vil" / "made_up.h5", "w") as file:
        data = file.create_dataset("vil", (len(values), SIZE, SIZE, FRAMES), "uint8", **layout)
        for index, event in enumerate(values):
            data[index] = event.transpose(1, 2, 0)
    with open(folder / "CATALOG.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "file_name", "file_index", "img_type", "time_utc", "pct_missing"])
        for index in range(len(values)):
            writer.writerow([f"S{index:04d}", "vil/made_up.h5", index, "vil", "2019-07-01 12:00:00", 0])
    return folder


def compare(label: str, ours, plain, repeat: int = 1):
    """Both take no argument and return the bytes that they read, which must be as many."""
    times, sizes = {ours: [], plain: []}, {}
    for _ in range(TURNS):
        for way in times:
            begin = time.perf_counter()
            for _ in range(repeat):
                sizes[way] = way()
            times[way].append(time.perf_counter() - begin)
    if sizes[ours] != sizes[plain]:
        raise SystemExit(f"{label}: {sizes[ours]} bytes are not {sizes[plain]}")
    speed = {way: repeat * sizes[way] / min(times[way]) / 1e6 for way in times}
    ratio, speeds = speed[ours] / speed[plain], f"{speed[ours]:7.0f} against {speed[plain]:7.0f} MB/s"
    print(f"{label:58s} {ratio:8.2f}   {speeds}", flush=True)


def compare_nbody(folder: Path, number: int = 256):
    """Sequences drawn from made-up digits."""
    random = np.random.default_rng(0)
    digits = np.zeros((100, 28, 28), "uint8")
    for digit in digits:
        top, left, height, width = *random.integers(4, 8, 2), *random.integers(10, 20, 2)
        digit[top : top + height, left : left + width] = random.integers(1, 256, (height, width))
    (folder / "digits").mkdir()
    np.save(folder / "digits" / "digits.npy", digits)
    options = {"digits": "digits.npy", "sizes": (number, 1, 1), "cache_dir": folder / "tables"}
    table = earthformer_hf.load_dataset("nbody-mnist", folder / "digits", "train", **options).with_format(None)
    crops, sizes = nbody_mnist.load_digits(str(folder / "digits" / "digits.npy"))
    starts = [as_event(row)["series"] for row in table]
    chosen = [random.integers(100, size=3) for _ in starts]

    def ours():
        nbody_mnist._moved.cache_clear()
        return sum(as_event(row)["values"][:].nbytes for row in table)

    def loop():
        size = 0
        for series, indices in zip(starts, chosen):
            shapes = sizes[indices].astype(int)
            cropped = [crops[i, :height, :width] for i, (width, height) in zip(indices, shapes)]
            size += nbody_loop(cropped, series["positions"][0], series["velocities"][0])[0].nbytes
        return size

    compare("N-body MNIST / a loop over frames and digits", ours, loop)


def anonymous_memory() -> float:
    """MB of this process that are not backed by files; Linux only."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


LAYOUTS: dict[str, dict] = {  # of SEVIR files
    "contiguous": {},
    "gzip, an event per chunk": {"chunks": (1, SIZE, SIZE, FRAMES), "compression": "gzip", "compression_opts": 1},
}


def encode(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return raw, raw != 255


class MadeUpEvents:
    """Events, the SEVIR files that hold them, and the windows of them that are read."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.values = folder, made_up(number)
        print(f"{number} events, {self.values.nbytes / 1e6:.0f} MB, {(self.values == 0).mean():.0%} zeros")
        self.files, self.tables = {}, {}
        for layout, options in LAYOUTS.items():
            source = write_sevir(folder / f"sevir{len(self.files)}", self.values, **options)
            self.files[layout] = source / "data" / "vil" / "made_up.h5"
            self.tables[layout] = earthformer_hf.load_dataset("sevir", source, "test", cache_dir=folder / "tables")
        windows = self.windows("contiguous")
        self.chosen = np.random.default_rng(0).integers(len(windows), size=200).tolist()
        self.index = windows.index.tolist()

    def windows(self, layout: str) -> Windows:
        return Windows(self.tables[layout], encode, 13, 12)

    def plain(self, read, items: list[int]):
        """Bytes of windows that `read(event, start)` returns."""
        return lambda: sum(np.array(read(*self.index[item])).nbytes for item in items)


def ours(windows: Windows, items: list[int]):
    return lambda: sum(np.array(windows.raw(item)).nbytes for item in items)


def compare_local_cache(events: MadeUpEvents) -> Windows:
    folder, few = events.folder, events.chosen[:4]
    np.save(folder / "plain.npy", events.values)
    memory_map = np.load(folder / "plain.npy", mmap_mode="r")
    local = Windows(cached(events.tables["contiguous"], folder / "cache"), encode, 13, 12)
    compare(
        "local cache / numpy memory map", ours(local, events.chosen),
        events.plain(lambda event, start: memory_map[event, start : start + LENGTH], events.chosen),
    )  # fmt: skip
    features = datasets.Features({"values": datasets.Array3D((FRAMES, SIZE, SIZE), "uint8")})
    generated = {"cache_dir": str(folder / "array3d"), "features": features, "fingerprint": "made-up"}
    array3d = datasets.Dataset.from_generator(lambda: ({"values": event} for event in events.values), **generated)
    array3d = array3d.with_format("numpy")
    upcast = array3d[0]["values"].dtype

    def default_format():
        places = (events.index[item] for item in few)
        windows = (array3d[event]["values"][start:][:LENGTH] for event, start in places)
        return sum(window.size for window in windows)  # pixels: they come as int64

    compare(f"local cache / Array3D, default numpy format ({upcast})", ours(local, few), default_format)
    return local


def compare_sevir_files(events: MadeUpEvents):
    items = events.chosen[:40]
    for layout, path in events.files.items():
        with h5py.File(path) as file:

            def bare(event, start):
                return file["vil"][event, :, :, start : start + LENGTH].transpose(2, 0, 1)  # noqa: B023

            compare(f"SEVIR file / h5py, {layout}", ours(events.windows(layout), items), events.plain(bare, items))


def compare_hosted(events: MadeUpEvents, local: Windows) -> Windows:
    hosted = events.folder / "hosted"
    problems = prepare({"test": events.tables["contiguous"]}, hosted, max_shard_size="60MB")
    shards = sorted((hosted / "data").glob("*.parquet"))
    print(f"hosted: {sum(path.stat().st_size for path in shards) / 1e6:.0f} MB in {len(shards)} shards, {problems}")

    def streamed():
        size = 0
        for row in datasets.load_dataset(str(hosted), split="test", streaming=True):
            event = as_event(row)
            size += sum(event["values"][start : start + LENGTH].nbytes for start in range(0, 25, 12))
        return size

    def by_hand():
        size = 0
        for path in shards:
            for batch in pq.ParquetFile(path).iter_batches():
                for row in batch.column("values").to_pylist():
                    for start in range(0, 25, 12):
                        window = np.empty((LENGTH, SIZE, SIZE), "uint8")
                        for place, frame in enumerate(row["frames"][start : start + LENGTH]):
                            data = pa.decompress(frame, SIZE * SIZE, "zstd")
                            window[place] = np.frombuffer(data, "uint8").reshape(SIZE, SIZE)
                        size += window.nbytes
        return size

    compare("streamed parquet / read and decompressed by hand", streamed, by_hand)
    table = datasets.load_dataset(str(hosted), split="test", cache_dir=str(events.folder / "downloaded"))
    downloaded, items = Windows(table, encode, 13, 12), events.chosen[:40]
    compare("local cache / downloaded parquet", ours(local, items), ours(downloaded, items))
    return downloaded


def watch_memory(label: str, windows: Windows, epoch: int):
    before, highest = anonymous_memory(), 0.0
    for count, item in enumerate(np.random.default_rng(1).integers(len(windows), size=epoch)):
        windows.raw(item).max()
        if count == 20:
            before = anonymous_memory()
        highest = max(highest, anonymous_memory() - before) if count % 100 == 0 else highest
    print(f"memory over {epoch} windows, {label:29s} {highest:+8.1f} MB", flush=True)


def run(folder: Path, number: int, epoch: int):
    events = MadeUpEvents(folder, number)
    local = compare_local_cache(events)
    compare_sevir_files(events)
    downloaded = compare_hosted(events, local)
    compare_nbody(folder)

    watch_memory("local cache", local, epoch)
    watch_memory("SEVIR file", events.windows("contiguous"), epoch)
    watch_memory("downloaded parquet", downloaded, epoch)
    options = {"digits": "digits.npy", "sizes": (epoch, 1, 1), "cache_dir": folder / "tables"}
    table = earthformer_hf.load_dataset("nbody-mnist", folder / "digits", "train", **options)
    watch_memory("N-body MNIST, an event a window", Windows(table, encode, 10, 10), epoch)
    watch_memory("its local cache", Windows(cached(table, folder / "cache"), encode, 10, 10), epoch)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=32)
    parser.add_argument("--windows", type=int, default=10_000, help="of the epoch whose memory is watched")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.events, arguments.windows)


if __name__ == "__main__":
    main()
