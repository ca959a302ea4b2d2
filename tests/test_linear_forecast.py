"""The linear forecast beside the network: what it computes, what it learns, and how it is told the season."""

import copy
import importlib
import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from tiny import DATA, ROOT, inputs_of, tiny_config, tiny_model

from earthformer_hf import EarthformerConfig, EarthformerFeatureExtractor, EarthformerForPrediction
from earthformer_hf.data import Windows
from earthformer_hf.evaluation import evaluate, model_forecaster, protocol_windows
from earthformer_hf.evaluation.forecasters import window_at
from earthformer_hf.evaluation.protocols import PROTOCOLS
from earthformer_hf.forecasting import forecast
from earthformer_hf.linear_forecast import LinearForecast
from earthformer_hf.loading_earthformer import resize_patterns
from earthformer_hf.sharing.cards import usage
from earthformer_hf.training.linear import fit_patterns, fit_weights


LINEAR = {"linear_components": 3, "linear_lags": 2, "num_time_features": 2}
SEASONAL = {"time_step": "1M", "units": "degC", "variable": "anomaly", "fill_value": 0}


def linear_model(**changes):
    """Of random weights, those of the linear forecast too."""
    model = tiny_model(**(LINEAR | changes))
    with torch.no_grad():
        model.linear_forecast.weight.normal_(0, 0.5)
    return model


def test_it_is_a_sum_over_frames_patterns_and_season():
    linear = linear_model(num_channels=2).linear_forecast
    inputs = inputs_of(tiny_config(**LINEAR, num_channels=2))
    past, calendar = inputs["past_values"], inputs["past_time_features"]
    found = linear(past, calendar)
    assert found.shape == (2, 4, 20, 28, 2)
    weight = linear.weight.reshape(4, 3, 3, 2, 3)  # (T_out, K, season, lags, K)
    for sample, lead in itertools.product(range(2), range(4)):
        expected = torch.zeros(20, 28, 2)
        for to, lag, of in itertools.product(range(3), range(2), range(3)):
            strength = (past[sample, 2 - lag] * linear.patterns[..., of]).sum()
            season = weight[lead, to, 0, lag, of] + (weight[lead, to, 1:, lag, of] * calendar[sample, -1]).sum()
            expected += season * strength * linear.patterns[..., to]
        torch.testing.assert_close(found[sample, lead], expected, rtol=1e-4, atol=1e-4)


def test_a_model_adds_it_and_starts_without(tmp_path):
    model = linear_model()
    inputs = inputs_of(model.config)
    untrained = EarthformerForPrediction(model.config).eval()
    assert not untrained.linear_forecast(inputs["past_values"], inputs["past_time_features"]).any()
    assert untrained.linear_forecast.patterns.any()  # or it could not learn
    with torch.no_grad():
        network = copy.deepcopy(model)
        network.linear_forecast.weight.zero_()
        added = model.linear_forecast(inputs["past_values"], inputs["past_time_features"])
        torch.testing.assert_close(model(**inputs).predictions, network(**inputs).predictions + added)
        model.save_pretrained(tmp_path)
        loaded = EarthformerForPrediction.from_pretrained(tmp_path)
        assert torch.equal(loaded(**inputs).predictions, model(**inputs).predictions)


def test_it_finds_the_map_that_made_the_data():
    """A rotation of two patterns whose speed follows the season."""
    random = torch.Generator().manual_seed(0)
    config = tiny_config(linear_components=2, linear_lags=1, num_time_features=2, context_length=1)
    patterns = torch.linalg.qr(torch.randn(560, 2, generator=random))[0]
    strengths = torch.randn(400, 2, generator=random) * torch.tensor([3.0, 1.0])
    angle = 2 * torch.pi * torch.rand(400, generator=random)
    season = torch.stack([angle.sin(), angle.cos()], -1)
    maps = torch.tensor([[[0.9, -0.4], [0.4, 0.9]], [[0.3, 0.0], [0.1, 0.0]], [[0.0, 0.2], [0.0, -0.2]]])
    seasonal = maps[0] + torch.einsum("ns,sij->nij", season, maps[1:])
    future = torch.einsum("nij,nj->ni", seasonal, strengths)

    def frames(amplitudes):  # (N, K) -> (N, 1, H, W, 1)
        return (amplitudes @ patterns.T).reshape(-1, 1, 20, 28, 1)

    linear = LinearForecast(config)
    past, following = frames(strengths), frames(future).repeat(1, 4, 1, 1, 1)
    fit_patterns(linear, past[:, -1])
    fit_weights(linear, past, following, season[:, None], penalty=1e-9, season_penalty=1e-9)
    torch.testing.assert_close(linear(past, season[:, None]), following, rtol=1e-3, atol=1e-3)
    fit_weights(linear, past, following, season[:, None], penalty=1e-9, season_penalty=1e9)  # of no season
    blind = LinearForecast(tiny_config(linear_components=2, linear_lags=1, context_length=1))
    fit_patterns(blind, past[:, -1])
    fit_weights(blind, past, following, penalty=1e-9)
    torch.testing.assert_close(linear(past, season[:, None]), blind(past), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="`frames` must be at least as many as the 2 patterns, got 1"):
        fit_patterns(linear, past[:1, -1])


