"""Raw values to the model's range and back, and what is refused."""

import json

import numpy as np
import pytest
import torch
from tiny import DATA, ROOT, tiny_config
from transformers import AutoFeatureExtractor

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.data import load_dataset
from earthformer_hf.data.windows import Windows


def rain_extractor(**changes):
    options = {
        "scale": 1 / 255,
        "variable": "proxy",
        "units": "1",
        "time_step": "2m",
        "grid_spacing": "3 km",
        "missing_value": 255,
        "fill_value": 0,
        "valid_range": [0, 254],
        "thresholds": [16, 74],
        "physical_units": "mm/h",
        "physical_table": [[0, 10, 20], [0, 1, 5]],
    }
    return EarthformerFeatureExtractor(**(options | changes))


def test_decode_undoes_encode():
    extractor = EarthformerFeatureExtractor(offset=-33.44, scale=1 / 47.54)
    raw = np.linspace(-20, 30, 24).reshape(2, 3, 4)
    values, observed = extractor.encode(raw)
    assert values.dtype == np.float32 and observed.all()
    np.testing.assert_allclose(values, (raw + 33.44) / 47.54, rtol=1e-6)
    np.testing.assert_allclose(extractor.decode(values), raw, atol=1e-5)
    np.testing.assert_allclose(extractor.decode(torch.from_numpy(values)), raw, atol=1e-5)


def test_codes_survive_the_round_trip_exactly():
    extractor = rain_extractor()
    codes = np.arange(255, dtype="uint8").reshape(1, 15, 17)
    assert (np.round(extractor.decode(extractor.encode(codes)[0])) == codes).all()
    assert extractor.decode(np.array([-0.2, 1.3])).tolist() == [0, 254]


def test_missing_values_are_masked_and_filled():
    extractor = rain_extractor(fill_value=3)
    raw = np.array([[[7.0, 255.0, np.nan]]])
    values, observed = extractor.encode(raw)
    assert observed.tolist() == [[[True, False, False]]]
    np.testing.assert_allclose(values[0, 0], np.array([7, 3, 3]) / 255, rtol=1e-6)


def test_missing_values_are_refused_by_position_and_count():
    raw = np.zeros((2, 3, 4))
    raw[1, 2, 3] = raw[0, 1, 2] = np.nan
    with pytest.raises(ValueError, match=r"2 missing or non-finite values of 24.*\(0, 1, 2\).*fill_value"):
        EarthformerFeatureExtractor().encode(raw)
    with pytest.raises(ValueError, match="255"):
        rain_extractor(fill_value=None)(np.full((1, 2, 2), 255, "uint8"))
    raw[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="never filled"):
        rain_extractor().encode(raw)


def test_ranks_and_batches():
    extractor = rain_extractor()
    frames = np.arange(24).reshape(2, 3, 4)
    expected = torch.from_numpy(frames.astype("float32") / 255)
    for raw in (
        frames,
        frames[None],
        frames[None, ..., None],
        [frames],
        [frames[..., None]],
        torch.from_numpy(frames),
    ):
        past_values = extractor(raw)["past_values"]
        assert past_values.shape == (1, 2, 3, 4, 1) and past_values.dtype == torch.float32
        torch.testing.assert_close(past_values[0, ..., 0], expected)
    assert extractor([frames, frames])["past_values"].shape == (2, 2, 3, 4, 1)
    for wrong in (frames[0], np.zeros((0, 2, 3, 4)), [], np.zeros((1,) * 6)):
        with pytest.raises(ValueError, match="raw"):
            extractor(wrong)
    with pytest.raises(ValueError, match="dtype"):
        extractor.encode(np.array(["rain"]))


