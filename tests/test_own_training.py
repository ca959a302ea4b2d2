"""Training on one's own data: what a recipe may choose, what a run remembers of its data, and what it refuses."""

import json
import re
import sys
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import ROOT
from training_run import Options, in_children, tiny_run, write_items

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.data import Windows, from_folder, load_dataset
from earthformer_hf.data.events import Events
from earthformer_hf.data.hosted import prepare
from earthformer_hf.data.latents import EncodedWindows
from earthformer_hf.data.tiles import Tiles, tile_corners
from earthformer_hf.training import DataArguments, LatentArguments, TrainingArguments, load_latents, load_windows
from earthformer_hf.training.distributed import join_processes


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def rain_of(number, frames=24, height=16, width=20):
    """Rain rates (T, H, W) in mm/h, a third of them dry."""
    random = np.random.default_rng(number)
    return np.where(random.random((frames, height, width)) < 0.3, 0, random.gamma(1, 4, (frames, height, width)))


def write_rain(folder, rain, names=("rain",)):
    """A NetCDF file per name of hourly rain."""
    folder.mkdir(parents=True, exist_ok=True)
    for day, name in enumerate(names):
        time = np.datetime64("2020-01-01", "s") + 3600 * (np.arange(len(rain)) + 100 * day)
        attributes = {"units": "mm/h"}
        values = xr.DataArray(rain.astype("float32"), dims=("time", "y", "x"), coords={"time": time}, attrs=attributes)
        values.to_dataset(name="rate").to_netcdf(folder / f"{name}.nc")
    return folder


EXTRACTOR = {"scale": 0.1, "fill_value": 0.0, "variable": "rain", "units": "mm/h"}


def extractor(**changes):
    return EarthformerFeatureExtractor(**(EXTRACTOR | changes))


def recipe_of(folder, size=(16, 20), **blocks):
    """A recipe of a tiny model: the entries of `blocks` change it."""
    recipe = {
        "model": {
            "context_length": 3, "prediction_length": 2, "image_size": list(size), "hidden_sizes": [8, 8],
            "stem_channels": [8], "stem_strides": [2], "stem_norm_groups": 1, "num_attention_heads": 2,
            "num_global_vectors": 0, "stem_num_convs": 1, "head_num_convs": 1,
        },
        "feature_extractor": dict(EXTRACTOR),
        "data": {"source": "folder", "data_dir": str(folder)},
        "training": {"max_steps": 2, "batch_size": 2, "eval_every": 2, "save_every": 1, "warmup_steps": 1},
    }  # fmt: skip
    return {name: entries | blocks.get(name, {}) for name, entries in recipe.items()}


def train(monkeypatch, tmp_path, recipe, *options):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.syspath_prepend(ROOT / "examples")
    arguments = ["--recipe", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "run", *options]
    monkeypatch.setattr(sys, "argv", ["train_earthformer.py", *map(str, arguments)])
    AcceleratorState._reset_state(reset_partial_state=True)
    import_module("train_earthformer").main()


def refusal(monkeypatch, tmp_path, recipe, *options) -> str:
    with pytest.raises(SystemExit) as end:
        train(monkeypatch, tmp_path, recipe, *options)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


def progress_of(tmp_path):
    return json.loads((tmp_path / "run/checkpoints/last/progress.json").read_text())


# What a checkpoint is continued with


def test_a_run_goes_on_only_with_what_it_began_with(tmp_path, monkeypatch):
    folder = write_rain(tmp_path / "one", rain_of(0, 60))
    train(monkeypatch, tmp_path, recipe_of(folder), "--stop_at", 1)
    other_values = write_rain(tmp_path / "other", rain_of(1, 60))
    changes = {
        "data.digest .*, not with .*data.eval_digest": {"data": {"data_dir": str(other_values)}},
        "feature_extractor.scale 0.1, not with 0.2": {"feature_extractor": {"scale": 0.2}},
        "model.num_global_vectors 0, not with 4": {"model": {"num_global_vectors": 4}},
        "started with intensity_weight 0.0, not with 3.0": {"training": {"intensity_weight": 3.0}},
        "data.gain 1.0, not with 1.5": {"data": {"gain": 1.5}},
        "mixed_precision no, not with bf16": {"training": {"mixed_precision": "bf16"}},
    }
    for expected, change in changes.items():
        end = refusal(monkeypatch, tmp_path, recipe_of(folder, **change))
        assert re.search(expected, end), end
        unchanged = {"learning_rate", "hidden_sizes", "fill_value", "samples_per_step"}
        assert not any(name in end for name in unchanged)  # only what differs is named
    assert progress_of(tmp_path)["step"] == 1


