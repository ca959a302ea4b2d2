"""Seams of forecasts in tiles, on the open radar mosaic: differences across edges of tiles against those elsewhere.

    python benchmarks/seams.py                                       # Earthformer
    python benchmarks/seams.py --model model_cards/prediff-radar-small --members 2

For every edge of a tile: the RMS difference of the two pixels on both sides of it, over that of all other neighbours.
The same for the last observed frame, which has no tiles: what weather alone does at these places. For Earthformer also
the RMS difference between tiles and one map of twice the size, by the same weights with longer tables of positions,
over the RMS of the forecast.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from earthformer_hf import EarthformerForPrediction
from earthformer_hf.data.events import find_data_dir
from earthformer_hf.data.guards import open_hdf5
from earthformer_hf.data.open_radar import rain_rate
from earthformer_hf.forecasting.forecast import context_of, roll_out
from earthformer_hf.forecasting.mosaic import cover
from earthformer_hf.forecasting.nowcasters import load_nowcaster
from earthformer_hf.forecasting.numbers import numbers_of
from earthformer_hf.forecasting.observations import observe


def ratio(maps: np.ndarray, edges: list[int]) -> float:
    """RMS difference between rows e - 1 and e at the edges e, over that of all other rows, of (..., H, W)."""
    squares = np.diff(maps, axis=-2) ** 2
    at_edge = np.zeros(squares.shape[-2], bool)
    at_edge[[edge - 1 for edge in edges]] = True
    return float(np.sqrt(np.nanmean(squares[..., at_edge, :]) / np.nanmean(squares[..., ~at_edge, :])))


def both_ways(maps: np.ndarray, corners: list) -> float:
    height, width = maps.shape[-2:]
    rows = sorted({edge for corner in corners for edge in corner[:2] if 0 < edge < height})
    columns = sorted({edge for corner in corners for edge in corner[2:] if 0 < edge < width})
    return float(np.sqrt((ratio(maps, rows) ** 2 + ratio(maps.swapaxes(-1, -2), columns) ** 2) / 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/earthformer-radar-tiny")
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--crop", type=int, nargs=4, default=[600, 1112, 1400, 1912], help="of the mosaic at 3 km")
    parser.add_argument("--overlap", type=int, default=32)
    arguments = parser.parse_args()
    top, bottom, left, right = arguments.crop
    group = open_hdf5(find_data_dir() / "radar_open_3km.h5")["mrms_20190610"]
    codes = group["code"][:26, top:bottom, left:right]
    rain = np.where(codes == 255, np.nan, rain_rate(np.where(codes == 255, 0, codes))).astype("float32")
    nowcaster = load_nowcaster(arguments.model, device="cpu")
    minutes = int(nowcaster.extractor.time_step[:-1])
    observations = observe(rain[:: minutes // 2], units="mm/h", time_step=f"{minutes}m", grid_spacing="3 km")
    numbers = numbers_of(observations.facts, nowcaster.extractor)
    context = context_of(observations, nowcaster, numbers)
    members = range(arguments.members if nowcaster.makes_ensembles else 1)
    raw = roll_out(nowcaster, context, members, nowcaster.prediction_length, 0, arguments.overlap)
    tiles = cover(context.grid.shape, nowcaster.tile, arguments.overlap, nowcaster.latent_pixels)
    last = np.where(context.observed[-1], nowcaster.extractor.decode(context.values[-1]), np.nan)
    found, weather = both_ways(raw, tiles.corners), both_ways(last, tiles.corners)
    print(f"{Path(arguments.model).name}, {len(tiles.corners)} tiles with an overlap of {arguments.overlap} pixels")
    print(f"RMS difference across edges over elsewhere: forecast {found:.3f}, last observed frame {weather:.3f}")
    if not nowcaster.makes_ensembles:
        rows, columns = (2 * side for side in nowcaster.tile)
        whole = EarthformerForPrediction.from_pretrained(arguments.model, image_size=[rows, columns]).eval()
        past = torch.from_numpy(context.values[:, :rows, :columns])[None, ..., None]
        with torch.inference_mode():
            at_once = nowcaster.extractor.decode(whole(past).predictions[..., 0])
        part = raw[:, :, :rows, :columns]
        inside = slice(16, -16)
        error = np.sqrt(np.mean((part - at_once)[..., inside, inside] ** 2) / np.mean(at_once**2))
        print(f"tiles against a whole of {rows} x {columns}: RMS difference over RMS {error:.3f}")


if __name__ == "__main__":
    main()