def test_physical_values_by_table():
    extractor = rain_extractor()
    np.testing.assert_allclose(extractor.to_physical(np.array([0, 5, 10, 15, 99])), [0, 0.5, 1, 3, 5])
    assert np.isnan(extractor.to_physical(np.array([np.nan])))[0]
    codes = np.linspace(0, 20, 41)
    np.testing.assert_allclose(extractor.from_physical(extractor.to_physical(codes)), codes, atol=1e-5)
    with pytest.raises(ValueError, match="physical_table"):
        EarthformerFeatureExtractor().to_physical(codes)


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, -0.1])
def test_impossible_rates_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"`physical` holds 1 negative or infinite values of 3.*{wrong} at \(1,\)"):
        rain_extractor().from_physical(np.array([0.5, wrong, np.nan]))
    celsius = EarthformerFeatureExtractor(physical_table=[[0, 10], [-5, 5]])
    assert celsius.from_physical([-1.0]) == [4]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"scale": 0}, "scale"),
        ({"mising_value": 255}, "mising_value.*missing_value"),
        ({"valid_range": [254, 0]}, "valid_range"),
        ({"offset": float("nan")}, "offset"),
        ({"fill_value": float("inf")}, "fill_value"),
        ({"physical_table": [[0, 1], [1, 0]]}, "physical_table"),
        ({"physical_table": [[0, 1]]}, "physical_table"),
    ],
)
def test_impossible_settings_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        rain_extractor(**changes)


def test_save_and_load(tmp_path):
    extractor = rain_extractor()
    extractor.save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is EarthformerFeatureExtractor
    assert loaded.to_dict() == extractor.to_dict()


@pytest.mark.parametrize("loader", [EarthformerFeatureExtractor, AutoFeatureExtractor])
def test_arguments_given_on_loading(tmp_path, loader, caplog):
    EarthformerFeatureExtractor(scale=2.0).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del stored["valid_range"]  # as of a version that did not know it
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored | {"rotary": 1, "auto_map": {}}))
    loaded = loader.from_pretrained(tmp_path, valid_range=[0, 1], device_map="cpu")
    assert loaded.scale == 2.0 and loaded.valid_range == [0, 1]
    assert "rotary" in caplog.text and "'device_map' has no effect" in caplog.text and "auto_map" not in caplog.text
    with pytest.raises(ValueError, match="'sacle'; did you mean 'scale'"):
        loader.from_pretrained(tmp_path, sacle=2.0)
    with pytest.raises(ValueError, match="scale"):
        loader.from_pretrained(tmp_path, scale=0)


# -- what was not observed --------------------------------------------------------------------------------------------


def masked_rain(dtype="float32") -> np.ma.MaskedArray:
    """What netCDF4 returns: fill values below the mask. (2, 2, 3), two values masked."""
    raw = np.ma.masked_equal(np.array([[[1, 2, -99], [4, 5, 6]], [[7, 8, 9], [-99, 11, 12]]], dtype), -99)
    assert raw.mask.sum() == 2
    return raw


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int32"])
def test_a_mask_hides_what_is_below_it(dtype):
    raw, expected = masked_rain(dtype), ~masked_rain().mask
    extractor = EarthformerFeatureExtractor(scale=0.5, fill_value=3)
    values, observed = extractor.encode(raw)
    assert type(observed) is np.ndarray and (observed == expected).all()
    assert (extractor.observed(raw) == expected).all()
    assert (values == np.where(expected, raw.data, 3) * 0.5).all()
    with pytest.raises(ValueError, match=r"2 missing or non-finite values of 12.*nan at \(0, 0, 2\).*fill_value"):
        EarthformerFeatureExtractor().encode(raw)
    with pytest.raises(ValueError, match="2 missing"):
        EarthformerFeatureExtractor()(raw)


def test_every_container_keeps_what_is_missing():
    raw, extractor = masked_rain(), EarthformerFeatureExtractor(fill_value=3)
    holed = raw.filled(np.nan)
    expected = np.where(np.isnan(holed), 3, holed)[None, ..., None]
    arrays = [raw, [raw], [[raw[0], raw[1]]], holed, torch.from_numpy(holed), [torch.from_numpy(holed).bfloat16()]]
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    arrays += [xarray.DataArray(raw), [xarray.DataArray(holed)]]
    for given in arrays:
        assert (extractor(given, return_tensors="np")["past_values"] == expected).all()
        assert extractor.observed(given).sum() == 10
    with pytest.raises(ValueError, match="`raw`.*one shape"):
        extractor([raw, raw[:1]])