def test_the_same_files_elsewhere_go_on_like_an_uninterrupted_run(tmp_path, monkeypatch):
    folder = write_rain(tmp_path / "one", rain_of(0, 60))
    train(monkeypatch, tmp_path, recipe_of(folder))
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    train(monkeypatch, tmp_path, recipe_of(folder), "--stop_at", 1)
    moved = write_rain(tmp_path / "moved", rain_of(0, 60))
    train(monkeypatch, tmp_path, recipe_of(moved, training={"num_workers": 1, "save_every": 2}))
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()


def test_a_finished_run_is_extended_when_asked(tmp_path, monkeypatch):
    folder = write_rain(tmp_path / "one", rain_of(0, 60))
    train(monkeypatch, tmp_path, recipe_of(folder))
    longer = recipe_of(folder, training={"max_steps": 4})
    assert "max_steps 2, not with 4; --extend" in refusal(monkeypatch, tmp_path, longer)
    train(monkeypatch, tmp_path, longer, "--extend")
    progress = progress_of(tmp_path)
    assert progress["step"] == 4 and progress["extensions"] == [{"max_steps": 2, "step": 2}]
    assert "Planned for 2 steps, and extended at step 2." in (tmp_path / "run/README.md").read_text()
    assert "max_steps 4, not with 2" in refusal(monkeypatch, tmp_path, recipe_of(folder), "--extend")
    changed = recipe_of(folder, training={"max_steps": 6, "learning_rate": 1.0})
    assert "learning_rate 0.005, not with 1.0; max_steps" in refusal(monkeypatch, tmp_path, changed, "--extend")


def test_a_pretrained_model_goes_on_with_another_grid(tmp_path, monkeypatch):
    folder = write_rain(tmp_path / "one", rain_of(0, 60))
    train(monkeypatch, tmp_path, recipe_of(folder))
    (tmp_path / "run").rename(tmp_path / "first")
    wider = write_rain(tmp_path / "wider", rain_of(1, 60, 24, 28))
    still = {"pretrained": str(tmp_path / "first"), "learning_rate": 0.0}  # what it was adapted to
    train(monkeypatch, tmp_path, recipe_of(wider, (24, 28), training=still))
    one, adapted = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "run"))
    differing = {name for name in one if one[name].shape != adapted[name].shape}
    assert differing and all("position" in name or "bias" in name for name in differing)
    assert all(torch.equal(one[name], adapted[name]) for name in one.keys() - differing)
    narrow = recipe_of(wider, (24, 28), training=still, model={"hidden_sizes": [8, 16]})
    assert "the weights do not fit" in refusal(monkeypatch, tmp_path, narrow, "--output_dir", tmp_path / "other")


def test_the_logged_loss_is_that_of_all_processes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_items(tmp_path / "data")

    def losses(folder, ranks, batch_size):
        arguments = TrainingArguments(
            str(folder), max_steps=2, batch_size=batch_size, eval_every=2, warmup_steps=0, report_to="tensorboard",
            learning_rate=0.0,
        )  # fmt: skip
        run = partial(tiny_run, arguments, Options(str(tmp_path / "data"), dropout=0.0))
        assert in_children(run, ranks) == [""] * ranks
        record = EventAccumulator(str(folder / "tracking"))
        record.Reload()
        return [event.value for event in record.Scalars("loss")]

    assert losses(tmp_path / "two", 2, 2) == pytest.approx(losses(tmp_path / "one", 1, 4), rel=1e-5)


# What a recipe may choose


def items_of(data, size=(16, 20)):
    train_set, eval_set = load_windows(data, extractor(), (3, 2), 0, size)
    return [train_set[n] for n in range(4)], [eval_set[n] for n in range(len(eval_set))]


def assert_equal_items(one, other):
    for items, others in zip(one, other, strict=True):
        for item, expected in zip(items, others, strict=True):
            assert item.keys() == expected.keys()
            for name, tensor in item.items():
                assert torch.equal(tensor, expected[name])