@pytest.mark.parametrize("leads", [2, 6])
def test_another_number_of_lead_times_keeps_the_first(tmp_path, leads):
    model = linear_model()
    model.save_pretrained(tmp_path)
    loaded = EarthformerForPrediction.from_pretrained(tmp_path, prediction_length=leads)
    expected = model.linear_forecast.weight[[min(lead, 3) for lead in range(leads)]]
    torch.testing.assert_close(loaded.linear_forecast.weight, expected)
    assert torch.equal(loaded.linear_forecast.patterns, model.linear_forecast.patterns)


def test_on_a_finer_grid_it_forecasts_the_finer_map(tmp_path):
    model = linear_model()
    rows, columns = torch.arange(20.0)[:, None, None, None] / 20, torch.arange(28.0)[:, None, None] / 28
    with torch.no_grad():
        model.linear_forecast.patterns.copy_(torch.cat([rows + 0 * columns, columns + 0 * rows, rows * columns], -1))
    model.save_pretrained(tmp_path)
    loaded = EarthformerForPrediction.from_pretrained(tmp_path, image_size=(40, 56))
    inputs = inputs_of(model.config)
    fine = inputs["past_values"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        coarse = model.linear_forecast(inputs["past_values"], inputs["past_time_features"])
        found = loaded.linear_forecast(fine, inputs["past_time_features"])
    means = found.unflatten(2, (20, 2)).unflatten(4, (28, 2)).mean((3, 5))
    assert (means - coarse).abs().max() < 0.03 * coarse.abs().max()
    table = model.linear_forecast.patterns
    torch.testing.assert_close(resize_patterns(table, (20, 28)), table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"linear_components": -1}, "`linear_components` must be at least 0, got -1"),
        ({"linear_components": 2, "linear_lags": 4}, "`linear_lags` must be 1 to context_length=3, got 4"),
        ({"linear_lags": 0}, "`linear_lags` must be 1 to context_length=3, got 0"),
        ({"num_time_features": 2}, "`num_time_features` must be 0 without linear_components, got 2"),
        (
            {"linear_components": 2, "num_output_channels": 2},
            "`num_output_channels` must be num_channels=1 with a linear forecast, got 2",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_time_features_are_asked_for_and_checked():
    seasonal, plain = linear_model(), tiny_model()
    inputs = inputs_of(seasonal.config)
    past, features = inputs["past_values"], inputs["past_time_features"]
    with pytest.raises(ValueError, match="`past_time_features` is missing: this model has num_time_features=2"):
        seasonal(past)
    with pytest.raises(ValueError, match="`past_time_features` must be omitted: this model has num_time_features=0"):
        plain(**inputs)
    for wrong in (features[:, :2], features[:1], features.long()):
        with pytest.raises(ValueError, match=r"`past_time_features` must be floating point of shape .*\(2, 3, 2\)"):
            seasonal(past, past_time_features=wrong)


def test_a_card_says_that_the_model_takes_them():
    folder = json.dumps("folder")
    assert "model(past_values=past_values, past_time_features=past_time_features)" in usage(linear_model(), folder)
    assert "past_time_features" not in usage(tiny_model(), folder)


# -- the season -------------------------------------------------------------------------------------------------------


def months(first: str, count: int) -> np.ndarray:
    return (np.datetime64(first, "M") + np.arange(count)).astype("datetime64[ns]")


def test_the_calendar_month_is_an_angle():
    extractor = EarthformerFeatureExtractor(time_features="month_of_year")
    features = extractor.time_features_of(months("1969-10", 15))
    np.testing.assert_allclose(features[3], [0, 1], atol=1e-6)  # January 1970
    np.testing.assert_allclose(features[6], [1, 0], atol=1e-6)  # April
    np.testing.assert_allclose(features[0], features[12], atol=1e-6)
    np.testing.assert_allclose(np.square(features).sum(-1), 1, rtol=1e-6)
    raw = np.zeros((2, 3, 4, 5))
    one = extractor(raw, time=months("2000-05", 3))["past_time_features"]
    each = extractor(raw, time=np.stack([months("2000-05", 3), months("2001-05", 3)]))["past_time_features"]
    assert one.shape == (2, 3, 2) and torch.equal(one, each)
    assert "past_time_features" not in EarthformerFeatureExtractor()(raw, time=months("2000-05", 3))


def test_dates_that_are_none_are_refused():
    extractor = EarthformerFeatureExtractor(time_features="month_of_year")
    raw = np.zeros((3, 4, 5))
    with pytest.raises(ValueError, match=r"`time` must be the dates of the frames, of shape \(3,\) .* got none"):
        extractor(raw)
    with pytest.raises(ValueError, match=r"of shape \(3,\) or \(1, 3\)"):
        extractor(raw, time=months("2000-05", 4))
    for wrong in ([1, 2, 3], np.array(["2000-01", "NaT", "2000-03"], "datetime64[M]")):
        with pytest.raises(ValueError, match="`time` must be dates, datetime64 without gaps"):
            extractor(raw, time=wrong)
    with pytest.raises(ValueError, match="`time_features` is not set"):
        EarthformerFeatureExtractor().time_features_of(months("2000-05", 3))
    with pytest.raises(ValueError, match=r"`time_features` must be one of \['month_of_year'\], got 'hour'"):
        EarthformerFeatureExtractor(time_features="hour")


def test_a_forecast_and_an_evaluation_tell_the_model_the_season():
    """Beyond the prediction length too: each hop is of other months."""
    model = linear_model(image_size=(8, 8), stem_strides=[1, 1])
    extractor = EarthformerFeatureExtractor(**SEASONAL, time_features="month_of_year")
    random = np.random.default_rng(0)
    values, time = random.normal(size=(20, 8, 8)).astype("float32"), months("2001-02", 20)
    windows = Windows([{"id": "sea", "values": values, "time": time}], extractor.encode, 3, 4)

    def expected(past, dates):
        with torch.no_grad():
            return extractor.decode(model(**extractor(past, time=dates)).predictions[0, ..., 0])

    found = model_forecaster(model, extractor)(window_at(windows, 5, extractor))
    np.testing.assert_allclose(found, expected(values[5:8], time[5:8]), rtol=1e-5, atol=1e-5)

    options = {"units": "degC", "variable": "anomaly", "time_step": "1M", "feature_extractor": extractor}
    told = forecast(model, values[:3], start="2001-02-01", lead="6M", **options)
    first = expected(values[:3], time[:3])
    second = expected(np.concatenate([values[2:3], first])[-3:], time[4:7])
    name = next(name for name in told.data_vars if told[name].ndim >= 3 and name != "quality_flag")
    found = np.squeeze(told[name].values)
    np.testing.assert_allclose(found, np.concatenate([first, second])[:6], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the model looks at the season, and needs dates"):
        forecast(model, values[:3], **options)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "sst_kaplan_1856_2014.nc").exists(), reason="ocean data: set EARTHFORMER_HF_DATA")
