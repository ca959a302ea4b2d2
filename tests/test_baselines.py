"""The forecasts without a neural network: known answers, and what they reach on real data."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import DATA

from earthformer_hf.data import load_dataset, open_sst, simulated
from earthformer_hf.data.open_sst import three_month_means
from earthformer_hf.evaluation import PROTOCOLS, baseline_forecaster, baselines, evaluate
from earthformer_hf.evaluation.benchmark_metrics import Nino34Skill
from earthformer_hf.evaluation.forecasters import protocol_windows


pysteps = pytest.mark.skipif(
    not baselines.is_pysteps_available(), reason="pysteps and OpenCV are not installed: the extra `optical-flow`"
)
kaplan = pytest.mark.skipif(
    not (DATA / "sst_kaplan_1856_2014.nc").exists(), reason="ocean data: set EARTHFORMER_HF_DATA"
)


def test_dressed_persistence_keeps_the_errors_and_the_sign():
    past = np.full((3, 2, 2), 0.5)
    errors = np.stack([np.full((4, 2, 2), 0.2), np.full((4, 2, 2), -0.7)])
    ensemble = baselines.dressed_persistence(past, errors)
    assert ensemble.shape == (2, 4, 2, 2) and np.allclose(ensemble[0], 0.7) and (ensemble[1] == 0).all()


def test_dressed_persistence_of_values_below_zero():
    past, errors = np.full((1, 1, 1), -20.0), np.full((2, 1, 1, 1), -8.0)
    assert (baselines.dressed_persistence(past, errors, lowest=-32) == -28).all()
    assert (baselines.dressed_persistence(past, errors, lowest=-25) == -25).all()


def test_the_last_clear_value_by_a_loop():
    random = np.random.default_rng(0)
    past, observed = random.normal(size=(5, 6, 7, 2)), random.uniform(size=(5, 6, 7, 2)) < 0.4
    observed[:, 2, 3] = False  # never clear
    forecast = baselines.last_clear_value(past, observed, 3)
    assert forecast.shape == (3, 6, 7, 2)
    for y, x, channel in np.ndindex(6, 7, 2):
        clear = np.flatnonzero(observed[:, y, x, channel])
        expected = past[clear[-1] if len(clear) else -1, y, x, channel]
        assert (forecast[:, y, x, channel] == expected).all()
    np.testing.assert_array_equal(
        baselines.last_clear_value(past, np.ones_like(observed), 3), baselines.persistence(past, 3)
    )


@pytest.fixture(scope="module")
def moving_rain():
    """Rain that moves by two pixels a frame, and where it cannot have come from outside."""
    still = simulated.rain_events(1, length=1, seed=5)[0]["values"][0]
    inside = np.ones((3, 128, 128), bool)
    inside[:, :, :16] = False
    return np.stack([np.roll(still, 2 * t, axis=1) for t in range(7)]), inside


@pysteps
def test_extrapolation_moves_rain_with_the_flow(moving_rain):
    rain, inside = moving_rain
    forecast, reachable = baselines.extrapolation(rain[:4], 3)
    inside = inside & reachable
    error = np.abs(forecast - rain[4:])[inside].mean()
    assert error < 0.4 * np.abs(baselines.persistence(rain[:4], 3) - rain[4:])[inside].mean()
    assert (forecast[~reachable] == 0).all()


def test_advection_moves_any_values_with_the_flow_by_torch_alone(moving_rain):
    rain, inside = moving_rain
    past = np.minimum(rain[:4] / 50, 1)
    forecast, reachable = baselines.advection(past, np.ones(past.shape, bool), 3)
    inside, future = inside & reachable, np.minimum(rain[4:] / 50, 1)
    error = np.abs(forecast - future)[inside].mean()
    assert error < 0.2 * np.abs(baselines.persistence(past, 3) - future)[inside].mean()
    assert not reachable[-1, :, :4].any() and (forecast[-1, :, :4] == 0).all()  # from outside
    both = np.stack([past, past[:, ::-1]], axis=-1)
    twice, _ = baselines.advection(both, np.ones(both.shape, bool), 3)
    np.testing.assert_allclose(twice[..., 0], forecast, atol=1e-6)
    np.testing.assert_allclose(twice[..., 1], forecast[:, ::-1], atol=1e-3)  # each channel by its own motion


@pytest.mark.skipif(not (DATA / "radar_open_10min_3km.h5").exists(), reason="open radar data: set EARTHFORMER_HF_DATA")
@pytest.mark.slow
def test_forecasts_of_storms_have_their_known_scores():
    """Those that the description of the data states: CSI-M and MSE of 90 windows, an hour ahead."""
    protocol = replace(PROTOCOLS["radar-open-10min"], scores=("contingency", "errors"), pools=())
    windows = protocol_windows(protocol, DATA)
    assert len(windows) == 90
    names = ("persistence", "advection", "extrapolation")[: 3 if baselines.is_pysteps_available() else 2]
    forecasters = {name: baseline_forecaster(name, protocol, lambda split: None) for name in names}
    scores = evaluate(forecasters, windows, protocol)["scores"]
    expected = {"persistence": (0.231, 16.56e-3), "advection": (0.347, 8.26e-3), "extrapolation": (0.317, 10.34e-3)}
    for name in names:
        summary = scores[name]["summary"]
        assert summary["csi_m"] == pytest.approx(expected[name][0], abs=0.001), name
        assert summary["mse"] == pytest.approx(expected[name][1], abs=0.02e-3), name


@pysteps
@pytest.mark.parametrize("method", [baselines.sprog, baselines.anvil])
def test_cascades_move_rain_with_the_flow(moving_rain, method):
    rain, inside = moving_rain
    forecast = method(rain[:4], 3)
    assert forecast.shape == (3, 128, 128) and np.isfinite(forecast).all() and (forecast >= 0).all()
    assert not np.array_equal(forecast, baselines.extrapolation(rain[:4], 3)[0])  # it ran
    error = np.abs(forecast - rain[4:])[inside].mean()
    with pytest.raises(ValueError, match="frames or more, got 2"):
        method(rain[:2], 3)
    assert error < 0.6 * np.abs(baselines.persistence(rain[:4], 3) - rain[4:])[inside].mean()


@pysteps
def test_steps_members_part_and_move_with_the_flow(moving_rain):
    rain, inside = moving_rain
    ensemble = baselines.steps_ensemble(rain[:4], 3, 4, minutes=4, kilometers=3, seed=0)
    assert ensemble.shape == (4, 3, 128, 128) and np.isfinite(ensemble).all() and (ensemble >= 0).all()
    spread = ensemble.std(axis=0).mean(axis=(1, 2))
    assert 0 < spread[0] < spread[2]
    stay = np.abs(baselines.persistence(rain[:4], 3) - rain[4:])[inside].mean()
    assert np.abs(ensemble.mean(0) - rain[4:])[inside].mean() < stay
    again = baselines.steps_ensemble(rain[:4], 3, 4, minutes=4, kilometers=3, seed=0)
    np.testing.assert_array_equal(ensemble, again)


@pysteps
@pytest.mark.parametrize("wet_pixels", [0, 1, 9])
def test_where_cascades_cannot_be_run_the_forecast_is_the_extrapolation(wet_pixels):
    rain = np.zeros((4, 32, 32))
    rain[:, 10 : 10 + wet_pixels, 12] = 1.0
    still = baselines.extrapolation(rain, 2)[0]
    assert still.sum() == pytest.approx(2 * wet_pixels)
    calls = []
    options = {"on_fallback": lambda: calls.append(None)}
    for forecast in (
        baselines.sprog(rain, 2, **options),
        baselines.anvil(rain, 2, **options),
        *baselines.steps_ensemble(rain, 2, 3, minutes=4, kilometers=3, seed=0, **options),
    ):
        np.testing.assert_array_equal(forecast, still)
    assert len(calls) == (2 if wet_pixels else 0)  # ANVIL ran, and so do all on a field without any rain


def skill_of(forecast, record) -> dict:
    """Correlation and error of forecasts of a record's index (windows, leads)."""
    metric = Nino34Skill(record.leads)
    metric.update(forecast, record.targets(), record.start_month)
    return metric.compute()


