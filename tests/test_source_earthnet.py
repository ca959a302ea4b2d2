"""EarthNet2021 and EarthNet2021x."""

import numpy as np
import pytest
import torch

from earthformer_hf.data import earthnet, load_dataset, windows
from earthformer_hf.data.hosted import prepare
from earthformer_hf.feature_extraction_earthformer import EarthformerFeatureExtractor


encode = EarthformerFeatureExtractor(**earthnet.EarthNet2021.FACTS.feature_extractor).encode
TILE = "29SND_2018-09-{day:02d}_2019-01-30_441_569_2745_2873_6_86_42_122"


def images(seed, channels, frames):
    """Reflectances that tell cube, channel and frame; the last channel is a mask, 0 or 1."""
    random = np.random.default_rng(seed)
    cube = random.uniform(0, 1, (128, 128, channels, frames)).astype("float16")
    cube[..., -1, :] = random.integers(0, 2, (128, 128, frames))
    return cube


def weather(seed, days):
    random = np.random.default_rng(seed)
    return {
        "highresstatic": random.uniform(size=(128, 128, 1)).astype("float16"),
        "mesodynamic": random.uniform(size=(80, 80, 5, days)).astype("float16"),
        "mesostatic": random.uniform(size=(80, 80, 1)).astype("float16"),
    }