def test_a_recipe_reads_cached_and_prepared_data_like_the_files(tmp_path):
    folder = write_rain(tmp_path / "files", rain_of(0, 60), ("a", "b"))
    expected = items_of(DataArguments("folder", str(folder)))
    cached = DataArguments("folder", str(folder), cache_dir=str(tmp_path / "cache"))
    assert_equal_items(items_of(cached), expected)
    assert list((tmp_path / "cache").rglob("values.npy"))
    prepare(load_dataset("folder", folder, keep_bad=True), tmp_path / "prepared")
    prepared = DataArguments(str(tmp_path / "prepared"))
    assert_equal_items(items_of(prepared), expected)
    with pytest.raises(ValueError, match="`options` are those of a source, .*prepared"):
        items_of(DataArguments(str(tmp_path / "prepared"), options={"variable": "rate"}))


def test_a_recipe_takes_a_part_of_a_split(tmp_path):
    folder = write_rain(tmp_path / "files", rain_of(0, 20), [str(n) for n in range(10)])
    whole, _ = load_windows(DataArguments("folder", str(folder)), extractor(), (3, 2), 0)
    part, eval_set = load_windows(
        DataArguments("folder", str(folder), train_split="train[:2]", eval_split="test"), extractor(), (3, 2), 0
    )
    assert len(whole.windows.events) == 8 and len(part.windows.events) == 2
    test_events = Events(from_folder(folder, split="test"))
    assert eval_set.digest == Windows(test_events.table, extractor().encode, 3, 2, stride=4).digest


def test_tiles_cover_events_and_are_read_lazily(tmp_path):
    rain = rain_of(0, 60, 40, 44)
    folder = write_rain(tmp_path / "files", rain)
    data = DataArguments("folder", str(folder), tile=[16, 20])
    train_set, eval_set = load_windows(data, extractor(), (3, 2), 0, (16, 20))
    tiles = train_set.windows.events
    corners = [(y, x) for y in (0, 16, 24) for x in (0, 20, 24)]
    assert [(tile["geo"]["row"], tile["geo"]["column"]) for tile in tiles] == corners
    for tile, (y, x) in zip(tiles, corners):
        expected = rain[:48, y : y + 16, x : x + 20].astype("float32")
        assert tile["values"].shape == expected.shape
        np.testing.assert_array_equal(tile["values"][3:9:2], expected[3:9:2])
    events = [{"id": "a", "values": rain, "observed": rain > 0}]
    last = Tiles(events, (16, 20))[-1]
    np.testing.assert_array_equal(last["observed"], last["values"] > 0)
    assert len(eval_set) > 0 and tile_corners((40, 44)) == [(0, 40, 0, 44)]
    with pytest.raises(ValueError, match="`tile` and `stride` must be at least 1 and fit 40 rows and 44 columns"):
        load_windows(DataArguments("folder", str(folder), tile=[64, 64]), extractor(), (3, 2), 0)


def test_digests_tell_values_names_and_windows_apart():
    def digest(values, name="a", **options):
        return Windows([{"id": name, "values": values}], extractor().encode, 3, 2, **options).digest

    rain = rain_of(0)
    changed = rain.copy()
    changed[0, 0, 0] += 1
    known = [digest(rain), digest(changed), digest(rain, "b"), digest(rain, stride=2), digest(rain[:20])]
    assert len(set(known)) == 5 and digest(rain.copy()) == known[0]
    for frame in range(len(rain)):  # any of them
        changed = rain.copy()
        changed[frame, 3, 4] += 1
        assert digest(changed) not in known


# What is refused, in one line


def test_mistakes_are_said_in_one_line(tmp_path, monkeypatch):
    folder = write_rain(tmp_path / "files", rain_of(0, 60))

    def end_of(change=None, recipe=None):
        return refusal(monkeypatch, tmp_path, (recipe or recipe_of(folder)) | (change or {}))

    assert "unknown block 'trainig'; did you mean 'training'?" in end_of({"trainig": {"max_steps": 3}})
    assert "must all be 32 x 32, event 'rain.nc:0' has 16 x 20; `tile`" in end_of(recipe=recipe_of(folder, (32, 32)))
    assert "`turn` needs square frames, got 16 x 20" in end_of(recipe=recipe_of(folder, data={"turn": True}))
    short = write_rain(tmp_path / "short", rain_of(0, 4))
    assert "'train' of folder: Windows: `events` must hold 5 frames" in end_of(recipe=recipe_of(short))
    mixed = write_rain(tmp_path / "mixed", rain_of(0, 60), ["a"])
    write_rain(mixed / "b", rain_of(1, 60, 8, 20), ["b"])
    assert re.search("must all be 16 x 20, event '.*' has 8 x 20", end_of(recipe=recipe_of(mixed)))
    floored = recipe_of(folder, feature_extractor={"transform": "decibel", "floor": 0.1}, data={"gain": 1.2})
    assert "`gain` needs an extractor without `transform`" in end_of(recipe=floored)
    assert "`model` of entries, it has [1]" in end_of({"model": [1]})
    assert "`name` must be one of" in end_of({"data": {}})
    lost = end_of(recipe=recipe_of(folder, training={"pretrained": "/no/where"}))
    assert lost.startswith("error: --pretrained /no/where: ")
    dry = end_of(recipe=recipe_of(folder, data={"heavy_threshold": 1e6}))
    assert "`heavy_threshold`: 1000000.0 tells no window from the others" in dry
    nowhere = end_of(recipe=recipe_of(folder, data={"source": "foldr"}))
    assert "'foldr'" in nowhere and "folder" in nowhere


