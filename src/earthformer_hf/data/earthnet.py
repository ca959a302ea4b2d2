"""EarthNet2021 and EarthNet2021x: Sentinel-2 images of Europe's land surface every 5 days, and the weather.

Source: Requena-Mesa et al., "EarthNet2021", CVPR Workshops 2021, https://arxiv.org/abs/2104.10066, read as Earthformer
does (Gao et al., NeurIPS 2022), with the rules of the package `earthnet` for 2021x. The files are scaled already:
nothing but a cut to 0..1 is done to them.

```
days    0    4    9    14        49   54            149
images       x    x    x   ...   x  |  x   ...       x     frame k is of day 5k + 4
weather x    x    x        ...   x  |  x   ...             frame k takes day 5k (nearest neighbour, as published)
                        context, 10 | 20, target
```

Three things are done right that the original does otherwise: context and target of a test cube are paired by name, not
by their place in a sorted list; a pixel without a mask (NaN) counts as masked, not as clear; a pixel without a value
(NaN or infinite) is missing and masked, not a clear 0.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .events import EventBuilder, EventConfig, Facts
from .frames import LazyFrames
from .guards import load_npz, open_dataset


SIZE, DAYS = 128, 5  # pixels of a cube's side, days of a frame
FRAMES = {"train": 30, "val": 30, "iid": 30, "ood": 30, "extreme": 60, "seasonal": 210}  # context 1 : target 2
COVARIATES = (
    "elevation",
    "precipitation",
    "pressure",
    "mean temperature",
    "minimum temperature",
    "maximum temperature",
    "coarse elevation",
)
CLEAR = (1, 2, 4, 5, 6, 7)  # scene classes of 2021x that may be clear
BANDS = ("s2_B02", "s2_B03", "s2_B04", "s2_B8A")
WEATHER = {  # (value + offset) / scale
    "eobs_rr": (0, 50),
    "eobs_pp": (-900, 200),
    "eobs_tg": (50, 100),
    "eobs_tn": (50, 100),
    "eobs_tx": (50, 100),
}


class _EarthNet(EventBuilder):
    """What both have in common: `values` (T, 128, 128, 4) float32 in 0..1, blue, green, red and near infrared, NaN
    where there is none; `observed` (T, 128, 128), false where masked (clouds) or missing; `covariates`
    (T, 128, 128, 7), see `COVARIATES`, as the files scale them, 0 where they are missing.
    """

    SPLITS = tuple(FRAMES)

    def _split_generators(self, dl_manager: Any) -> list:
        """Those whose files are there: few have all of the 455 GB."""
        present = [part for part in super()._split_generators(dl_manager) if self.folder(part.name).is_dir()]
        if not present:
            raise ValueError(f"`data_dir` must hold folders such as {self.folder('train')} or {self.folder('iid')}.")
        return present

    def folder(self, split: str) -> Path:
        raise NotImplementedError

    def listed(self, split: str, folder: Path, ending: str) -> list[Path]:
        """The cubes of a split: those below `folder` sorted by path; training and validation are drawn from all."""
        files = sorted(folder.rglob(f"*{ending}"))
        if not files:
            raise ValueError(f"`data_dir`: {folder} holds no {ending} file.")
        return [files[count] for count in train_or_val(len(files), split)] if split in ("train", "val") else files

    def row(self, split: str, path: Path, /, **reference: Any) -> dict[str, Any]:
        name = cube_name(path)
        try:
            tile, first = name.split("_")[:2]
            start = np.datetime64(first, "D")
        except ValueError:
            return {"id": f"{split}:{name}", "problem": f"{path}: its name must be <tile>_<first day>_..."}
        return {
            "id": f"{split}:{name}",
            "time": start + DAYS * np.arange(FRAMES[split]) + DAYS - 1,
            "geo": {"tile": tile, "cube": name},
            "reference": {"frames": FRAMES[split], **reference},
        }


def train_or_val(count: int, split: str) -> list[int]:
    """Which of the sorted training files are of a split: a tenth, rounded down and drawn at random, is `val`.

    As published, they are what torch's `random_split` draws, but from seed 0; the original draws from whatever state
    the program is in, so that its very files are not known.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    kept = count - int(0.1 * count)
    return order[kept:] if split == "val" else order[:kept]


def cube_name(path: Path) -> str:
    """The name that a cube's files share, "29SND_2018-09-03_2019-01-30_441_569_...": no "context_" and "target_"."""
    return path.stem.removeprefix("context_").removeprefix("target_")


