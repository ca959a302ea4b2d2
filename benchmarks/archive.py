"""How much faster two workers forecast over an archive than one.

    python benchmarks/archive.py                                                      # the tiny radar model
    python benchmarks/archive.py --model model_cards/earthformer-radar-small --starts 40 --size 384

Both in one run, on this machine, from the same rain, which moves evenly. The time that workers take to start and to
load the model is in it: it is measured with two starts, and taken off as well.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import xarray as xr

from earthformer_hf.data.file_times import parsed_step
from earthformer_hf.forecasting import forecast_archive
from earthformer_hf.forecasting.nowcasters import load_nowcaster


FIRST = np.datetime64("2020-06-01T00:00", "ns")


def write_rain(path: Path, frames: int, size: int, step: np.timedelta64, spacing: float):
    """mm/h (frames, size, size), `spacing` km apart."""
    rows, columns = np.indices((size, size))
    values = [8 * np.clip(np.sin(rows / 15) * np.sin((columns - 2 * n) / 20), 0, 1) for n in range(frames)]
    sides = {name: (name, 1000 * spacing * np.arange(size), {"units": "m"}) for name in "yx"}
    rain = ("time", "y", "x"), np.float32(values), {"units": "mm h-1"}
    xr.Dataset({"rain": rain}, sides | {"time": FIRST + step * np.arange(frames)}).to_netcdf(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/earthformer-radar-tiny")
    parser.add_argument("--starts", type=int, default=30)
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the maps")
    arguments = parser.parse_args()
    nowcaster = load_nowcaster(arguments.model, device="cpu")
    step, context = parsed_step(nowcaster.extractor.time_step), nowcaster.context_length
    first = FIRST + step * (context - 1)
    seconds = {}
    with TemporaryDirectory() as folder:
        rain = Path(folder) / "rain.nc"
        spacing = float(nowcaster.extractor.grid_spacing.split()[0])
        write_rain(rain, context + arguments.starts, arguments.size, step, spacing)
        for workers in (1, 2):
            for starts in (2, arguments.starts):
                begin = time.perf_counter()
                times = str(first)[:19], str(first + step * (starts - 1))[:19], nowcaster.extractor.time_step
                out = Path(folder) / f"{workers}-{starts}.zarr"
                made = forecast_archive(arguments.model, rain, out, *times, workers=workers, device="cpu")["made"]
                seconds[workers, starts] = time.perf_counter() - begin
                print(f"{workers} workers, {made} starts: {seconds[workers, starts]:.1f} s")
    whole = seconds[1, arguments.starts] / seconds[2, arguments.starts]
    running = [seconds[workers, arguments.starts] - seconds[workers, 2] for workers in (1, 2)]
    print(f"2 workers against 1: {whole:.2f} times as fast, {running[0] / running[1]:.2f} without their start")


if __name__ == "__main__":
    main()