def test_a_validation_split_too_small_for_the_processes_is_named(tmp_path):
    folder = write_rain(tmp_path / "files", rain_of(0, 60))
    data = DataArguments("folder", str(folder), eval_stride=10)

    def load():
        join_processes()
        load_windows(data, extractor(), (3, 2), 0)

    ends = in_children(load, 2)
    assert "'val' of folder must hold a window for each of 2 processes, got 1" in "".join(ends)


def test_files_that_cannot_be_read_stop_a_run_unless_it_goes_on_without_them(tmp_path, monkeypatch, caplog):
    folder = write_rain(tmp_path / "files", rain_of(0, 60), ("a", "b"))
    (folder / "b.nc").write_bytes((folder / "b.nc").read_bytes()[:3000])
    assert "b.nc" in refusal(monkeypatch, tmp_path, recipe_of(folder))
    import transformers

    transformers.utils.logging.enable_propagation()
    try:
        train(monkeypatch, tmp_path, recipe_of(folder, data={"options": {"keep_bad": True}}))
    finally:
        transformers.utils.logging.disable_propagation()
    assert progress_of(tmp_path)["step"] == 2
    assert any("left out b.nc" in record.message for record in caplog.records)


@pytest.mark.slow
def test_the_recipe_for_a_folder_trains_on_one_file_per_frame(tmp_path, monkeypatch):
    recipe = yaml.safe_load((ROOT / "examples/configs/earthformer_folder.yaml").read_text())
    rain, folder = rain_of(0, 100, 70, 64).astype("float32"), tmp_path / "files"
    folder.mkdir()
    jitter = np.random.default_rng(0).integers(-14, 15, len(rain))
    for n, frame in enumerate(rain):
        time = np.datetime64("2020-01-01", "s") + 300 * n + int(jitter[n])
        values = xr.DataArray(frame[None], dims=("time", "y", "x"), coords={"time": [time]}, attrs={"units": "mm/h"})
        values.to_dataset(name="rate").to_netcdf(folder / f"{n:03d}.nc")
    (folder / "010.nc").write_bytes((folder / "010.nc").read_bytes()[:2000])
    (folder / "020_again.nc").write_bytes((folder / "020.nc").read_bytes())
    recipe["model"] |= {"hidden_sizes": [8, 8], "stem_channels": [4, 8]}
    options = ("--data_dir", folder, "--max_steps", 1, "--eval_stride", 12)
    train(monkeypatch, tmp_path, recipe, *options)
    card = (tmp_path / "run/README.md").read_text()
    # frames 0..9 hold no window of 13; 11..69 hold 47, of two tiles
    assert "folder: 94 windows for training, 2 for validation." in card
    assert sorted(path.name for path in (tmp_path / "run/figures").iterdir()) == ["step_000001.png"]


# What is scaled


@pytest.mark.parametrize(
    "transform, rate, decibel",
    [("decibel", 1.0, 0.0), ("decibel", 100.0, 20.0), ("reflectivity", 1.0, 23.0103), ("reflectivity", 10.0, 39.0103)],
)
def test_transforms_are_decibels_of_rain(transform, rate, decibel):
    one = extractor(transform=transform, floor=0.1, offset=-15.0, scale=1 / 50)
    values, _ = one.encode(np.array([rate]))
    assert values[0] * 50 - 15 == pytest.approx(decibel, abs=1e-4)