def write(path, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def train_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earthnet")
    for day in range(1, 3):
        cube = images(day, 7, 30)
        if day == 1:
            cube[3, 4, 0, 5] = np.nan  # one band of a pixel
            cube[3, 5, :4, 5], cube[3, 5, 6, 5] = np.nan, 0  # a pixel that the mask calls clear
            cube[3, 6, 6, 5] = np.nan  # a mask that is missing
            cube[3, 7, 2, 5], cube[3, 8, 2, 5], cube[3, 9, 2, 5] = np.inf, 1.5, -0.5
            cube[3, 7:10, 6, 5] = 0
        write(folder / "train/29SND" / (TILE.format(day=day) + ".npz"), highresdynamic=cube, **weather(day, 150))
    return folder


def cubes(name, folder, cache, split, **options):
    return list(load_dataset(name, folder, split, streaming=True, cache_dir=cache, **options))


def test_a_training_cube(train_folder, tmp_path):
    events = {event["id"]: event for event in cubes("earthnet2021", train_folder, tmp_path, "train")}
    event = events["train:" + TILE.format(day=2)]
    cube, drivers = images(2, 7, 30), weather(2, 150)
    assert event["values"].shape == (30, 128, 128, 4) and event["geo"]["tile"] == "29SND"
    assert event["time"][0] == np.datetime64("2018-09-06") and event["time"][1] == np.datetime64("2018-09-11")
    np.testing.assert_array_equal(event["values"][:], cube[:, :, :4].transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(event["observed"][:], cube[:, :, 6].transpose(2, 0, 1) == 0)
    np.testing.assert_array_equal(event["values"][4:9:2], event["values"][:][4:9:2])
    # the covariates, by the original's own call
    expected = [
        torch.from_numpy(drivers["highresstatic"].astype("float32").transpose(2, 0, 1))[:, None],
        torch.from_numpy(drivers["mesodynamic"].astype("float32").transpose(2, 3, 0, 1)),
        torch.from_numpy(drivers["mesostatic"].astype("float32").transpose(2, 0, 1))[:, None],
    ]
    stretched = [torch.nn.functional.interpolate(part[None], (30, 128, 128), mode="nearest")[0] for part in expected]
    expected = torch.cat(stretched).permute(1, 2, 3, 0)  # (30, 128, 128, 7)
    np.testing.assert_array_equal(event["covariates"][:], expected)
    item = windows([event], encode, 10, 20)[0]
    assert item["future_covariates"].shape == (20, 128, 128, 7) and item["past_values"].shape == (10, 128, 128, 4)
    assert torch.equal(
        item["future_observed_mask"][..., 0], torch.from_numpy(cube[:, :, 6, 10:] == 0).permute(2, 0, 1)
    )


def test_what_is_missing_is_masked(train_folder, tmp_path):
    events = {event["id"]: event for event in cubes("earthnet2021", train_folder, tmp_path, "train")}
    event = events["train:" + TILE.format(day=1)]
    values, observed = event["values"][5], event["observed"][5]
    assert np.isnan(values[3, 4]).tolist() == [True, False, False, False] and not observed[3, 4]
    assert np.isnan(values[3, 5]).all() and not observed[3, 5]
    assert np.isfinite(values[3, 6]).all() and not observed[3, 6]
    assert np.isnan(values[3, 7, 2]) and not observed[3, 7]
    assert values[3, 8, 2] == 1 and values[3, 9, 2] == 0 and observed[3, 8] and observed[3, 9]
    item = windows([event], encode, 5, 20)[0]
    assert not item["future_observed_mask"][0, 3, 4:8].any() and not item["future_values"].isnan().any()


def test_a_tenth_of_the_training_files_is_held_out():
    """int(0.1 n), by random_split of torch 2.13 with seed 0."""
    train, val = (earthnet.train_or_val(35, split) for split in ("train", "val"))
    assert len(val) == 3 and sorted(train + val) == list(range(35))
    assert earthnet.train_or_val(9, "val") == []
    assert [len(earthnet.train_or_val(23_904, split)) for split in ("train", "val")] == [21_514, 2_390]
    drawn = torch.utils.data.random_split(range(35), [32, 3], torch.Generator().manual_seed(0))
    assert [train, val] == [list(part) for part in drawn]


def test_test_cubes_are_paired_by_name(tmp_path):
    """Their sorted places differ: one context lies in another folder."""
    folder = tmp_path / "iid_test_split"
    for number, tiles in enumerate((("29SND", "29SND"), ("31ABC", "30XYZ"), ("30ABC", "30ABC"))):
        name = TILE.format(day=number + 1)
        context, target = images(number, 5, 10), images(number + 10, 5, 20)
        write(folder / "context" / tiles[0] / f"context_{name}.npz", highresdynamic=context, **weather(number, 150))
        write(folder / "target" / tiles[1] / f"target_{name}.npz", highresdynamic=target)
    events = cubes("earthnet2021", tmp_path, tmp_path / "cache", "iid")
    assert [event["id"] for event in events] == [f"iid:{TILE.format(day=day)}" for day in (1, 2, 3)]
    for number, event in enumerate(events):
        cube = np.concatenate([images(number, 5, 10), images(number + 10, 5, 20)], axis=-1)
        np.testing.assert_array_equal(event["values"][:], cube[:, :, :4].transpose(3, 0, 1, 2))
        np.testing.assert_array_equal(event["observed"][:], cube[:, :, 4].transpose(2, 0, 1) == 0)
    (folder / "target/30ABC" / f"target_{TILE.format(day=3)}.npz").unlink()
    with pytest.raises(ValueError, match=r"context_29SND_2018-09-03.* has no target"):
        cubes("earthnet2021", tmp_path, tmp_path / "cache", "iid")
    rows = load_dataset("earthnet2021", tmp_path, "iid", cache_dir=tmp_path / "cache", keep_bad=True).with_format(None)
    assert [bool(problem) for problem in rows["problem"]] == [False, False, True]


def test_a_longer_track(tmp_path):
    folder, name = tmp_path / "extreme_test_split", TILE.format(day=1)
    write(folder / f"context/t/context_{name}.npz", highresdynamic=images(0, 5, 20), **weather(0, 300))
    write(folder / f"target/t/target_{name}.npz", highresdynamic=images(1, 5, 40))
    (event,) = cubes("earthnet2021", tmp_path, tmp_path / "cache", "extreme")
    assert event["values"][:].shape == (60, 128, 128, 4) and event["covariates"][59:].shape == (1, 128, 128, 7)
    with pytest.raises(ValueError, match="iid"):
        load_dataset("earthnet2021", tmp_path, "iid", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"highresdynamic": np.zeros((128, 128, 6, 30))}, r"`highresdynamic` must be .*got \(128, 128, 6, 30\)"),
        ({"highresdynamic": np.zeros((128, 128, 7, 29))}, r"`highresdynamic` must be .*got \(128, 128, 7, 29\)"),
        ({"mesodynamic": np.zeros((80, 80, 5, 30))}, r"`mesodynamic` must be .*got \(80, 80, 5, 30\)"),
        ({"mesostatic": np.zeros((80, 80))}, r"`mesostatic` must be \(h, w, 1\)"),
    ],
)
def test_bad_cubes_are_refused(tmp_path, arrays, message):
    path = tmp_path / "train" / (TILE.format(day=1) + ".npz")
    write(path, **{"highresdynamic": np.zeros((128, 128, 7, 30))} | weather(0, 150) | arrays)
    (event,) = cubes("earthnet2021", tmp_path, tmp_path / "cache", "train")
    with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
        event["values"][:]


