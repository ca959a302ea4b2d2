"""An archive of rain in two files with a hole between them, and tiny models as folders."""

import numpy as np
import xarray as xr
from tiny import tiny_model, tiny_pipeline

from earthformer_hf import EarthformerFeatureExtractor


EXTRACTOR = EarthformerFeatureExtractor(
    scale=0.1, variable="rain rate", units="mm/h", time_step="10m", grid_spacing="3 km", fill_value=0.0
)


def rain(frames=30, first="2020-06-01T00:00", shape=(20, 28), seed=0):
    """Blobs that move, 3 km and 10 minutes apart, from the northernmost row on."""
    y, x = 3000.0 * np.arange(shape[0])[::-1], 3000.0 * np.arange(shape[1])
    rows, columns = np.indices(shape)
    phase = np.random.default_rng(seed).uniform(0, 6)
    values = [4 * np.clip(np.sin(rows / 3 + phase) * np.sin((columns - n) / 4), 0, 1) for n in range(frames)]
    time = np.datetime64(first, "ns") + np.arange(frames) * np.timedelta64(10, "m")
    attributes = {name: {"units": "m", "standard_name": f"projection_{name}_coordinate"} for name in "yx"}
    return xr.Dataset(
        {"rain": (("time", "y", "x"), np.float32(values), {"units": "mm h-1"})},
        {"time": time, "y": ("y", y, attributes["y"]), "x": ("x", x, attributes["x"])},
    )


def write_archive(folder):
    """00:00 to 01:10, nothing until 02:00, then to 03:20."""
    folder.mkdir()
    rain(8).to_netcdf(folder / "a.nc")
    rain(9, "2020-06-01T02:00", seed=1).to_netcdf(folder / "b.nc")
    return folder


def save_model(folder, pipeline=False):
    model = tiny_pipeline() if pipeline else tiny_model()
    if pipeline:
        model.register_modules(feature_extractor=EXTRACTOR)
    model.save_pretrained(folder)
    if not pipeline:
        EXTRACTOR.save_pretrained(folder)
    return folder