def test_values_that_do_not_exist_were_not_observed():
    extractor = rain_extractor(fill_value=3)
    raw = np.array([[[-9999.0, 254, 254.5, 0, -0.5]]])
    values, observed = extractor.encode(raw)
    assert observed.tolist() == [[[False, True, False, True, False]]]
    np.testing.assert_allclose(values[0, 0], np.array([3, 254, 3, 0, 3]) / 255, rtol=1e-6)
    with pytest.raises(ValueError, match=r"3 missing .*outside `valid_range` \[0, 254\].*-9999.0 at \(0, 0, 0\)"):
        rain_extractor(fill_value=None).encode(raw)
    # what decode returns is valid, also where the bounds are no float32
    extractor = EarthformerFeatureExtractor(valid_range=[0.1, 0.7])
    assert extractor.observed(extractor.decode(np.array([-1.0, 2.0])).astype("float64")).all()


def test_values_that_do_not_exist_are_told(caplog):
    extractor = rain_extractor(valid_range=[0, 253], fill_value=3)
    extractor(np.array([[[0, 253, 255, np.nan]]]))
    assert "valid_range" not in caplog.text
    past_values = extractor(np.array([[[0, 253, 254]]]))["past_values"]
    np.testing.assert_allclose(past_values[0, 0, 0, :, 0], np.array([0, 253, 3]) / 255, rtol=1e-6)
    assert "outside `valid_range` [0, 253], which count as missing" in caplog.text


def test_codes_above_the_scale_are_refused():
    raw = np.array([[[0, 300, 255, np.nan, 25_500]]])
    for call in (rain_extractor().encode, rain_extractor()):
        with pytest.raises(ValueError, match=r"`raw` must not be above 255.* 2 such values of 5, the highest is 2"):
            call(raw)
    # of other codings, what does not exist is missing
    below = rain_extractor(missing_value=-1, physical_table=None)
    for extractor in (below, EarthformerFeatureExtractor(valid_range=[0, 1], fill_value=0)):
        assert extractor.encode(np.array([0.5, 300.0]))[1].tolist() == [True, False]


@pytest.mark.skipif(not (DATA / "radar_open_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
def test_rates_in_place_of_codes_are_told_by_their_range():
    extractor = EarthformerFeatureExtractor.from_pretrained(ROOT / "model_cards/earthformer-radar-tiny")
    told, storms = 0, load_dataset("open-radar", DATA, "test")
    for storm in storms:
        codes = np.asarray(storm["values"])[:13]
        means = np.ma.masked_equal(codes, 255).reshape(13, 64, 2, 64, 2).mean((2, 4))
        rates = extractor.to_physical(codes)
        for given in (codes, means, extractor.from_physical(rates)):
            assert extractor(given)["past_values"].isfinite().all()
        try:
            extractor(rates)
        except ValueError as reason:
            assert "`raw` looks like mm/h" in str(reason) and "`from_physical`" in str(reason)
            told += 1
    assert told > 0.7 * len(storms)


def test_missing_stays_missing_through_physical_units():
    extractor = rain_extractor()
    rain = np.ma.masked_equal(np.array([0.5, -9999.0, 1.0]), -9999.0)
    assert extractor.from_physical(rain).tolist() == [5, 255, 10]
    assert extractor.from_physical(np.array([0.5, np.nan, 1.0])).tolist() == [5, 255, 10]
    codes = rain_extractor(missing_value=None).from_physical([rain])
    np.testing.assert_array_equal(codes, [[5, np.nan, 10]])
    for codes in (np.array([5.0, 255, 10]), np.ma.masked_equal([5, 0, 10], 0), np.array([5, -9999, 10])):
        np.testing.assert_array_equal(extractor.to_physical(codes), np.float32([0.5, np.nan, 1]))


def test_windows_honour_a_mask():
    raw = np.ma.masked_less(np.arange(60.0).reshape(5, 3, 4), 2)
    windows = Windows([{"id": "a", "values": raw}], EarthformerFeatureExtractor(fill_value=7).encode, 2, 3)
    assert windows[0]["past_values"][0, 0, :, 0].tolist() == [7, 7, 2, 3]
    raw = np.ma.masked_greater(raw, 57)
    windows = Windows([{"id": "a", "values": raw}], EarthformerFeatureExtractor(fill_value=7).encode, 2, 3)
    assert windows[0]["future_observed_mask"].sum() == 36 - 2