def persisted_index(record):
    """The index of the last context month at every lead, (windows, leads)."""
    return np.repeat(record.index[record.last, None], record.leads, axis=1)


@kaplan
def test_ocean_baselines_have_their_known_scores(tmp_path):
    splits = load_dataset("open-sst", DATA, cache_dir=tmp_path)
    train, validation, test = (
        baselines.OceanRecord(splits[split][0], open_sst.nino34, 12, 14) for split in ("train", "val", "test")
    )
    lat = np.array(splits["test"][0]["geo"]["lat"])
    assert test.targets().shape == (237, 12)
    expected = {
        "persistence": (persisted_index(test), 0.277, 0.830),
        "damped persistence": (baselines.damped_persistence(train, test), 0.405, 0.591),
        "linear inverse model": (
            baselines.linear_inverse_model(train, test, lat, num_components=20, lag=3),
            0.383,
            0.623,
        ),
        "seasonal ridge": (
            baselines.seasonal_ridge(train, test, lat, num_components=12, lag=3, penalty=10),
            0.605,
            0.541,
        ),
    }
    for name, (forecast, skill, error) in expected.items():
        assert skill_of(forecast, test)["c_nino34_m"] == pytest.approx(skill, abs=0.001), name
        assert skill_of(forecast, test)["rmse"] == pytest.approx(error, abs=0.001), name

    grid = {
        "num_components": (20, 30),
        "lag": (3, 6),
    }  # chosen on the validation years, a larger map is better on both
    chosen = baselines.best_setting(baselines.linear_inverse_model, train, validation, lat, grid)
    assert chosen == {"num_components": 30, "lag": 6}
    forecast = baselines.linear_inverse_model(train, test, lat, **chosen)
    assert skill_of(forecast, test)["c_nino34_m"] == pytest.approx(0.483, abs=0.001)