class EarthNet2021(_EarthNet):
    """The cubes of a split of EarthNet2021, from `train/`, `iid_test_split/context/`, `iid_test_split/target/`, ..."""

    NAME = "earthnet2021"
    FACTS = Facts(
        variable="surface reflectance: blue, green, red, near infrared",
        units="1",
        coding="0..1, NaN missing",
        time_step="5D",
        grid="128 x 128 pixels of 20 m",
        licence="CC BY-NC-SA 4.0 as far as known; see the source",
        citation="Requena-Mesa et al., EarthNet2021, CVPR Workshops 2021, https://arxiv.org/abs/2104.10066",
        splits="test sets of the publishers (iid, ood, extreme, seasonal); int(n / 10) of n sorted training files, "
        "drawn by torch's random_split, are val (Earthformer; there the seed is unknown, here it is 0)",
        source="https://www.earthnet.tech, package `earthnet`",
        feature_extractor={"fill_value": 0, "valid_range": (0, 1)},
    )

    def folder(self, split: str) -> Path:
        folder = Path(self.config.data_dir)
        return folder / "train" if split in ("train", "val") else folder / f"{split}_test_split"

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        folder = self.folder(split)
        if split in ("train", "val"):
            for path in self.listed(split, folder, ".npz"):
                yield self.row(split, path, context=str(path), target=None)
            return
        contexts = {cube_name(path): path for path in self.listed(split, folder / "context", ".npz")}
        targets = {cube_name(path): path for path in self.listed(split, folder / "target", ".npz")}
        for name in sorted(contexts.keys() | targets.keys()):
            if name in contexts and name in targets:
                yield self.row(split, contexts[name], context=str(contexts[name]), target=str(targets[name]))
            else:
                known = contexts.get(name) or targets[name]
                other = "target" if name in contexts else "context"
                yield {"id": f"{split}:{name}", "problem": f"{known} has no {other} of its name."}

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        context, target = reference["context"], reference["target"]
        return _lazy(reference["frames"], partial(_load_npz, context, target), [context, target or context])


@dataclass
class EarthNet2021xConfig(EventConfig):
    """Options of EarthNet2021x.

    Args:
        mask: "s2_dlmask", what the package `earthnet` 0.3.11 masks: where the learned cloud mask is not 0 and the
            scene class is none that may be clear; or "s2_mask", what older versions mask: where that is not 0. Which
            of them Earthformer's 0.3.9 took is not known.
    """

    mask: str = "s2_dlmask"


class EarthNet2021x(_EarthNet):
    """The cubes of a split of EarthNet2021x, from `train/`, `iid/`, ...; the weather is the same all over a cube."""

    NAME = "earthnet2021x"
    BUILDER_CONFIG_CLASS = EarthNet2021xConfig
    FACTS = EarthNet2021.FACTS

    def folder(self, split: str) -> Path:
        return Path(self.config.data_dir) / ("train" if split == "val" else split)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        if self.config.mask not in ("s2_dlmask", "s2_mask"):
            raise ValueError(f"`mask` must be 's2_dlmask' or 's2_mask', got {self.config.mask!r}.")
        for path in self.listed(split, self.folder(split), ".nc"):
            yield self.row(split, path, path=str(path), mask=self.config.mask)

    @staticmethod
    def read(reference: dict[str, Any]) -> dict[str, Any]:
        path, mask = reference["path"], reference["mask"]
        return _lazy(reference["frames"], partial(_load_nc, path, mask), [path])


# ---------------------------------------------------------------------------------------------------------------------
# Cubes
# ---------------------------------------------------------------------------------------------------------------------


def _lazy(frames: int, load: Callable, paths: list[str]) -> dict[str, Any]:
    """The arrays of a cube, which is read when one of them is sliced, and once for all three."""
    shapes = {"values": (SIZE, SIZE, 4), "observed": (SIZE, SIZE), "covariates": (SIZE, SIZE, len(COVARIATES))}

    def reader(part: int) -> Callable[[range], np.ndarray]:
        def read(numbers: range) -> np.ndarray:
            changed = tuple(os.stat(path).st_mtime_ns for path in paths)
            return load(frames, changed)[part][list(numbers)]

        return read

    return {
        name: LazyFrames((frames, *shape), bool if name == "observed" else "float32", reader(part))
        for part, (name, shape) in enumerate(shapes.items())
    }