@pytest.mark.parametrize("transform", ["decibel", "reflectivity"])
def test_transforms_are_undone(transform):
    one = extractor(transform=transform, floor=0.1, offset=-15.0, scale=1 / 35, valid_range=[0, 300])
    rain = np.concatenate([[0, 0.1, np.float32(0.1)], np.geomspace(0.1, 300, 200)])
    decoded = one.decode(one.encode(rain)[0])
    np.testing.assert_allclose(decoded, rain, rtol=2e-5)
    assert decoded[0] == 0
    drizzle = one.encode(np.array([0.0, 0.05, 0.0999]))[0]
    assert (drizzle == drizzle[0]).all() and (one.decode(drizzle) == 0).all()
    assert one.decode(np.array([-100.0, 100.0])).tolist() == [0, 300]
    lowest, dry = one.encode(np.array([0.1, 0.0]))[0]
    assert lowest > dry  # "no rain" is told from the lowest rain


def test_missing_rain_is_filled_before_a_transform_and_negative_rain_is_refused(tmp_path):
    one = extractor(transform="decibel", floor=0.1, fill_value=0.0)
    values, observed = one.encode(np.array([np.nan, 0.0, 2.0]))
    assert observed.tolist() == [False, True, True] and values[0] == values[1]
    with pytest.raises(
        ValueError, match=r"must not be below 0 with the transform 'decibel', the first is -1.0 at \(1,"
    ):
        one.encode(np.array([0.0, -1.0]))
    one.save_pretrained(tmp_path)
    assert EarthformerFeatureExtractor.from_pretrained(tmp_path).to_dict() == one.to_dict()
    for wrong in (
        {"transform": "log"},
        {"transform": "decibel"},
        {"floor": 0.1},
        {"transform": "decibel", "floor": 0},
    ):
        with pytest.raises(ValueError, match="`transform` must be one of|`floor` must be above 0"):
            extractor(**wrong)


# Windows without observation


def test_unobserved_windows_are_left_out_of_latents(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        1, 1, ["DownEncoderBlock2D"], ["UpDecoderBlock2D"], [8], latent_channels=2, norm_num_groups=4
    ).eval()
    rain = rain_of(0, 20, 8, 8)
    rain[5:10] = np.nan
    windows = Windows([{"id": "a", "values": rain}], extractor().encode, 3, 2, stride=5)
    expected = [n for n in range(len(windows)) if windows[n]["future_observed_mask"].any()]
    assert expected == [0, 2, 3]
    encoded = EncodedWindows(windows, vae, len(windows), tmp_path, "outage")
    assert len(encoded) == 3 and encoded.stacked("future_mean").isfinite().all()
    for row, number in enumerate(expected):
        assert torch.allclose(encoded.stacked("context_mean")[row], windows[number]["past_values"].mean((1, 2, 3)))
    means = {round(encoded[n]["future_mean"].sum().item(), 5) for n in range(3)}
    assert means == {round(total, 5) for total in encoded.stacked("future_mean").sum(1).tolist()}
    nothing = Windows([{"id": "a", "values": np.full((20, 8, 8), np.nan)}], extractor().encode, 3, 2, stride=5)
    with pytest.raises(ValueError, match="none of 4 windows has an observed context and future"):
        EncodedWindows(nothing, vae, 4, tmp_path, "nothing")


def test_a_recipe_stops_at_an_unobserved_window_when_asked(tmp_path):
    rain = rain_of(0, 60)
    rain[10:20] = np.nan
    folder = write_rain(tmp_path / "files", rain)
    train_set, _ = load_windows(DataArguments("folder", str(folder)), extractor(), (3, 2), 0)
    assert all(train_set[n]["future_observed_mask"].any() for n in range(40))
    strict, _ = load_windows(DataArguments("folder", str(folder), on_missing="stop"), extractor(), (3, 2), 0)
    with pytest.raises(ValueError, match="nothing was observed in the (context|future) of"):
        [strict[n] for n in range(60)]


def test_latents_do_not_depend_on_where_the_files_lie(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = ["DownEncoderBlock2D"], ["UpDecoderBlock2D"], [8]
    vae = AutoencoderKL(1, 1, *blocks, latent_channels=2, norm_num_groups=4).eval()
    arguments = LatentArguments(latents=str(tmp_path / "latents"), encoded_windows=4)
    digests = []
    for name, seed in (("one", 0), ("moved", 0), ("other", 1)):
        folder = write_rain(tmp_path / name, rain_of(seed, 60))
        data = DataArguments("folder", str(folder), cache_dir=str(tmp_path / f"cache-{name}"))
        digests.append(load_latents(data, arguments, extractor(), vae, (3, 2))[0].digest)
    assert digests[0] == digests[1] != digests[2]
