"""Windows, the readers, and simulated weather."""

import h5py
import numpy as np
import pytest
import torch
from tiny import DATA, tiny_pipeline

from earthformer_hf import EarthformerFeatureExtractor, load_dataset
from earthformer_hf.data import open_radar, open_sst, simulated
from earthformer_hf.data.events import Events, make_builder
from earthformer_hf.data.inputs import ocean_input, rain_input, wettest_window
from earthformer_hf.data.latents import EncodedWindows
from earthformer_hf.data.windows import TrainingWindows, Windows, heavy_share, windows


encode = EarthformerFeatureExtractor(missing_value=255, fill_value=0).encode


def numbered(length, size=2):
    """An event whose every pixel is the number of its frame."""
    return {"id": str(length), "values": np.arange(length)[:, None, None] * np.ones((1, size, size))}


def test_windows_cut_past_and_future():
    windows = Windows([numbered(9), numbered(4), numbered(5)], encode, 3, 2, stride=2)
    starts = [item["past_values"][0, 0, 0, 0].item() for item in windows]
    assert starts == [0, 2, 4, 0]  # three of the first event, none of the second, one of the third
    item = windows[1]
    assert item["past_values"].shape == (3, 2, 2, 1) and item["future_values"].shape == (2, 2, 2, 1)
    assert item["past_values"][:, 0, 0, 0].tolist() == [2, 3, 4]
    assert item["future_values"][:, 0, 0, 0].tolist() == [5, 6]


def test_every_other_frame():
    windows = Windows([numbered(10)], encode, 3, 2, frame_stride=2)
    assert [windows[i]["past_values"][:, 0, 0, 0].tolist() for i in range(len(windows))] == [[0, 2, 4], [1, 3, 5]]
    assert windows[1]["future_values"][:, 0, 0, 0].tolist() == [7, 9]
    assert windows.raw(1)[:, 0, 0].tolist() == [1, 3, 5, 7, 9]
    with pytest.raises(ValueError, match="9 frames or more, the longest has 8"):
        Windows([numbered(8)], encode, 3, 2, frame_stride=2)


def test_missing_values_become_a_mask():
    event = numbered(5)
    event["values"][4, 1, 0], event["values"][0, 1, 1] = 255, 255
    item = Windows([event], encode, 3, 2)[0]
    assert item["past_observed_mask"].sum() == 11 and not item["past_observed_mask"][0, 1, 1, 0]
    assert item["future_observed_mask"].sum() == 7 and not item["future_observed_mask"][1, 1, 0, 0]
    assert item["future_values"][1, 1, 0, 0] == 0


def test_a_future_that_nobody_saw_is_refused():
    event = numbered(7)
    event["values"][4:6] = 255
    windows = Windows([event], encode, 3, 2, on_missing="stop")
    assert windows[0]["future_observed_mask"].sum() == 4
    with pytest.raises(ValueError, match="event '7', frames 4 to 5"):
        windows[1]


def test_augmentation_turns_all_frames_alike():
    random = np.random.default_rng(0)
    event = {"id": "a", "values": np.repeat(random.normal(size=(1, 3, 3)), 4, axis=0)}
    windows = TrainingWindows(Windows([event], encode, 2, 2), seed=0, turn=True)
    seen = set()
    for position in range(60):
        item = windows[position]
        frames = torch.cat([item["past_values"], item["future_values"]])
        assert (frames == frames[:1]).all()
        assert sorted(frames[0].flatten().tolist()) == sorted(event["values"][0].astype("float32").flatten().tolist())
        seen.add(tuple(frames[0].flatten().tolist()))
    assert len(seen) == 8  # four turns, flipped or not