def test_a_cube_that_nobody_saw(tmp_path):
    cube = np.zeros((128, 128, 7, 30), "float32")
    cube[:, :, 6] = 1
    path = tmp_path / "train" / (TILE.format(day=1) + ".npz")
    write(path, highresdynamic=cube, **weather(0, 150))
    table = load_dataset("earthnet2021", tmp_path, "train", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=f"nothing was observed in the context of event .*{path.name}"):
        windows(table, encode, 10, 20, on_missing="stop")[0]
    (problem,) = prepare({"train": table}, tmp_path / "hosted")
    assert path.name in problem and "none of its values was observed" in problem


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold folders such as .*train"):
        cubes("earthnet2021", tmp_path, tmp_path / "cache", "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="holds no .npz file"):
        cubes("earthnet2021", tmp_path, tmp_path / "cache", "train")
    write(tmp_path / "train" / "cube.npz", x=np.zeros(1))
    with pytest.raises(ValueError, match="cube.npz: its name must be"):
        cubes("earthnet2021", tmp_path, tmp_path / "cache", "train")


# -- EarthNet2021x ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cube_x(tmp_path_factory):
    import xarray as xr

    folder, random = tmp_path_factory.mktemp("earthnet2021x"), np.random.default_rng(0)
    grid = ("time", "lat", "lon")
    days = np.datetime64("2018-09-01", "ns") + np.arange(150) * np.timedelta64(1, "D")
    variables = {}
    for name in earthnet.BANDS:
        variables[name] = np.full((150, 128, 128), np.nan, "float32")
        variables[name][4::5] = random.uniform(0, 1, (30, 128, 128))
    for name, values in {"s2_mask": [0, 1, 2, 4], "s2_dlmask": [0, 1, 2], "s2_SCL": range(12)}.items():
        variables[name] = random.choice(np.array(values, "float32"), (150, 128, 128))
    variables["s2_mask"][9, 0, 0] = variables["s2_dlmask"][9, 0, 0] = np.nan
    variables["s2_SCL"][9, 0, 0] = np.nan
    variables = {name: (grid, values) for name, values in variables.items()}
    for name, (low, high) in {"rr": (0, 40), "pp": (950, 1050), "tg": (0, 20), "tn": (0, 9), "tx": (10, 30)}.items():
        variables[f"eobs_{name}"] = ("time", random.uniform(low, high, 150))
    variables["cop_dem"] = (("lat", "lon"), random.uniform(0, 900, (128, 128)))
    variables["cop_dem"][1][0, 0] = np.nan
    dataset = xr.Dataset(variables, {"time": days, "lat": np.linspace(45, 44, 128), "lon": np.linspace(3, 4, 128)})
    (folder / "iid/29SND").mkdir(parents=True)
    dataset.to_netcdf(folder / "iid/29SND" / (TILE.format(day=1) + ".nc"))
    return folder, dataset


@pytest.mark.parametrize("mask", ["s2_mask", "s2_dlmask"])
def test_a_cube_of_2021x(cube_x, tmp_path, mask):
    folder, dataset = cube_x
    (event,) = cubes("earthnet2021x", folder, tmp_path, "iid", mask=mask)
    np.testing.assert_array_equal(event["time"], dataset.time.values[4::5].astype("datetime64[s]"))
    for channel, band in enumerate(earthnet.BANDS):
        np.testing.assert_array_equal(event["values"][:][..., channel], dataset[band].values[4::5])
    covariates = event["covariates"][:]
    days = dataset.isel(time=slice(0, None, 5))
    expected = [days.eobs_rr / 50, (days.eobs_pp - 900) / 200] + [
        (days[f"eobs_{name}"] + 50) / 100 for name in ("tg", "tn", "tx")
    ]
    for channel, series in enumerate(expected, start=1):
        assert (covariates[..., channel] == covariates[:, :1, :1, channel]).all()
        np.testing.assert_allclose(covariates[:, 0, 0, channel], series, rtol=1e-6)
    elevation = (dataset.cop_dem.values + 2000) / 4000
    np.testing.assert_allclose(covariates[7, ..., 0], np.nan_to_num(elevation), rtol=1e-6)
    np.testing.assert_allclose(covariates[..., 6], np.nanmean(elevation), rtol=1e-6)
    # the package's rules, pixel by pixel
    images = dataset.isel(time=slice(4, None, 5))
    for place in [(1, 0, 0), *map(tuple, np.random.default_rng(1).integers(0, (30, 128, 128), (400, 3)))]:
        pixel = images.isel(time=place[0], lat=place[1], lon=place[2])
        clear = float(pixel[mask]) == 0 or (mask == "s2_dlmask" and float(pixel.s2_SCL) in earthnet.CLEAR)
        assert event["observed"][place[0]][place[1:]] == clear
    assert not event["observed"][1][0, 0]


def test_bad_cubes_of_2021x_are_refused(cube_x, tmp_path):
    folder, dataset = cube_x
    with pytest.raises(ValueError, match="`mask` must be"):
        cubes("earthnet2021x", folder, tmp_path, "iid", mask="clouds")
    for change, message in [
        (dataset.drop_vars(["s2_B03", "eobs_tx"]), r"must hold \['eobs_tx', 's2_B03'\]"),
        (dataset.isel(time=slice(0, 100)), "must be of time 150, lat 128"),
    ]:
        (tmp_path / "ood").mkdir(exist_ok=True)
        path = tmp_path / "ood" / (TILE.format(day=len(message) % 30 + 1) + ".nc")
        change.to_netcdf(path)
        (event,) = cubes("earthnet2021x", tmp_path, tmp_path / "cache", "ood")
        with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
            event["values"][0]
        path.unlink()
