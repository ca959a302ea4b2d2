"""Scores on cases with known answers, and the forecasts without a neural network."""

import numpy as np
import pytest
from tiny import DATA

from earthformer_hf import baselines
from earthformer_hf.data import open_sst, simulated
from earthformer_hf.metrics import (
    EnsembleScores,
    RainScores,
    contingency_counts,
    correlation_by_lead,
    critical_success_index,
    fair_crps,
    rmse_by_lead,
    three_month_means,
)


def test_counts_by_hand():
    target = np.array([[[10, 20], [30, 5]], [[0, 0], [0, 50]]])
    forecast = np.array([[[10, 5], [30, 20]], [[0, 0], [0, 0]]])
    observed = np.ones_like(target, bool)
    observed[0, 1, 0] = False  # a hit that nobody saw
    counts = contingency_counts(forecast, target, observed, [10, 100])
    assert counts["hits"].tolist() == [[1, 0], [0, 0]]
    assert counts["misses"].tolist() == [[1, 1], [0, 0]]
    assert counts["false_alarms"].tolist() == [[1, 0], [0, 0]]
    assert counts["correct_negatives"].tolist() == [[0, 3], [3, 4]]
    assert counts["hits"].dtype == np.int64
    csi = critical_success_index(counts["hits"], counts["misses"], counts["false_alarms"])
    assert csi[0].tolist() == [1 / 3, 0] and np.isnan(csi[1]).all()


def test_pooled_scores():
    scores = RainScores([10], value_range=10)
    ones = np.ones((1, 1, 2), bool)
    scores.update(np.array([[[10.0, 0]]]), np.array([[[10.0, 10]]]), ones)
    scores.update(np.array([[[10.0, 10]]]), np.array([[[0.0, 10]]]), ones & [[[True, False]]])
    assert scores.csi().tolist() == [1 / 3]  # one hit, one miss, one false alarm
    assert scores.mse == pytest.approx((1 + 1) / 3)
    assert (scores.pixels, scores.windows) == (3, 2)
    assert np.isnan(RainScores([10]).mse)


def test_pooled_scores_of_ensembles():
    random = np.random.default_rng(0)
    targets, ensembles = random.uniform(0, 20, (2, 3, 4, 5)), random.uniform(0, 20, (2, 6, 3, 4, 5))
    observed = random.uniform(size=targets.shape) < 0.7
    observed[:, 1] = False
    scores, means = EnsembleScores([10], value_range=10), RainScores([10], value_range=10)
    for ensemble, target, known in zip(ensembles, targets, observed):
        scores.update(ensemble, target, known)
        means.update(ensemble.mean(0), target, known)
    each = np.stack([fair_crps(ensemble, target) for ensemble, target in zip(ensembles, targets)]) / 10
    assert scores.crps == pytest.approx(each[observed].mean())
    assert scores.crps_by_lead[0] == pytest.approx(each[:, 0][observed[:, 0]].mean())
    assert np.isnan(scores.crps_by_lead[1])
    assert (scores.mean.csi_mean, scores.mean.mse) == (means.csi_mean, means.mse)


