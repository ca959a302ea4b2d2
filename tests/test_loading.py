"""Loading, also on another grid, and saving: no weight is left random, and no folder half replaced."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import DATA, ROOT, frames, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForTimeSeriesPrediction

from earthformer_hf import Cuboid, EarthformerForPrediction, EarthformerModel, PreDiffPipeline
from earthformer_hf.cuboid import relative_position_index, relative_position_table_length
from earthformer_hf.loading_earthformer import resize_bias, resize_frames, resize_places


RADAR = ROOT / "model_cards/earthformer-radar-tiny"
ELSEWHERE = {"image_size": [26, 18], "context_length": 4, "prediction_length": 6}  # another grid than tiny_config's


def weights(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def differing(one, other) -> set[str]:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return {name for name in one if one[name].shape != other[name].shape or not torch.equal(one[name], other[name])}


# -- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [(2, 3, 4), (4, 3, 7), (1, 2, 2), (4, 1, 5)])
def test_an_offset_keeps_its_bias(new):
    """Pairs of tokens in the part that both cuboids have get the same bias from either table."""
    old, cpu = (2, 3, 4), torch.device("cpu")
    table = torch.randn(relative_position_table_length(old), 5)
    resized = resize_bias(table, old, new)
    assert resized.shape == (relative_position_table_length(new), 5)
    common = tuple(map(min, old, new))
    before = table[relative_position_index(common, common, old, cpu)]
    assert torch.equal(resized[relative_position_index(common, common, new, cpu)], before)
    if all(a <= b for a, b in zip(old, new)):
        assert torch.equal(resize_bias(resized, new, old), table)


def test_further_offsets_take_the_nearest_and_time_may_be_delayed():
    table = torch.tensor([[-1.0], [0.0], [1.0]])  # offsets -1, 0, 1 along one axis
    assert resize_bias(table, (1, 1, 2), (1, 1, 4)).flatten().tolist() == [-1, -1, -1, 0, 1, 1, 1]
    table = torch.arange(-3.0, 4)[:, None]
    assert resize_bias(table, (4, 1, 1), (4, 1, 1), delay=2).flatten().tolist() == [-1, 0, 1, 2, 3, 3, 3]


def test_the_frames_next_to_the_forecast_keep_their_embedding():
    table = torch.arange(4.0)[:, None]
    assert resize_frames(table, 6, keep_last=True).flatten().tolist() == [0, 0, 0, 1, 2, 3]
    assert resize_frames(table, 6, keep_last=False).flatten().tolist() == [0, 1, 2, 3, 3, 3]
    assert resize_frames(table, 2, keep_last=True).flatten().tolist() == [2, 3]
    assert resize_frames(table, 2, keep_last=False).flatten().tolist() == [0, 1]


def test_embeddings_of_places_are_interpolated():
    ramp = torch.arange(8.0)[:, None].repeat(1, 2)
    torch.testing.assert_close(
        resize_places(ramp, (8,), (4,)), torch.tensor([0.5, 2.5, 4.5, 6.5])[:, None].repeat(1, 2)
    )
    grid = (10 * torch.arange(4.0)[:, None] + torch.arange(6.0)).reshape(-1, 1)  # 10 * row + column
    half = (10 * torch.tensor([0.5, 2.5])[:, None] + torch.tensor([0.5, 2.5, 4.5])).reshape(-1, 1)
    torch.testing.assert_close(resize_places(grid, (4, 6), (2, 3)), half)
    assert resize_places(grid.half(), (4, 6), (5, 7)).dtype == torch.float16


# -- another grid -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_embedding_type": "t+hw", "self_attention_pattern": "divided_st"},
        {"self_attention_pattern": ["video_swin_2x4", "full"], "cross_attention_pattern": "cross_2x2_lg"},
        {"num_covariates": 2, "stem_strides": [3, 2]},  # strides that divide neither grid
        {"first_guess": "advection"},
    ],
)
def test_only_tables_of_the_grid_change(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    loaded = EarthformerForPrediction.from_pretrained(tmp_path, **ELSEWHERE)
    built = weights(EarthformerForPrediction(tiny_config(**changes | ELSEWHERE)))
    assert {name: tensor.shape for name, tensor in weights(loaded).items()} == {k: v.shape for k, v in built.items()}
    changed = differing(model, loaded)
    assert changed and all("position" in name for name in changed)
    assert {name for name, tensor in weights(model).items() if tensor.shape != built[name].shape} <= changed
    # a table that is carried over has values of the old one only; none is drawn anew
    for name in changed:
        old, new = weights(model)[name], weights(loaded)[name]
        assert old.min() <= new.min() and new.max() <= old.max(), name
    again = EarthformerForPrediction.from_pretrained(tmp_path, **ELSEWHERE)
    assert differing(loaded, again) == set()


@pytest.mark.parametrize("leads", [2, 6])
def test_what_was_fitted_for_each_lead_time_is_kept_for_more_and_for_fewer(tmp_path, leads):
    weights, said = [0.25, 0.5, 0.75, 1.0], [[0.0, 0.1 + 0.1 * lead] for lead in range(4)]
    fitted = {"correction_weights": weights, "calibration": [[0.0, 0.5], *said]}
    tiny_model(first_guess="advection", **fitted).save_pretrained(tmp_path)
    config = EarthformerForPrediction.from_pretrained(tmp_path, prediction_length=leads).config
    kept = [min(lead, 3) for lead in range(leads)]
    assert config.correction_weights == [weights[lead] for lead in kept]
    assert config.calibration == [[0.0, 0.5], *(said[lead] for lead in kept)]


def test_a_grid_of_as_many_places_in_another_shape_is_another_grid(tmp_path):
    model = tiny_model(position_embedding_type="t+hw", self_attention_pattern="divided_st")
    model.save_pretrained(tmp_path)
    turned = EarthformerForPrediction.from_pretrained(tmp_path, image_size=[28, 20])
    name = "model.encoder.position_embedding.place.weight"
    old, new = weights(model)[name], weights(turned)[name]
    assert old.shape == new.shape
    torch.testing.assert_close(new, resize_places(old, (10, 14), (14, 10)))


def test_a_larger_grid_and_back_restores_every_bias_and_frame(tmp_path):
    model = tiny_model(self_attention_pattern="divided_st")
    model.save_pretrained(tmp_path / "small")
    larger = {"image_size": [26, 30], "context_length": 5, "prediction_length": 7}
    EarthformerForPrediction.from_pretrained(tmp_path / "small", **larger).save_pretrained(tmp_path / "large")
    smaller = {name: getattr(model.config, name) for name in larger}
    back = EarthformerForPrediction.from_pretrained(tmp_path / "large", **smaller)
    changed = differing(model, back)
    assert changed and all(name.endswith(("height.weight", "width.weight")) for name in changed)


@pytest.mark.parametrize("length", [2, 6])
def test_forecast_frames_that_do_not_see_each_other_stay_the_same(tmp_path, length):
    """Without self-attention along time, the first frames of a longer or shorter forecast are exactly the same."""
    model = tiny_model(self_attention_pattern=[Cuboid((1, 4, 4), shift=(0, 2, 2))])
    model.save_pretrained(tmp_path)
    other = EarthformerForPrediction.from_pretrained(tmp_path, prediction_length=length)
    past, common = frames(model.config), min(length, model.config.prediction_length)
    expected = model(past).predictions[:, :common]
    torch.testing.assert_close(other(past).predictions[:, :common], expected, rtol=0, atol=1e-6)


def test_context_frames_keep_their_lag(tmp_path):
    """A context frame that is not attended to may as well be left out."""
    model = tiny_model(self_attention_pattern=[Cuboid((1, 4, 4))], num_global_vectors=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "cross" in name and "relative_position_bias" in name:
                lags = torch.arange(1 - 7, 7) + 3  # from a context frame to a forecast frame
                parameter[lags > 4] = -1e4  # the first context frame is 3 frames from the first forecast frame
                parameter[lags == 3] = -1e4
    model.save_pretrained(tmp_path)
    shorter = EarthformerForPrediction.from_pretrained(tmp_path, context_length=2)
    past = frames(model.config)
    expected = model(past).predictions[:, :1]
    torch.testing.assert_close(shorter(past[:, 1:]).predictions[:, :1], expected, rtol=0, atol=1e-5)


def test_one_warning_names_the_tables(tmp_path, caplog):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    EarthformerForPrediction.from_pretrained(tmp_path)
    EarthformerForPrediction.from_pretrained(tmp_path, config=tiny_config(dropout=0.5))
    assert caplog.records == []
    loaded = EarthformerForPrediction.from_pretrained(tmp_path, image_size=[20, 40])
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelname == "WARNING" and "image_size=[20, 28]" in message
    assert "model.encoder.position_embedding.width.weight (14, 16) -> (20, 16)" in message
    assert {name for name in weights(model) if f"{name} (" in message} == differing(model, loaded)
    assert "time" not in message and "height" not in message


@pytest.mark.parametrize("way", ["shards", "config", "auto", "dtype", "map", "disk", "subfolder", "hub", "headless"])
def test_every_way_of_loading_adapts_alike(tmp_path, way):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    expected = weights(EarthformerForPrediction.from_pretrained(tmp_path / "model", **ELSEWHERE))
    past = frames(tiny_config(**ELSEWHERE))
    cls, place, options = EarthformerForPrediction, tmp_path / "model", dict(ELSEWHERE)
    if way == "shards":
        place = tmp_path / "shards"
        model.save_pretrained(place, max_shard_size="40KB")
        assert len(list(place.glob("*.safetensors"))) > 1
    elif way == "config":  # as a recipe's `pretrained:`
        options = {"config": tiny_config(**ELSEWHERE)}
    elif way == "auto":
        cls = AutoModelForTimeSeriesPrediction
    elif way == "dtype":
        options["dtype"] = torch.bfloat16
        expected = {name: tensor.bfloat16() for name, tensor in expected.items()}
    elif way == "map":
        options["device_map"] = "auto"
    elif way == "disk":
        options |= {"device_map": {"model": "disk", "head": "cpu"}, "offload_folder": tmp_path / "offload"}
    elif way == "subfolder":
        place, options["subfolder"] = tmp_path, "model"
    elif way == "hub":
        cached = tmp_path / "hub/models--someone--model"
        shutil.copytree(tmp_path / "model", cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs/main").write_text("0" * 40)
        place, options["cache_dir"], options["local_files_only"] = "someone/model", tmp_path / "hub", True
    elif way == "headless":
        place = tmp_path / "headless"
        model.model.save_pretrained(place)
        base = AutoModel.from_pretrained(tmp_path / "model", **ELSEWHERE)
        assert type(base) is EarthformerModel
        assert all(torch.equal(tensor, expected[f"model.{name}"]) for name, tensor in weights(base).items())
    loaded = cls.from_pretrained(place, **options)
    assert loaded.config.image_size == ELSEWHERE["image_size"]
    if way == "disk":
        assert loaded.model.encoder.position_embedding.time.weight.is_meta
        same = EarthformerForPrediction.from_pretrained(tmp_path / "model", **ELSEWHERE)
        torch.testing.assert_close(loaded(past).predictions, same(past).predictions)
        return
    for name, tensor in weights(loaded).items():
        if way != "headless" or not name.startswith("head."):
            assert tensor.dtype == expected[name].dtype
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0.02 if way == "dtype" else 0)


def test_tables_of_another_shape_are_initialised_if_that_is_asked_for(tmp_path, caplog):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    options = ELSEWHERE | {"ignore_mismatched_sizes": True}
    loaded, info = EarthformerForPrediction.from_pretrained(tmp_path, output_loading_info=True, **options)
    name = "model.encoder.levels.0.0.attentions.1.relative_position_bias"
    assert name in {key for key, *_ in info["mismatched_keys"]} and "MISMATCH" in caplog.text
    assert weights(model)[name].std() > 0.3 and weights(loaded)[name].std() < 0.05
    assert torch.equal(loaded.head.out_proj.weight, model.head.out_proj.weight)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_sizes": [16, 64]}, "have another shape.*decoder"),
        ({"num_attention_heads": 2}, "relative_position_bias .* instead of"),
        (
            {"self_attention_pattern": [Cuboid((3, 1, 1)), Cuboid((1, 9, 1)), Cuboid((1, 1, 9))]},
            "relative_position_bias",
        ),
        ({"self_attention_pattern": "divided_st"}, "are unknown.*attentions.2"),
        ({"position_embedding_type": "t+hw"}, "are missing.*place.weight.*are unknown.*height.weight"),
        ({"num_output_channels": 2}, "head.out_proj.*instead of"),
    ],
)
def test_every_other_mismatch_is_refused(tmp_path, changes, named):
    tiny_model().save_pretrained(tmp_path)
    for grid in ({}, ELSEWHERE):
        with pytest.raises(ValueError, match=named):
            EarthformerForPrediction.from_pretrained(tmp_path, config=tiny_config(**changes | grid))


def test_a_state_dict_of_another_shape_is_refused():
    given = {"head.out_proj.weight": torch.zeros(1, 5)}
    with pytest.raises(ValueError, match=r"head.out_proj.weight \(1, 5\) instead of \(1, 4\)"):
        EarthformerForPrediction.from_pretrained(None, config=tiny_config(), state_dict=given)


def test_a_table_that_is_not_of_the_stored_grid_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.encoder.position_embedding.height.weight"
    tensors = load_file(path)
    save_file(tensors | {name: torch.zeros(5, 16)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} \(5, 16\) instead of \(13, 16\)"):
        EarthformerForPrediction.from_pretrained(tmp_path, **ELSEWHERE)


# -- by score ---------------------------------------------------------------------------------------------------------


def rain_tiles(size: int, number: int, lengths: tuple[int, int] = (13, 12)) -> tuple[torch.Tensor, torch.Tensor]:
    """Test tiles of `size` pixels in the model's range, (N, T, size, size, 1), and where there is radar coverage."""
    h5py = pytest.importorskip("h5py")
    path = DATA / "radar_open_3km.h5"
    if not path.exists():
        pytest.skip(f"no {path}")
    with h5py.File(path) as file:
        group, code_of = file["mrms_20190610"], file["vil_lut"][:]
        height, width = group["code"].shape[1:]
        corners = group["tiles_test"][:] + 64 - size // 2  # around the same centres as the tiles of 128 pixels
        inside = (corners >= 0).all(1) & (corners + size <= (height, width)).all(1)
        corners = corners[inside][np.linspace(0, inside.sum() - 1, number).astype(int)]
        raw = np.stack([group["code"][: sum(lengths), y : y + size, x : x + size] for y, x in corners])
    values = np.where(raw == 255, 0, code_of[raw]).astype("float32") / 255
    return torch.from_numpy(values)[..., None], torch.from_numpy(raw != 255)[..., None]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "size, lengths, number",
    [
        (96, (13, 12), 4),
        (160, (13, 12), 2),
        (128, (8, 12), 2),
        (128, (13, 18), 2),
        pytest.param(96, (13, 12), 40, marks=SLOW),
        pytest.param(160, (13, 12), 40, marks=SLOW),
        pytest.param(150, (10, 15), 40, marks=SLOW),  # a size that the stem does not divide
    ],
)
def test_the_radar_model_beats_persistence_on_another_grid(size, lengths, number):
    values, observed = rain_tiles(size, number, lengths)
    model = EarthformerForPrediction.from_pretrained(
        RADAR, image_size=size, context_length=lengths[0], prediction_length=lengths[1]
    )
    past, future, seen = values[:, : lengths[0]], values[:, lengths[0] :], observed[:, lengths[0] :]
    with torch.inference_mode():
        forecast = torch.cat([model(window[None]).predictions for window in past])
    persistence = past[:, -1:].expand_as(future)
    errors = [(x - future)[seen].square().mean().item() for x in (forecast, persistence)]
    assert errors[0] < 0.8 * errors[1]


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def other_disk(tmp_path):
    """A folder on another file system than `tmp_path`."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or os.stat(shared).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no other file system to write to")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_a_folder_on_another_disk_is_saved_to(tmp_path, other_disk):
    model, other = tiny_model(), tiny_model()
    link = tmp_path / "link"
    link.symlink_to(other_disk)
    for saved in (model, other):  # a first save, and one over it
        saved.save_pretrained(link)
        assert link.is_symlink() and differing(EarthformerForPrediction.from_pretrained(other_disk), saved) == set()
    assert {path.name for path in other_disk.iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_first_save_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="many"):
        tiny_model().save_pretrained(tmp_path / "new/model", max_shard_size="many")
    assert not (tmp_path / "new/model").exists()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_only_stale_shards_of_the_same_variant_are_removed(tmp_path, variant):
    model, other = tiny_model(), "fp16" if variant is None else None
    model.save_pretrained(tmp_path, variant=other, max_shard_size="40KB")
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "model.fp16.old-00001-of-00002.safetensors").write_bytes(b"of somebody else")
    model.save_pretrained(tmp_path, variant=variant, max_shard_size="40KB")
    shards = {path.name for path in tmp_path.iterdir()} - set(kept)
    assert len(shards) > 3
    model.save_pretrained(tmp_path, variant=variant)
    names = {path.name for path in tmp_path.iterdir()}
    whole = "model.safetensors" if variant is None else "model.fp16.safetensors"
    assert names == kept.keys() | {whole, "model.fp16.old-00001-of-00002.safetensors"}
    for name in kept:
        assert name == "config.json" or (tmp_path / name).read_bytes() == kept[name]
    for name in (variant, other):
        assert differing(EarthformerForPrediction.from_pretrained(tmp_path, variant=name), model) == set()
    with safe_open(tmp_path / whole, framework="pt") as file:
        assert set(file.keys()) == weights(model).keys()


@pytest.mark.parametrize("loader", [EarthformerForPrediction, EarthformerModel, PreDiffPipeline])
def test_a_mistyped_folder_is_refused_before_a_hub_is_asked(tmp_path, loader):
    tiny_model().save_pretrained(tmp_path / "rain")
    for mistyped in (tmp_path / "rian", str(tmp_path / "rian")):
        with pytest.raises(ValueError, match=f"no folder {tmp_path / 'rian'}; there are {tmp_path / 'rain'}"):
            loader.from_pretrained(mistyped)
    with pytest.raises(OSError):  # which is no folder's, but a hub's
        loader.from_pretrained("nobody/rain", local_files_only=True)