@lru_cache(4)
def _load_npz(
    context: str, target: str | None, frames: int, changed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, observed and covariates of a cube of EarthNet2021."""
    first = load_npz(context, ["highresdynamic", "highresstatic", "mesodynamic", "mesostatic"])
    files = [(context, first["highresdynamic"], frames if target is None else frames // 3)]
    if target is not None:
        files.append((target, load_npz(target, ["highresdynamic"])["highresdynamic"], frames - frames // 3))
    images, masks = [], []
    for path, array, length in files:
        # blue, green, red, near infrared, [cloud, scene,] mask: in training files there are seven, in the others five
        shapes = [(SIZE, SIZE, channels, length) for channels in (7, 5)]
        if array.shape not in shapes:
            raise ValueError(f"{path}: `highresdynamic` must be {shapes[0]} or {shapes[1]}, got {array.shape}.")
        array = array.transpose(3, 0, 1, 2)  # (T, H, W, C)
        images.append(array[..., :4])
        masks.append(array[..., -1])
    weather, elevation, coarse = first["mesodynamic"], first["highresstatic"], first["mesostatic"]
    if weather.ndim != 4 or weather.shape[2:] != (5, DAYS * frames):
        raise ValueError(f"{context}: `mesodynamic` must be (h, w, 5, {DAYS * frames}), got {weather.shape}.")
    for name, array in (("highresstatic", elevation), ("mesostatic", coarse)):
        if array.ndim != 3 or array.shape[2] != 1:
            raise ValueError(f"{context}: `{name}` must be (h, w, 1), got {array.shape}.")
    static = [array[None, :, :, 0] for array in (elevation, coarse)]  # (1, h, w)
    drivers = [static[0], *weather.transpose(2, 3, 0, 1), static[1]]  # (days, h, w) each
    return _cube_arrays(np.concatenate(images), np.concatenate(masks), drivers)


@lru_cache(4)
def _load_nc(path: str, mask: str, frames: int, changed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, observed and covariates of a cube of EarthNet2021x."""
    names = [*BANDS, *WEATHER, "cop_dem", *(("s2_dlmask", "s2_SCL") if mask == "s2_dlmask" else ("s2_mask",))]
    with open_dataset(path) as cube:
        missing = sorted(set(names) - set(cube.data_vars))
        if missing:
            raise ValueError(f"{path} must hold {missing}, found {sorted(cube.data_vars)}.")
        if dict(cube.sizes) | {"time": DAYS * frames, "lat": SIZE, "lon": SIZE} != dict(cube.sizes):
            raise ValueError(
                f"{path} must be of time {DAYS * frames}, lat {SIZE} and lon {SIZE}, got {dict(cube.sizes)}."
            )
        images = cube[[name for name in names if name.startswith("s2_")]].isel(time=slice(DAYS - 1, None, DAYS))
        images = images.transpose("time", "lat", "lon").load()
        values = np.stack([images[band].values for band in BANDS], axis=-1)
        masked = images[mask].values
        if mask == "s2_dlmask":
            masked = (masked != 0) & ~np.isin(images["s2_SCL"].values, CLEAR)
        weather = [(cube[name].values[:, None, None] + shift) / scale for name, (shift, scale) in WEATHER.items()]
        elevation = (cube["cop_dem"].transpose("lat", "lon").values[None] + 2000) / 4000
    return _cube_arrays(values, masked, [elevation, *weather, np.nanmean(elevation, keepdims=True)])


def _cube_arrays(
    images: np.ndarray, masks: np.ndarray, drivers: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (T, H, W, 4), masks (T, H, W), 0 where clear, and drivers (days, h, w) as the arrays of an event."""
    values = images.astype("float32")
    values[~np.isfinite(values)] = np.nan
    observed = (masks == 0) & np.isfinite(values).all(-1)
    covariates = np.empty((*observed.shape, len(drivers)), "float32")
    for channel, driver in enumerate(drivers):
        covariates[..., channel] = nearest(driver, observed.shape)
    return values.clip(0, 1), observed, np.nan_to_num(covariates, copy=False)


def nearest(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array of another shape, as `torch.nn.functional.interpolate(mode="nearest")` makes it."""
    return array[np.ix_(*(np.arange(size) * old // size for size, old in zip(shape, array.shape)))]


__all__ = [
    "BANDS",
    "CLEAR",
    "EarthNet2021",
    "EarthNet2021x",
    "EarthNet2021xConfig",
    "FRAMES",
    "SIZE",
    "cube_name",
    "nearest",
    "train_or_val",
]