def test_training_order_is_a_function_of_the_seed():
    windows = Windows([numbered(9)], encode, 3, 2)
    stream = TrainingWindows(windows, seed=1)
    first = [stream[position]["past_values"][0, 0, 0, 0].item() for position in range(15)]
    assert [sorted(first[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert first[:5] != first[5:10]
    again = TrainingWindows(windows, seed=1)
    assert [again[position]["past_values"][0, 0, 0, 0].item() for position in range(7, 15)] == first[7:]


def test_gain_scales_past_and_future_alike():
    windows = Windows([numbered(5)], encode, 3, 2)
    plain, factors = windows[0], []
    stream = TrainingWindows(windows, seed=2, gain=2.0, highest=6.0)
    for position in range(40):
        item = stream[position]
        factor = item["past_values"][1, 0, 0, 0].item()
        for name in ("past_values", "future_values"):
            torch.testing.assert_close(item[name], (plain[name] * factor).clamp(max=6.0))
        factors.append(factor)
    assert 0.5 <= min(factors) < 0.7 and 1.4 < max(factors) <= 2


def test_mixing_adds_two_windows_on_a_circle():
    """Of two orthogonal windows, a mixture of different ones has (cos, sin) as its coordinates."""
    first, second = np.zeros((5, 2, 2)), np.zeros((5, 2, 2))
    first[:, 0, 0], second[:, 1, 1] = 1, 1
    second[4, 0, 1] = 255
    windows = Windows([{"id": "a", "values": first}, {"id": "b", "values": second}], encode, 3, 2)
    stream, angles = TrainingWindows(windows, seed=3, mix=True), []
    for position in range(80):
        item = stream[position]
        x, y = item["past_values"][0, 0, 0, 0].item(), item["past_values"][0, 1, 1, 0].item()
        assert (item["future_values"][:, 0, 0, 0] == x).all() and (item["future_values"][:, 1, 1, 0] == y).all()
        assert item["future_observed_mask"][1, 0, 1, 0].item() == (y == 0)
        if x != 0 and y != 0:
            assert abs(x**2 + y**2 - 1) < 1e-6
            angles.append(np.arctan2(y, x))
    assert len(angles) > 20 and set(np.sign(np.cos(angles))) == set(np.sign(np.sin(angles))) == {-1, 1}


def test_heavy_windows_are_drawn_more_often():
    heavy = numbered(5, size=8)
    heavy["values"] = np.where(np.arange(5)[:, None, None] >= 3, 140.0, 0.0) * np.ones((1, 8, 8))
    heavy["values"][4, :4] = 255  # not observed: not heavy
    windows = Windows([numbered(5, size=8), heavy], encode, 3, 2)
    weights = heavy_share(windows, 133, floor=0.05)
    np.testing.assert_allclose(weights, [0.05, 0.8])
    stream = TrainingWindows(windows, seed=4, weights=weights)
    drawn = [stream[position]["future_values"].max().item() == 140 for position in range(400)]
    assert abs(np.mean(drawn) - 0.8 / 0.85) < 0.04
    np.testing.assert_allclose(heavy_share(windows, 133, "context", floor=0.05), [0.05, 0.05])
    with pytest.raises(ValueError, match="part"):
        heavy_share(windows, 133, "past")


def test_encoded_windows_are_what_the_pipeline_sees(tmp_path):
    pipeline = tiny_pipeline()
    random = np.random.default_rng(0)
    values = random.uniform(0, 200, (8, 12, 16))
    values[6, :, 4:] = 255  # partly observed
    values[7] = 255
    windows = Windows([{"id": "a", "values": values}], encode, 3, 2)
    options = {"num_windows": len(windows), "folder": tmp_path, "description": "a test", "seed": 5}
    encoded = EncodedWindows(windows, pipeline.vae, **options)
    orders = [[encoded[position]["context_mean"].tolist() for position in range(4 * n, 4 * n + 4)] for n in range(3)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders) and not orders[0] == orders[1] == orders[2]
    means = [item["past_values"].mean((1, 2, 3)).tolist() for item in windows]
    for item in (encoded[position] for position in range(4)):
        plain = windows[int(np.argmin([abs(m[0] - item["context_mean"][0].item()) for m in means]))]
        latents = pipeline._encode(plain["past_values"][None])[0]
        torch.testing.assert_close(item["context_latents"], latents, rtol=2e-3, atol=2e-3)
        observed = plain["future_observed_mask"]
        for frame, mean in enumerate(item["future_mean"]):
            known = plain["future_values"][frame][observed[frame]]
            assert mean.isnan() if len(known) == 0 else abs(mean - known.mean()) < 1e-4

    class Unreadable(torch.utils.data.Dataset):
        def __getitem__(self, item):
            raise AssertionError("encoded again")

    again = EncodedWindows(Unreadable(), pipeline.vae, **options)
    torch.testing.assert_close(again[6], encoded[6], equal_nan=True)
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.bias += 1
    with pytest.raises(AssertionError, match="encoded again"):  # other weights, other latents
        EncodedWindows(Unreadable(), pipeline.vae, **options)


def test_impossible_windows_are_refused():
    with pytest.raises(ValueError, match="5 frames or more, the longest has 4"):
        Windows([numbered(4)], encode, 3, 2)
    for wrong in ({"stride": 0}, {"stride": 1.5}, {"frame_stride": "2"}):
        with pytest.raises(ValueError, match="stride` must be a whole number of at least 1, got"):
            Windows([numbered(5)], encode, 3, 2, **wrong)
    with pytest.raises(ValueError, match="`series` must be a list of names, got 'index'"):
        Windows([numbered(5)], encode, 3, 2, series="index")
    with pytest.raises(ValueError, match="`series` of event .* hold .*, not 'index'"):
        Windows([numbered(5)], encode, 3, 2, series=["index"])[0]
    with pytest.raises(ValueError, match=r"of one split, got a dict of \['test', 'train'\]"):
        windows({"train": [numbered(5)], "test": [numbered(5)]}, encode, 3, 2)
    with pytest.raises(ValueError, match="square"):
        TrainingWindows(Windows([{"id": "a", "values": np.zeros((5, 2, 3))}], encode, 3, 2), 0, turn=True)
    with pytest.raises(ValueError, match="gain"):
        TrainingWindows(Windows([numbered(5)], encode, 3, 2), 0, gain=0.5)


@pytest.fixture
def events_of(tmp_path):
    """The events of a split of one file."""

    def read(source, path, split, **options):
        return list(Events(load_dataset(source, path.parent, split, cache_dir=tmp_path, file=path.name, **options)))

    return read


# -- open radar -------------------------------------------------------------------------------------------------------


def write_radar(path, origins):
    """A file in the layout of the open radar data: 8 x 8 tiles of one source."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        table = np.arange(256) // 2
        table[255] = 0
        file["vil_lut"] = table.astype("uint8")
        group = file.create_group("mrms_test")
        group["code"] = random.integers(0, 256, (5, 20, 20)).astype("uint8")
        group["time"] = np.array([f"2019-06-10T00:0{2 * i}:00" for i in range(5)], "S19")
        group["tiles_train"] = np.array(origins, "int32")
        group.attrs.update(tile_size=8, dt_minutes=2)


def test_radar_tiles_are_views_of_proxy_codes(tmp_path, events_of):
    write_radar(tmp_path / "r.h5", [(0, 0), (4, 6)])
    events = events_of("open-radar", tmp_path / "r.h5", "train")
    with h5py.File(tmp_path / "r.h5") as file:
        code = file["mrms_test/code"][:]
    expected = np.where(code == 255, 255, code // 2)
    assert [event["geo"]["row"] for event in events] == [0, 4]
    np.testing.assert_array_equal(events[1]["values"], expected[:, 4:12, 6:14])
    assert events[0]["values"].base is events[1]["values"].base
    assert events[0]["time"][1] - events[0]["time"][0] == np.timedelta64(2, "m")
    with pytest.raises(ValueError, match="val"):
        events_of("open-radar", tmp_path / "r.h5", "val")


def test_only_the_file_itself_is_watched(tmp_path):
    """A table is made anew when its file changes, not when another one of a user's folder does."""
    write_radar(tmp_path / "r.h5", [(0, 0)])
    first = make_builder("open-radar", tmp_path, file="r.h5").hash
    (tmp_path / "holidays.jpg").write_bytes(b"")
    assert make_builder("open-radar", tmp_path, file="r.h5").hash == first
    write_radar(tmp_path / "r.h5", [(0, 0), (4, 6)])
    assert make_builder("open-radar", tmp_path, file="r.h5").hash != first


def test_more_tiles_only_inside_the_split(tmp_path, events_of):
    square = [(0, 0), (0, 2), (2, 0), (2, 2)]
    write_radar(tmp_path / "r.h5", [*square, (8, 8)])
    events = events_of("open-radar", tmp_path / "r.h5", "train", every=1)
    origins = {(event["geo"]["row"], event["geo"]["column"]) for event in events}
    assert origins == {*square, (0, 1), (1, 0), (1, 1), (8, 8)}


def external_link(path):
    with h5py.File(path, "a") as file:
        file["mrms_other"] = h5py.ExternalLink("/etc/hostname", "/")


def external_storage(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("other", (4,), "uint8", external=[("/etc/hostname", 0, 4)])


def virtual_data(path):
    layout = h5py.VirtualLayout((4,), "uint8")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "data", (4,))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("other", layout)


def shape_bomb(path):
    with h5py.File(path, "a") as file:
        file.create_dataset("other", (2**17, 2**17), "uint8", chunks=(256, 256))


@pytest.mark.parametrize("attack", [external_link, external_storage, virtual_data, shape_bomb])
def test_crafted_files_are_refused(tmp_path, events_of, attack):
    write_radar(tmp_path / "r.h5", [(0, 0)])
    attack(tmp_path / "r.h5")
    with pytest.raises(ValueError, match="not read"):
        events_of("open-radar", tmp_path / "r.h5", "train")


def test_what_open_radar_refuses(tmp_path):
    path = tmp_path / "radar_open_3km.h5"
    write_radar(path, [(0, 0)])
    with pytest.raises(ValueError, match="`sources` must be a list of prefixes, got 'mrms'"):
        load_dataset("open-radar", tmp_path, "train", sources="mrms", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="holds no events of 'open-radar'"):
        load_dataset("open-radar", tmp_path, sources=("fmi",), cache_dir=tmp_path / "cache")
    write_radar(tmp_path / "timeless.h5", [(0, 0)])
    with h5py.File(tmp_path / "timeless.h5", "a") as file:
        del file["mrms_test/time"]
    with pytest.raises(ValueError, match="timeless.h5, 'mrms_test' must hold `code` and `time`"):
        load_dataset("open-radar", tmp_path, "train", file="timeless.h5", cache_dir=tmp_path / "cache")


def test_rain_rate_follows_marshall_palmer():
    rain = open_radar.rain_rate(np.array([0, 64, 144, 255], "uint8"))
    np.testing.assert_allclose(rain[[0, 1]], [0, (1 / 200) ** (1 / 1.6)], rtol=1e-5)
    np.testing.assert_allclose(10 * np.log10(200 * rain[2] ** 1.6), 40, rtol=1e-5)
    assert np.isnan(rain[3])
    codes = np.array([0, *range(64, 256)], "uint8")
    np.testing.assert_array_equal(open_radar.stored_code(open_radar.rain_rate(codes)), codes)


@pytest.mark.skipif(not (DATA / "radar_open_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
def test_the_windows_of_the_protocol(events_of):
    events, training = (events_of("open-radar", DATA / "radar_open_3km.h5", split) for split in ("test", "train"))
    windows = Windows(events, encode, 13, 12, stride=4)
    assert len(events) == 55 and len(windows) == 165
    train = {(event["geo"]["row"], event["geo"]["column"]) for event in training}
    assert not train & {(event["geo"]["row"], event["geo"]["column"]) for event in events}


@pytest.mark.skipif(not (DATA / "radar_open_10min_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
def test_the_windows_of_ten_and_of_five_minutes(events_of):
    storms, splits = events_of("open-radar", DATA / "radar_open_10min_3km.h5", "test"), {}
    assert {event["geo"]["source"] for event in storms} == {"mrms_storm_0006", "mrms_storm_0007"}
    assert len(Windows(storms, encode, 7, 6, stride=4)) == 90
    assert storms[0]["values"].shape == (29, 128, 128) and np.isnat(storms[0]["time"]).all()
    for name, options, minutes in (("10min", {}, 10), ("5min", {"sources": ["knmi"]}, 5)):
        for split in ("train", "val", "test"):
            events = events_of("open-radar", DATA / f"radar_open_{name}_3km.h5", split, **options)
            assert {event["geo"]["minutes"] for event in events} == {minutes}
            splits[name, split] = len(events), {event["geo"]["source"] for event in events}
    counts = [count for count, _ in splits.values()]
    assert counts == [140, 18, 18, 81, 83, 36]
    sources = [source for _, found in splits.values() for source in found]
    assert len(sources) == len(set(sources))  # no event in two splits


def rain_extractor():
    return EarthformerFeatureExtractor(**open_radar.OpenRadar.FACTS.feature_extractor, time_step="4m")


def test_a_users_rain_becomes_codes_and_its_wettest_window(tmp_path):
    rain = np.zeros((9, 4, 4), "float32")
    rain[:, 1, 2], rain[4, 0, 0] = 5.0, np.nan
    np.save(tmp_path / "mine.npy", rain)
    extractor = rain_extractor()
    label, (event,) = rain_input(tmp_path / "mine.npy", extractor)
    assert label == "input mine.npy" and (event["values"][4, 0, 0], event["values"][4, 0, 1]) == (255, 0)
    np.testing.assert_allclose(extractor.to_physical(event["values"])[:, 1, 2], 5, rtol=1e-3)
    dry = event | {"id": "dry", "values": np.zeros_like(event["values"])}
    short = event | {"id": "short", "values": event["values"][:6]}
    chosen, window, minutes = wettest_window([dry, short, event], extractor, 3, 2, (4, 4))  # every other frame
    assert chosen["id"] == "mine" and minutes.tolist() == [-8, -4, 0, 4, 8]
    expected = np.where(event["values"] == 255, np.nan, event["values"])[::2]
    np.testing.assert_array_equal(window, expected)
    _, window, _ = wettest_window([short], extractor, 3, 2, (4, 4))  # the past alone: what follows is not known
    np.testing.assert_array_equal(window[:3], expected[:3])
    assert np.isnan(window[3:]).all()
    later = event | {"id": "later", "values": event["values"][:8]}
    too_short = dry | {"values": dry["values"][:4]}
    chosen, window, _ = wettest_window([event, later, too_short], extractor, 3, 2, (4, 4), latest=True)
    assert chosen["id"] == "later" and np.isnan(window[3:]).all()
    np.testing.assert_array_equal(window[:3], np.where(later["values"] == 255, np.nan, later["values"])[[3, 5, 7]])
    with pytest.raises(ValueError, match="5 frames or more of 4 x 5 are needed, got .9, 4, 4."):
        wettest_window([event], extractor, 3, 2, (4, 5))


@pytest.mark.parametrize(
    "values, message",
    [
        (np.zeros((4, 4)), r"must hold rain rates in mm/h \(T, H, W\), got float64 \(4, 4\)"),
        (np.full((2, 2, 2), -1.0), r"holds 8 negative or infinite rates, the first at \(0, 0, 0\)"),
    ],
)
def test_what_is_no_rain_is_refused(tmp_path, values, message):
    np.save(tmp_path / "mine.npy", values)
    with pytest.raises(ValueError, match=message):
        rain_input(tmp_path / "mine.npy", rain_extractor())
    np.savez(tmp_path / "two.npz", a=values, b=values)
    with pytest.raises(ValueError, match=r"must hold one array, it holds \['a', 'b'\]"):
        rain_input(tmp_path / "two.npz", rain_extractor())
    with pytest.raises(ValueError, match="must be .npy or .npz"):
        rain_input(tmp_path / "mine.csv", rain_extractor())


# -- the ocean --------------------------------------------------------------------------------------------------------


def write_sst(path, first="1970-01", months=600, signal=np.array):
    import xarray as xr

    time = (np.datetime64(first, "M") + np.arange(months)).astype("datetime64[ns]")
    lat, lon = np.arange(-55.0, 65, 5), np.arange(0.0, 360, 5)
    values = signal(np.arange(months))[:, None, None] + 0.01 * lat[:, None] + 0.001 * lon
    xr.Dataset({"ssta": (("time", "lat", "lon"), values)}, {"time": time, "lat": lat, "lon": lon}).to_netcdf(path)


def test_sst_splits_and_crop(tmp_path, events_of):
    write_sst(tmp_path / "s.nc", signal=lambda month: month / 100)
    (event,) = events_of("open-sst", tmp_path / "s.nc", "val")
    assert event["values"].shape == (14 * 12, 24, 48)
    months = event["time"].astype("datetime64[M]")
    assert str(months[0]) == "1977-01" and str(months[-1]) == "1990-12"
    assert event["geo"]["lon"][0] == 95 and event["geo"]["lon"][-1] == 330
    # the mean over latitude -5..5, longitude 190..240
    expected = np.arange(84, 84 + 168) / 100 + 0.001 * 215
    np.testing.assert_allclose(open_sst.nino34(event["values"].astype("float64")), expected, atol=1e-4)
    with pytest.raises(ValueError, match="split"):
        events_of("open-sst", tmp_path / "s.nc", "dev")
    label, splits = ocean_input(tmp_path / "s.nc")
    assert "s.nc" in label and [*splits] == ["test"] and splits["test"][0]["values"].shape == (600, 24, 48)
    with pytest.raises(ValueError, match="lat 24, lon 72"):
        import xarray as xr

        xr.open_dataset(tmp_path / "s.nc").isel(lat=slice(1, None)).to_netcdf(tmp_path / "other.nc")
        ocean_input(tmp_path / "other.nc")
    with pytest.raises(ValueError, match="lat of"):
        xr.open_dataset(tmp_path / "s.nc").assign_coords(lat=np.arange(-56, 64, 5)).to_netcdf(tmp_path / "moved.nc")
        ocean_input(tmp_path / "moved.nc")
    write_sst(tmp_path / "late.nc", first="2015-01", months=24)
    with pytest.raises(ValueError, match="no month"):
        events_of("open-sst", tmp_path / "late.nc", "test")


# -- simulated --------------------------------------------------------------------------------------------------------


def test_simulated_rain_moves_and_is_reproducible():
    first, again = simulated.rain_events(2, seed=3), simulated.rain_events(1, seed=3)
    np.testing.assert_array_equal(first[0]["values"], again[0]["values"])
    values = first[0]["values"]
    assert values.shape == (25, 128, 128) and values.dtype == np.float32 and (values >= 0).all()
    assert 0.02 < (values > 0.1).mean() < 0.6
    near = np.corrcoef(values[0].ravel(), values[1].ravel())[0, 1]
    far = np.corrcoef(values[0].ravel(), values[20].ravel())[0, 1]
    assert near > 0.8 and far < near - 0.3


def test_simulated_ocean_swings():
    (event,) = simulated.sst_events(years=200)
    index = open_sst.nino34(event["values"])
    assert event["values"].shape == (2400, 24, 48) and 0.3 < index.std() < 2
    lagged = [np.corrcoef(index[:-lag], index[lag:])[0, 1] for lag in (1, 24)]
    assert lagged[0] > 0.8 and lagged[1] < 0
    assert np.isnan(event["values"]).all(0).sum() + np.isfinite(event["values"]).all(0).sum() == 24 * 48


def test_a_teacher_replaces_its_share_of_the_target():
    windows = Windows([numbered(9) | {"teacher": np.full((5, 2, 2, 2), 100.0)}], encode, 3, 2)
    windows.events[0]["teacher"][:, :, 0, 0] = np.nan
    item = TrainingWindows(windows, seed=1, teacher_weight=0.75)[0]
    plain = TrainingWindows(windows, seed=1)[0]
    torch.testing.assert_close(item["past_values"], plain["past_values"])
    torch.testing.assert_close(item["future_values"][:, 0, 0], plain["future_values"][:, 0, 0])
    torch.testing.assert_close(item["future_values"][:, 1], 75 + 0.25 * plain["future_values"][:, 1])


def test_simulated_land_follows_its_weather():
    table = load_dataset("simulated-land", split="val", sizes=(2, 3, 2))
    event, again = table[1], simulated.land_event(1, seed=1)
    for name in ("values", "observed", "covariates"):
        np.testing.assert_array_equal(event[name], again[name])
    item = Windows(table, lambda raw: (raw, np.isfinite(raw)), 10, 20)[1]
    assert item["past_covariates"].shape == (10, 32, 32, 7) and item["future_values"].shape == (20, 32, 32, 4)
    assert 0.4 < item["future_observed_mask"].float().mean() < 0.9
    changes, rain = [], []
    for i in range(20):
        values, driver = (simulated.land_event(i)[name].astype("float64") for name in ("values", "covariates"))
        seen = simulated.land_event(i)["observed"]
        red, infrared = (np.where(seen, values[..., band], np.nan) for band in (2, 3))
        changes.append(np.diff(np.nanmean((infrared - red) / (infrared + red), axis=(1, 2))))
        rain.append(driver[1:, 0, 0, 1])
    assert np.corrcoef(np.concatenate(changes), np.concatenate(rain))[0, 1] > 0.7