def test_a_linear_ocean_is_forecast_by_the_linear_models():
    """Where the ocean is a noisy oscillator, models that know its phase beat persistence at long leads."""
    train, test = (
        baselines.OceanRecord(simulated.sst_events(years, seed)[0], open_sst.nino34, 12, 14)
        for years, seed in ((150, 1), (60, 2))
    )
    lat = simulated.sst_events(3)[0]["geo"]["lat"]
    persisted = skill_of(persisted_index(test), test)["correlation_by_lead"][-1]
    for forecast in (
        baselines.linear_inverse_model(train, test, lat, num_components=3, lag=1),
        baselines.seasonal_ridge(train, test, lat, num_components=3, lag=3, penalty=10),
    ):
        assert skill_of(forecast, test)["correlation_by_lead"][-1] > persisted + 0.1


def test_a_setting_is_chosen_by_its_error_on_the_validation_record():
    """The simulated ocean has two modes: with one component less, or a penalty that stifles, forecasts are worse."""
    train, validation = (
        baselines.OceanRecord(simulated.sst_events(years, seed)[0], open_sst.nino34, 12, 14)
        for years, seed in ((150, 1), (60, 2))
    )
    lat = simulated.sst_events(3)[0]["geo"]["lat"]
    grid = {"num_components": (1, 2), "lag": (3,), "penalty": (1.0, 1e9)}
    chosen = baselines.best_setting(baselines.seasonal_ridge, train, validation, lat, grid)
    assert chosen == {"num_components": 2, "lag": 3, "penalty": 1.0}


def test_linear_maps_explain_a_linear_ocean():
    (event,) = simulated.sst_events(100, seed=3)
    record = baselines.OceanRecord(event, open_sst.nino34, 12, 14)
    maps = baselines.linear_maps(record, event["geo"]["lat"], num_components=3, penalty=1.0)
    assert maps.shape == (len(record.last), 14, 24, 48)
    assert (np.isnan(maps) == np.isnan(event["values"][0])).all()
    forecast = three_month_means(open_sst.nino34(maps.astype("float64")))
    skill, persisted = (
        skill_of(index, record)["correlation_by_lead"] for index in (forecast, persisted_index(record))
    )
    assert (skill > persisted).all() and skill[-1] > persisted[-1] + 0.1