def test_correlation_and_rmse():
    random = np.random.default_rng(0)
    target = random.normal(size=(50, 3))
    forecast = target * [2, -1, 0] + [1, 0, 0]
    skill = correlation_by_lead(forecast, target)
    np.testing.assert_allclose(skill[:2], [1, -1])
    assert np.isnan(skill[2])
    np.testing.assert_allclose(rmse_by_lead(target + 2, target), [2, 2, 2])
    noisy = target + random.normal(size=target.shape)
    expected = [np.corrcoef(noisy[:, i], target[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(correlation_by_lead(noisy, target), expected)


def test_fair_crps_against_a_loop():
    random = np.random.default_rng(0)
    ensemble, target = random.gamma(1.0, 2.0, (5, 3, 4)).astype("float32"), random.gamma(1.0, 2.0, (3, 4))
    expected = np.abs(ensemble - target).mean(0)
    for i in range(5):
        for j in range(5):
            expected = expected - np.abs(ensemble[i].astype("float64") - ensemble[j]) / (2 * 5 * 4)
    np.testing.assert_allclose(fair_crps(ensemble, target), expected, rtol=1e-6)


def test_fair_crps_does_not_depend_on_the_ensembles_size():
    """Of a unit Gaussian that forecasts itself it is 1 / sqrt(pi) on average, with 2 members as with 40."""
    random = np.random.default_rng(1)
    for members in (2, 40):
        score = fair_crps(random.normal(size=(members, 40_000)), random.normal(size=40_000)).mean()
        assert abs(score - np.pi**-0.5) < 0.015
    with pytest.raises(ValueError, match="at least 2"):
        fair_crps(np.zeros((1, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="ensemble"):
        fair_crps(np.zeros((4, 3)), np.zeros(4))


def test_dressed_persistence_keeps_the_errors_and_the_sign():
    past = np.full((3, 2, 2), 0.5)
    errors = np.stack([np.full((4, 2, 2), 0.2), np.full((4, 2, 2), -0.7)])
    ensemble = baselines.dressed_persistence(past, errors)
    assert ensemble.shape == (2, 4, 2, 2) and np.allclose(ensemble[0], 0.7) and (ensemble[1] == 0).all()


def test_three_month_means():
    assert three_month_means(np.array([0.0, 3, 6, 0])).tolist() == [3, 3]


def test_extrapolation_moves_rain_with_the_flow():
    if not baselines.has_extrapolation():
        pytest.skip("extrapolation: pysteps and opencv-python-headless are not installed (extra `eval`)")
    still = simulated.rain_events(1, length=1, seed=5)[0]["values"][0]
    rain = np.stack([np.roll(still, 2 * t, axis=1) for t in range(6)])
    forecast, reachable = baselines.extrapolation(rain[:3], 3)
    inside = reachable.copy()
    inside[:, :, :16] = False
    error = np.abs(forecast - rain[3:])[inside].mean()
    stay = np.abs(baselines.persistence(rain[:3], 3) - rain[3:])[inside].mean()
    assert error < 0.4 * stay
    assert (forecast[~reachable] == 0).all()

    ensemble = baselines.steps_ensemble(rain[:3], 3, 4, minutes=4, kilometers=3, seed=0)
    assert ensemble.shape == (4, 3, 128, 128) and np.isfinite(ensemble).all() and (ensemble >= 0).all()
    spread = ensemble.std(axis=0).mean(axis=(1, 2))
    assert 0 < spread[0] < spread[2]  # members part
    assert np.abs(ensemble.mean(0) - rain[3:])[inside].mean() < stay  # and move with the flow
    again = baselines.steps_ensemble(rain[:3], 3, 4, minutes=4, kilometers=3, seed=0)
    np.testing.assert_array_equal(ensemble, again)
    dry = baselines.steps_ensemble(np.zeros((3, 32, 32)), 2, 3, minutes=4, kilometers=3, seed=0)
    assert dry.shape == (3, 2, 32, 32) and not dry.any()


@pytest.mark.skipif(not (DATA / "sst_kaplan_1856_2014.nc").exists(), reason="ocean data: set EARTHFORMER_HF_DATA")
def test_ocean_baselines_have_their_known_scores():
    path = DATA / "sst_kaplan_1856_2014.nc"
    train, test = (
        baselines.OceanRecord(open_sst.load_events(path, split)[0], open_sst.nino34, 12, 14)
        for split in ("train", "test")
    )
    lat = open_sst.load_events(path, "test")[0]["geo"]["lat"]
    targets = test.targets()
    assert targets.shape == (237, 12)
    expected = {
        "persistence": (baselines.persisted_index(test), 0.277, 0.830),
        "damped persistence": (baselines.damped_persistence(train, test), 0.405, 0.591),
        "linear inverse model": (baselines.linear_inverse_model(train, test, lat), 0.383, 0.623),
        "seasonal ridge": (baselines.seasonal_ridge(train, test, lat), 0.605, 0.541),
    }
    for name, (forecast, skill, error) in expected.items():
        assert correlation_by_lead(forecast, targets).mean() == pytest.approx(skill, abs=0.001), name
        assert rmse_by_lead(forecast, targets).mean() == pytest.approx(error, abs=0.001), name


def test_a_linear_ocean_is_forecast_by_the_linear_models():
    """Where the ocean is a noisy oscillator, models that know its phase beat persistence at long leads."""
    train, test = (
        baselines.OceanRecord(simulated.sst_events(years, seed)[0], open_sst.nino34, 12, 14)
        for years, seed in ((150, 1), (60, 2))
    )
    lat = simulated.sst_events(3)[0]["geo"]["lat"]
    targets = test.targets()
    persisted = correlation_by_lead(baselines.persisted_index(test), targets)[-1]
    for forecast in (
        baselines.linear_inverse_model(train, test, lat, number=3, lag=1),
        baselines.seasonal_ridge(train, test, lat, number=3),
    ):
        assert correlation_by_lead(forecast, targets)[-1] > persisted + 0.1


def test_linear_maps_explain_a_linear_ocean():
    (event,) = simulated.sst_events(100, seed=3)
    record = baselines.OceanRecord(event, open_sst.nino34, 12, 14)
    maps = baselines.linear_maps(record, event["geo"]["lat"], number=3, penalty=1.0)
    assert maps.shape == (len(record.last), 14, 24, 48)
    assert (np.isnan(maps) == np.isnan(event["values"][0])).all()
    skill = correlation_by_lead(three_month_means(open_sst.nino34(maps.astype("float64"))), record.targets())
    persisted = correlation_by_lead(baselines.persisted_index(record), record.targets())
    assert (skill > persisted).all() and skill[-1] > persisted[-1] + 0.1