def test_the_script_saves_the_model_that_it_scored(tmp_path, monkeypatch, capsys):
    """Beside a network of random weights, the linear forecast gets nearly all."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module("fit_linear_forecast")
    for name, values in (
        ("COMPONENTS", (12,)),
        ("LAGS", (3,)),
        ("PENALTIES", (10.0,)),
        ("SEASON_PENALTIES", (300.0,)),
    ):
        monkeypatch.setattr(script, name, values)
    recipe = ROOT / "examples/configs/earthformer_sst_small.yaml"
    options = yaml.safe_load(recipe.read_text())["model"] | {"hidden_sizes": [16], "stem_channels": [16]}
    options |= {"encoder_depths": [1], "decoder_depths": [1]}
    network = EarthformerForPrediction(EarthformerConfig(**options)).eval()
    with torch.no_grad():
        network.head.out_proj.weight.mul_(0.1)
    network.save_pretrained(tmp_path / "network")
    words = ["--recipe", recipe, "--pretrained", tmp_path / "network", "--output_dir", tmp_path / "both"]
    monkeypatch.setattr(sys, "argv", ["fit_linear_forecast.py", *map(str, words)])
    script.main()
    line = capsys.readouterr().out.split("share of the network, error: ")[1]
    errors = {float(error): int(share) for share, error in re.findall(r"(\d+)% (0\.\d+)", line)}
    error = min(errors)
    assert errors[error] <= 20

    model = EarthformerForPrediction.from_pretrained(tmp_path / "both").eval()
    extractor = EarthformerFeatureExtractor.from_pretrained(tmp_path / "both")
    protocol = PROTOCOLS[extractor.protocol]
    windows = protocol_windows(protocol, DATA, "val")
    results = evaluate({"both": model_forecaster(model, extractor)}, windows, protocol)
    squares = np.square(results["scores"]["both"]["nino34"]["rmse_by_lead"])
    assert squares.mean() * extractor.scale**2 == pytest.approx(error, abs=2e-6)
