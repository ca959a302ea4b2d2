"""Scores: known answers, naive loops, other libraries, the originals' recorded outputs, one process or two."""

import doctest
import json
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import safe_open
from tiny import GOLDENS

from earthformer_hf.data.open_sst import nino34, three_month_means
from earthformer_hf.evaluation import benchmark_metrics, metrics
from earthformer_hf.evaluation.benchmark_metrics import (
    EarthNetScore,
    FrechetVideoDistance,
    Nino34Skill,
    earth_movers_distance,
    earthnet_parts,
    nino34_weights,
)
from earthformer_hf.evaluation.metrics import (
    ContingencyScores,
    EnsembleScores,
    ErrorScores,
    FractionsSkillScore,
    PowerSpectrum,
    ProbabilityScores,
    RankHistogram,
    StructuralSimilarity,
    contingency_scores,
    ensemble_crps,
    radial_power,
)


goldens = pytest.mark.skipif(
    not GOLDENS.exists(), reason="the recorded outputs are not here: set EARTHFORMER_HF_GOLDENS"
)

# name -> how to make the metric of forecasts (B, 3, 24, 24), and whether it takes 5 members
FORECAST_METRICS = {
    "contingency": (partial(ContingencyScores, [2, 5, 9], 3), False),
    "pooled": (partial(ContingencyScores, [2, 5, 9], 3, pool=5), False),
    "errors": (partial(ErrorScores, 3, value_range=10), False),
    "ssim": (partial(StructuralSimilarity, 3, value_range=10), False),
    "fss": (partial(FractionsSkillScore, [2, 5], [1, 5], 3), False),
    "spectrum": (partial(PowerSpectrum, (24, 24), 3), False),
    "ensemble": (partial(EnsembleScores, 3, value_range=10), True),
    "ranks": (partial(RankHistogram, 5, 3, wet_threshold=1), True),
    "probability": (partial(ProbabilityScores, [2, 5], 5, 3, wet_threshold=1), True),
}


def rain(*shape, seed=0):
    """Rain-like values: half of them 0, in steps of a half, so that there are ties."""
    random = np.random.default_rng(seed)
    return np.floor(random.gamma(1.0, 3.0, shape)) / 2 * (random.uniform(size=shape) < 0.5)


def forecasts(members: bool, windows: int = 4):
    """Predictions, targets and a mask: a hole in one frame, single pixels in another."""
    targets = rain(windows, 3, 24, 24)
    predictions = rain(windows, 5, 3, 24, 24, seed=1) if members else rain(windows, 3, 24, 24, seed=1)
    observed = np.ones(targets.shape, bool)
    observed[0, 0, 5:12, 3:9] = False
    observed[1, 2] = np.random.default_rng(2).uniform(size=(24, 24)) < 0.8
    return predictions, targets, observed


def equal(one: dict, other: dict, rtol: float = 1e-12):
    assert one.keys() == other.keys()
    for name in one:
        exact = np.asarray(one[name]).dtype.kind == "i"
        np.testing.assert_allclose(one[name], other[name], rtol=0 if exact else rtol, err_msg=name)


@pytest.mark.parametrize("module", [metrics, benchmark_metrics], ids=lambda module: module.__name__.split(".")[-1])
def test_every_public_metric_has_an_example_that_runs(module):
    examples = {test.name.removeprefix(f"{module.__name__}."): test for test in doctest.DocTestFinder().find(module)}
    for name in module.__all__:
        assert examples[name].examples, name
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# What holds for every metric of forecasts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORECAST_METRICS)
def test_any_grouping_of_windows_gives_the_same(name):
    make, members = FORECAST_METRICS[name]
    predictions, targets, observed = forecasts(members)
    whole, single, first = make(), make(), make()
    whole.update(*(torch.from_numpy(x) for x in (predictions, targets, observed)))
    for window in zip(predictions, targets, observed):
        single.update(*window)
    equal(whole.compute(), single.compute())
    first.update(predictions[3:], targets[3:], observed[3:])
    last = make()
    last.update(predictions[:3], targets[:3], observed[:3])
    first.merge_state(last)
    equal(whole.compute(), first.compute())
    json.dumps({key: np.asarray(value).tolist() for key, value in whole.compute().items()})


@pytest.mark.parametrize("name", FORECAST_METRICS)
def test_missing_pixels_enter_nothing(name):
    make, members = FORECAST_METRICS[name]
    predictions, targets, observed = forecasts(members)
    known, unknown = make(), make()
    known.update(predictions, targets, observed)
    predictions, targets = predictions.copy(), targets.copy()
    predictions[np.broadcast_to(~observed[:, None], predictions.shape) if members else ~observed] = 1e6
    targets[~observed] = np.nan
    unknown.update(predictions, targets, observed)
    equal(known.compute(), unknown.compute())


@pytest.mark.parametrize("name", FORECAST_METRICS)
def test_without_observations_scores_are_undefined(name):
    make, members = FORECAST_METRICS[name]
    predictions, targets, observed = forecasts(members)
    metric = make()
    metric.update(predictions, targets, np.zeros_like(observed))
    for key, value in metric.compute().items():
        value = np.asarray(value)
        if key in ("thresholds", "probability", "widths", "windows", "wavenumber"):
            continue
        counts = value.dtype.kind == "i" or key.startswith("ranks")  # which ties share
        assert (value == 0).all() if counts else np.isnan(value).all(), key


@pytest.mark.parametrize("name", FORECAST_METRICS)
def test_bad_input_is_refused(name):
    make, members = FORECAST_METRICS[name]
    predictions, targets, observed = forecasts(members)
    with pytest.raises(ValueError, match="`targets` must be .* T = 3"):
        make().update(predictions, targets[:, :2], observed[:, :2])
    with pytest.raises(ValueError, match="`predictions` must be"):
        make().update(predictions[..., 1:], targets, observed)
    with pytest.raises(ValueError, match="`observed` must be bool"):
        make().update(predictions, targets, observed.astype("uint8"))
    targets[2, 1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="`targets` must be finite"):
        make().update(predictions, targets, observed)


# ---------------------------------------------------------------------------------------------------------------------
# One forecast
# ---------------------------------------------------------------------------------------------------------------------


def test_counts_by_hand():
    target = np.array([[[10, 20], [30, 5]], [[0, 0], [0, 50]]])
    forecast = np.array([[[10, 5], [30, 20]], [[0, 0], [0, 0]]])
    observed = np.ones_like(target, bool)
    observed[0, 1, 0] = False  # a hit that nobody saw
    scores = ContingencyScores([10, 100], prediction_length=2)
    scores.update(forecast, target, observed)
    result = scores.compute()
    assert result["hits"].tolist() == [[1, 0], [0, 0]]
    assert result["misses"].tolist() == [[1, 1], [0, 0]]
    assert result["false_alarms"].tolist() == [[1, 0], [0, 0]]
    assert result["correct_negatives"].tolist() == [[0, 3], [3, 4]]
    assert result["hits"].dtype == np.int64
    assert result["csi"].tolist()[0] == 1 / 4 and np.isnan(result["csi"][1])  # pooled
    assert result["csi_by_lead"][0].tolist() == [1 / 3, 0] and np.isnan(result["csi_by_lead"][1]).all()
    with pytest.raises(ValueError, match="ascending"):
        ContingencyScores([10, 10], 2)
    with pytest.raises(ValueError, match="pool"):
        ContingencyScores([10], 2, pool=0)


def test_pooling_by_a_loop():
    predictions, targets, observed = forecasts(members=False)
    scores = ContingencyScores([5], prediction_length=3, pool=5)  # 24 = 4 * 5 + 4 left over
    scores.update(predictions, targets, observed)
    counts = np.zeros((2, 2), int)
    for window, lead, y, x in np.ndindex(4, 3, 4, 4):
        block = (window, lead, slice(5 * y, 5 * y + 5), slice(5 * x, 5 * x + 5))
        if observed[block].any():
            counts[
                int(predictions[block][observed[block]].max() >= 5), int(targets[block][observed[block]].max() >= 5)
            ] += 1
    names = ("correct_negatives", "misses", "false_alarms", "hits")
    assert [scores.compute()[name].sum() for name in names] == counts.flatten().tolist()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_on_a_threshold_are_hits_with_pooling_as_without(dtype):
    values = np.full((1, 4, 4), 0.7, dtype)  # in float32 it is a little less than in float64
    for pool in (1, 2):
        metric = ContingencyScores([0.7], prediction_length=1, pool=pool)
        metric.update(values, values)
        assert metric.compute()["hits"].tolist() == [[16 // pool**2]], pool
    codes = np.array([[[16, 3], [0, 255]]], "uint8")
    metric = ContingencyScores([16, 255], prediction_length=1, pool=2)
    metric.update(codes, codes)
    assert metric.compute()["hits"].tolist() == [[1], [1]]


def test_contingency_scores_as_the_library_scores_has_them():
    from scores.categorical import BinaryContingencyManager

    predictions, targets, observed = forecasts(members=False)
    metric = ContingencyScores([2], prediction_length=3)
    metric.update(predictions, targets, observed)
    said, happened = (xr.DataArray(np.where(observed, x >= 2, np.nan)) for x in (predictions, targets))
    reference, result = BinaryContingencyManager(said, happened), metric.compute()
    names = {
        "csi": "critical_success_index",
        "pod": "probability_of_detection",
        "far": "false_alarm_ratio",
        "success_ratio": "success_ratio",
        "frequency_bias": "frequency_bias",
        "hss": "heidke_skill_score",
    }
    for name, theirs in names.items():
        assert result[name][0] == pytest.approx(float(getattr(reference, theirs)())), name


def test_heidke_skill_of_counts_beyond_integers():
    counts = np.array([10**10, 10**10, 10**10, 10**10])  # as of all of SEVIR: products leave int64
    assert contingency_scores(*counts)["hss"] == 0
    assert contingency_scores(10**10, 0, 0, 10**10)["hss"] == 1


def recorded(case):
    with safe_open(GOLDENS / f"{case}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])


@goldens
@pytest.mark.parametrize(
    "case", ["mode0", "mode1", "mode1_v2", "mode2", "nan", "fewpixels", "pool4", "zerodenom"]
)  # `exact` holds the rounding of x / (1 / 255), done right here
def test_recorded_scores_of_sevir(case):
    data, config = recorded(f"metric_sevir_{case}")
    length = config["seq_len"]
    scores = ContingencyScores(config["threshold_list"], length, pool=4 if "pool4" in config["preprocess_type"] else 1)
    for number in range(sum(name.startswith("input/pred") for name in data)):
        predictions, targets = (255 * data[f"input/{kind}{number}"][..., 0].double() for kind in ("pred", "target"))
        scores.update(predictions, targets, ~(predictions.isnan() | targets.isnan()))
    result, mode = scores.compute(), config["mode"]
    counts = {"hits": "hits", "misses": "misses", "false_alarms": "fas"}
    a, c, b = (result[name].sum(1) if mode == "0" else result[name] for name in counts)
    for values, theirs in zip((a, c, b), counts.values()):
        assert values.tolist() == data[f"output/{theirs}"].tolist()
    eps = config["eps"]  # theirs: in every denominator, so that 0 / 0 is 0
    expected = {"csi": a / (a + b + c + eps), "pod": a / (a + c + eps), "sucr": a / (a + b + eps)}
    for name, values in expected.items():
        np.testing.assert_allclose(values.mean(1) if mode == "2" else values, data[f"output/{name}"], rtol=1e-6)
        mean = values.mean(0)
        np.testing.assert_allclose(mean.mean() if mode == "2" else mean, data[f"output/{name}_avg"], rtol=1e-6)


@goldens
def test_recorded_rescaling_of_sevir_keeps_codes_and_thresholds():
    """`x * (1 / 255)` and back by 255: every code reaches itself as a threshold again."""
    data, _ = recorded("sevir_rescale")
    code, scaled = data["input/raw_NHWT"].permute(0, 3, 1, 2), data["output/forward_01"][..., 0]
    np.testing.assert_allclose(code * (1 / 255), scaled, rtol=1e-7)
    np.testing.assert_allclose((code - 33.44) / 47.54, data["output/forward_sevir"][..., 0], rtol=1e-5)
    np.testing.assert_array_equal((255 * scaled.double()).round(), code)


def test_errors_by_hand():
    scores = ErrorScores(prediction_length=1, value_range=10)
    scores.update(np.array([[[10.0, 0]]]), np.array([[[10.0, 10]]]))
    scores.update(np.array([[[10.0, 10]]]), np.array([[[0.0, 10]]]), np.array([[[True, False]]]))
    result = scores.compute()
    assert result["mse"] == result["mae"] == pytest.approx(2 / 3)
    assert result["pixels"].tolist() == [3] and result["windows"] == 2
    scores.update(np.array([[[5.0, 10]]]), np.array([[[10.0, 10]]]))
    assert scores.compute()["mse"] == pytest.approx(2.25 / 5) and scores.compute()["mae"] == pytest.approx(0.5)


def test_similarity_as_scikit_image_has_it():
    from skimage.metrics import structural_similarity

    predictions, targets, observed = forecasts(members=False)
    observed[..., 0, :] = observed[..., -1, :] = observed[..., 0] = observed[..., -1] = (
        False  # no border, theirs differ
    )
    metric = StructuralSimilarity(prediction_length=3, value_range=10)
    metric.update(predictions, targets, observed)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 10, "full": True}
    for lead in range(3):
        counted = []
        for window in range(4):
            similarity = structural_similarity(predictions[window, lead], targets[window, lead], **options)[1]
            counted += [
                similarity[y, x]
                for y, x in np.ndindex(24, 24)
                if observed[window, lead, max(0, y - 5) : y + 6, max(0, x - 5) : x + 6].all()
            ]
        assert metric.compute()["pixels"][lead] == len(counted) > 300
        assert metric.compute()["ssim_by_lead"][lead] == pytest.approx(np.mean(counted))


def test_fractions_skill_as_the_library_scores_and_pysteps_have_it():
    from scores.spatial import fss_2d

    predictions, targets, _ = forecasts(members=False)
    for values in (predictions, targets):  # a dry border: theirs has one more window at each than pixels
        values[..., :6, :] = values[..., -6:, :] = values[..., :6] = values[..., -6:] = 0
    metric = FractionsSkillScore([2, 5], [1, 5, 11], prediction_length=3)
    metric.update(predictions, targets)
    said, happened = (xr.DataArray(x, dims=("window", "lead", "y", "x")) for x in (predictions, targets))
    for i, j in np.ndindex(2, 3):
        expected = fss_2d(
            said, happened, event_threshold=[2, 5][i], window_size=([1, 5, 11][j],) * 2, spatial_dims=("y", "x"),
            zero_padding=True, preserve_dims=["lead"], threshold_operator=np.greater_equal,
        )  # fmt: skip
        np.testing.assert_allclose(metric.compute()["fss_by_lead"][i, j], expected, rtol=1e-9)
    with pytest.raises(ValueError, match="odd"):
        FractionsSkillScore([2], [4], 3)

    spatialscores = pytest.importorskip("pysteps.verification.spatialscores", reason="pysteps: extra `optical-flow`")
    predictions, targets, _ = forecasts(members=False, windows=2)
    metric = FractionsSkillScore([2, 5], [1, 5, 11], prediction_length=3)
    metric.update(predictions[1], targets[1])
    for i, j, lead in np.ndindex(2, 3, 3):
        expected = spatialscores.fss(predictions[1, lead], targets[1, lead], [2, 5][i], [1, 5, 11][j])
        assert metric.compute()["fss_by_lead"][i, j, lead] == pytest.approx(expected)


def test_fractions_skill_forgives_a_shift_within_the_window():
    target = np.zeros((1, 40, 40))
    target[0, 15:25, 15:25] = 1
    metric = FractionsSkillScore([1], [1, 21], prediction_length=1)
    metric.update(np.roll(target, 5, axis=2), target)
    (near, far), counts = metric.compute()["fss"][0], metric.compute()
    assert near == 0.5 and 0.85 < far < 1
    assert counts["forecast_events"] == counts["observed_events"] == 100 and counts["pixels"] == 1600


@pytest.mark.parametrize("size", [24, 25])
def test_spectrum_of_pysteps(size):
    spectral = pytest.importorskip("pysteps.utils.spectral", reason="pysteps: the extra `optical-flow`")
    frames = rain(2, size, size)
    expected = [spectral.rapsd(frame, fft_method=np.fft) for frame in frames]
    np.testing.assert_allclose(radial_power(torch.from_numpy(frames)), expected, rtol=1e-9)


def test_spectrum_finds_a_wave():
    x = np.arange(24)
    wave = 3 + np.broadcast_to(np.cos(2 * np.pi * 4 * x / 24), (1, 24, 24))
    observed = np.ones((2, 1, 24, 24), bool)
    observed[1, 0, 0, 0] = False  # one missing pixel: the frame does not count
    metric = PowerSpectrum((24, 24), prediction_length=1)
    metric.update(np.stack([wave, 9 * wave]), np.stack([0 * wave, wave]), observed)
    result = metric.compute()
    assert result["forecast_power"][0, 1:].argmax() + 1 == result["wavenumber"][4] == 4
    assert result["forecast_power"][0, 0] == pytest.approx(9 * 24 * 24)
    assert result["frames"] == [1] and not result["observed_power"].any()


# ---------------------------------------------------------------------------------------------------------------------
# Ensembles
# ---------------------------------------------------------------------------------------------------------------------


def test_crps_against_a_loop():
    ensemble, target = rain(5, 3, 4).astype("float32"), rain(3, 4, seed=1)
    error = np.abs(ensemble - target).mean(0)
    pairs = sum(np.abs(ensemble[i].astype("float64") - ensemble[j]) for i in range(5) for j in range(5))
    plain, fair = ensemble_crps(ensemble, target)
    np.testing.assert_allclose(plain, error - pairs / (2 * 5 * 5), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(fair, error - pairs / (2 * 5 * 4), rtol=1e-6, atol=1e-12)


def test_crps_as_pysteps_and_the_library_scores_have_it():
    from scores.probability import crps_for_ensemble

    ensemble, target = rain(6, 20, 20), rain(20, 20, seed=1)
    plain, fair = ensemble_crps(ensemble, target)
    arrays = xr.DataArray(ensemble, dims=("member", "y", "x")), xr.DataArray(target, dims=("y", "x"))
    for method, values in (("ecdf", plain), ("fair", fair)):
        expected = crps_for_ensemble(*arrays, "member", method=method, preserve_dims="all")
        np.testing.assert_allclose(values, expected, atol=1e-12)
    probscores = pytest.importorskip("pysteps.verification.probscores", reason="pysteps: the extra `optical-flow`")
    smooth = np.random.default_rng(0).normal(size=(7, 500))  # theirs takes no ties
    assert ensemble_crps(smooth[1:], smooth[0])[0].mean() == pytest.approx(probscores.CRPS(smooth[1:], smooth[0]))


def test_fair_crps_does_not_depend_on_the_ensembles_size():
    """Of a unit Gaussian that forecasts itself it is 1 / sqrt(pi) on average, with 2 members as with 40."""
    random = np.random.default_rng(1)
    for members in (2, 40):
        score = ensemble_crps(random.normal(size=(members, 40_000)), random.normal(size=40_000))[1].mean()
        assert abs(score - np.pi**-0.5) < 0.015
    with pytest.raises(ValueError, match="at least 2"):
        ensemble_crps(np.zeros((1, 3)), np.zeros(3))
    with pytest.raises(ValueError, match="ensemble"):
        ensemble_crps(np.zeros((4, 3)), np.zeros(4))


def test_ensemble_scores_are_means_over_observed_pixels():
    ensembles, targets, observed = forecasts(members=True)
    metric = EnsembleScores(prediction_length=3, value_range=10)
    metric.update(ensembles, targets, observed)
    result = metric.compute()
    plain, fair = (score.numpy() / 10 for score in ensemble_crps(ensembles.swapaxes(0, 1), targets))
    assert result["crps"] == pytest.approx(plain[observed].mean())
    assert result["fair_crps"] == pytest.approx(fair[observed].mean())
    assert result["fair_crps_by_lead"][2] == pytest.approx(fair[:, 2][observed[:, 2]].mean())
    error = (ensembles.mean(1) - targets)[observed] / 10
    assert result["rmse"] == pytest.approx(np.sqrt(np.square(error).mean()))


@pytest.mark.parametrize("members", [3, 20])
def test_spread_is_the_error_where_members_and_observation_are_alike(members):
    values = np.random.default_rng(0).normal(size=(members + 1, 1, 200, 200))
    metric = EnsembleScores(prediction_length=1)
    metric.update(values[1:], values[0])
    assert abs(metric.compute()["spread_skill_ratio"] - 1) < 0.01
    metric.update(values[1:] / 2, values[0])
    assert metric.compute()["spread_skill_ratio"] < 0.9


def test_ranks_of_pysteps():
    ensscores = pytest.importorskip("pysteps.verification.ensscores", reason="pysteps: the extra `optical-flow`")
    random = np.random.default_rng(0)
    wet = random.uniform(size=(6, 1, 30, 30)) < 0.7
    values = np.where(wet, random.uniform(1, 2, wet.shape), 0)
    metric = RankHistogram(5, prediction_length=1, wet_threshold=1)
    metric.update(values[1:], values[0])
    result = metric.compute()
    # Where the observation is wet there are no ties, and the ranks are certain.
    certain = RankHistogram(5, prediction_length=1, wet_threshold=1)
    certain.update(values[1:], values[0], wet[0])
    expected = ensscores.rankhist(values[1:][:, wet[0]], values[0][wet[0]], X_min=1, normalize=False)
    assert certain.compute()["ranks"].tolist() == [expected.tolist()] == certain.compute()["ranks_wet"].tolist()
    # Elsewhere theirs draws, and ours shares: as many pixels, and nearly as many of each rank.
    drawn = ensscores.rankhist(values[1:], values[0], X_min=1, normalize=False)
    assert result["ranks_wet"].sum() == pytest.approx(drawn.sum()) == wet.any(0).sum()
    assert np.abs(result["ranks_wet"] - drawn).max() < 30
    assert result["ranks"].sum() == pytest.approx(900)


def test_tied_ranks_are_shared_as_the_library_scores_does_and_by_a_loop():
    from scores.probability import rank_histogram

    ensembles, targets, observed = forecasts(members=True)  # half dry, in steps of a half: full of ties
    metric = RankHistogram(5, prediction_length=3, wet_threshold=1)
    metric.update(ensembles, targets, observed)
    result = metric.compute()
    ranks, wet = np.zeros((3, 6)), np.zeros((3, 6))
    for window, lead, y, x in np.argwhere(observed):
        members, target = ensembles[window, :, lead, y, x], targets[window, lead, y, x]
        below, equal = (members < target).sum(), (members == target).sum()
        ranks[lead, below : below + equal + 1] += 1 / (equal + 1)
        if target >= 1 or (members >= 1).any():
            wet[lead, below : below + equal + 1] += 1 / (equal + 1)
    np.testing.assert_allclose(result["ranks"], ranks)
    np.testing.assert_allclose(result["ranks_wet"], wet)
    forecast = xr.DataArray(ensembles, dims=("window", "member", "lead", "y", "x"))
    target = xr.DataArray(np.where(observed, targets, np.nan), dims=("window", "lead", "y", "x"))
    theirs = rank_histogram(forecast, target, "member", preserve_dims="lead")  # relative frequencies
    np.testing.assert_allclose(result["ranks"] / result["ranks"].sum(1, keepdims=True), theirs, rtol=1e-9)


def test_dry_windows_have_flat_ranks():
    """Where nothing was observed and nothing forecast, each rank is as likely: exactly, in 200 windows as in one."""
    metric = RankHistogram(4, prediction_length=2)
    for _ in range(200):
        metric.update(np.zeros((4, 2, 8, 8)), np.zeros((2, 8, 8)))
    np.testing.assert_allclose(metric.compute()["ranks"], 200 * 64 / 5)


def test_ranks_are_flat_if_members_and_observation_are_alike():
    values = rain(6, 1, 1, 300, 300)  # half dry
    metric = RankHistogram(5, 1, wet_threshold=0.5)
    metric.update(values[1:].swapaxes(0, 1), values[0])
    counts = metric.compute()
    for name in ("ranks", "ranks_wet"):
        expected = counts[name].sum() / 6
        assert (np.abs(counts[name] - expected) < 4.5 * np.sqrt(expected)).all()
    with pytest.raises(ValueError, match="5 members"):
        metric.update(values[:4].swapaxes(0, 1), values[0])


def test_reliability_of_pysteps():
    probscores = pytest.importorskip("pysteps.verification.probscores", reason="pysteps: the extra `optical-flow`")
    ensembles, targets, observed = forecasts(members=True)
    metric = ProbabilityScores([2, 5], 5, prediction_length=3, wet_threshold=0.5)
    metric.update(ensembles, targets, observed)
    result = metric.compute()
    for i, threshold in enumerate((2, 5)):
        chance = (ensembles >= threshold).mean(1)[observed]
        diagram = probscores.reldiag_init(threshold, n_bins=6, min_count=0)
        probscores.reldiag_accum(diagram, chance, targets[observed])
        assert result["forecasts"][i].sum(0).tolist() == diagram["num_idx"].tolist()
        assert result["events"][i].sum(0).tolist() == diagram["Y_sum"].tolist()
        with np.errstate(invalid="ignore"):
            expected = diagram["Y_sum"] / diagram["num_idx"]
        np.testing.assert_allclose(result["reliability"][i], expected)
    # Wet pixels leave out forecasts of chance 0 that came true, and nothing else.
    np.testing.assert_array_equal(result["forecasts_wet"][..., 1:], result["forecasts"][..., 1:])
    np.testing.assert_array_equal(result["events_wet"], result["events"])
    wet = ((ensembles >= 0.5).any(1) | (targets >= 0.5)) & observed
    assert result["forecasts_wet"].sum((1, 2)).tolist() == [wet.sum()] * 2
    assert wet.sum() < observed.sum()


def test_roc_area_by_a_loop():
    """The chance that an event got a higher probability than a non-event."""
    ensembles, targets, observed = (values[:1] for values in forecasts(members=True))
    ensembles = ensembles + targets[:, None] * (np.arange(5) < 2)[:, None, None, None]  # some skill
    metric = ProbabilityScores([2], 5, prediction_length=3)
    metric.update(ensembles, targets, observed)
    chance, happened = (ensembles >= 2).sum(1)[observed], (targets >= 2)[observed]
    pairs = chance[happened][:, None] - chance[~happened]
    expected = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert metric.compute()["roc_area"] == pytest.approx([expected]) and expected > 0.7
    points = [(1.0, 1.0)]  # and the trapezoids under the curve
    points += [((chance[~happened] >= k).mean(), (chance[happened] >= k).mean()) for k in range(1, 6)] + [(0.0, 0.0)]
    area = sum((x1 - x0) * (y1 + y0) / 2 for (x1, y1), (x0, y0) in zip(points, points[1:]))
    assert area == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Scores of one benchmark
# ---------------------------------------------------------------------------------------------------------------------


def skill_of(predictions, targets) -> dict:
    metric = Nino34Skill(targets.shape[1])
    metric.update(predictions, targets, np.zeros(len(targets), int))
    return metric.compute()


def test_correlation_and_rmse():
    random = np.random.default_rng(0)
    target = random.normal(size=(50, 3))
    skill = skill_of(target * [2, -1, 0] + [1, 0, 0.3], target)["correlation_by_lead"]
    np.testing.assert_allclose(skill[:2], [1, -1])
    assert np.isnan(skill[2])
    np.testing.assert_allclose(skill_of(target + 2, target)["rmse_by_lead"], [2, 2, 2])
    noisy = target + random.normal(size=target.shape)
    expected = [np.corrcoef(noisy[:, i], target[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(skill_of(noisy, target)["correlation_by_lead"], expected)


def test_three_month_means():
    assert three_month_means(np.array([0.0, 3, 6, 0])).tolist() == [3, 3]


@goldens
@pytest.mark.parametrize("case", ["metric_enso_14", "metric_enso_26"])
def test_recorded_nino34_skill(case):
    data, config = recorded(case)
    low, high = config["SST_MIN"], config["SST_MAX"]
    predictions, targets = (
        three_month_means(nino34(data[f"input/sst_{kind}"].double().numpy() * (high - low) + low))
        for kind in ("pred", "true")
    )
    for ours, theirs in ((predictions, "nino_pred"), (targets, "nino_true")):
        if not np.allclose(ours, data[f"output/{theirs}"], atol=1e-5):
            pytest.fail(theirs)
    metric = Nino34Skill(predictions.shape[1])
    metric.update(predictions, targets, np.arange(len(predictions)))
    result = metric.compute()
    np.testing.assert_allclose(nino34_weights(predictions.shape[1]), data["output/default_weight"], rtol=1e-6)
    assert result["c_nino34_m"] == pytest.approx(float(data["output/C_Nino34_M"]), rel=1e-5)
    assert result["c_nino34_wm"] == pytest.approx(float(data["output/C_Nino34_WM"]), rel=1e-5)
    assert result["rmse"] == pytest.approx(float(data["output/nino_rmse"]), rel=1e-5)


def test_nino34_skill_by_start_month():
    random = np.random.default_rng(0)
    targets, month = random.normal(size=(60, 4)), np.arange(60) % 11  # no forecast starts in December
    predictions = targets * np.where(month == 2, -1, 1)[:, None]
    metric = Nino34Skill(4)
    for part in (slice(0, 20), slice(20, 60)):
        metric.update(predictions[part], targets[part], month[part])
    result = metric.compute()
    np.testing.assert_allclose(result["correlation_by_month"][2], [-1] * 4)
    np.testing.assert_allclose(result["correlation_by_month"][3], [1] * 4)
    np.testing.assert_allclose(result["rmse_by_month"][3], [0] * 4)
    expected = [np.corrcoef(predictions[:, lead], targets[:, lead])[0, 1] for lead in range(4)]
    np.testing.assert_allclose(result["correlation_by_lead"], expected)
    np.testing.assert_allclose(result["rmse_by_lead"], np.sqrt(np.square(predictions - targets).mean(0)))
    constant = Nino34Skill(4)
    constant.update(np.full_like(targets, 0.3), targets, month)
    assert np.isnan(constant.compute()["correlation_by_lead"]).all() and np.isnan(constant.compute()["c_nino34_m"])
    assert np.isnan(result["correlation_by_month"][11]).all() and np.isnan(result["rmse_by_month"][11]).all()
    assert result["forecasts"] == 60 and result["forecasts_by_month"].tolist() == [6] * 5 + [5] * 6 + [0]
    with pytest.raises(ValueError, match="start_month"):
        metric.update(predictions, targets, month + 2)
    with pytest.raises(ValueError, match="predictions"):
        metric.update(predictions[:, :3], targets[:, :3], month)


def cube(seed: int, steps: int = 6, size: int = 16):
    random = np.random.default_rng(seed)
    return random.uniform(0.1, 0.9, (steps, size, size, 4))


def test_earthnet_score_against_loops():
    """Pixel by pixel: numpy's fit of a line, scipy's earth mover's distance, scikit-image's similarity."""
    from scipy.stats import wasserstein_distance
    from skimage.metrics import structural_similarity

    x, y = cube(0), 0.7 * cube(1) + 0.3 * cube(0)
    clear = np.random.default_rng(2).uniform(size=x.shape[:3]) < 0.75
    clear[:, 0, 0], clear[1:, 0, 1] = False, False
    y[~clear] = np.nan
    parts = earthnet_parts(x, y, clear)
    assert parts["mad"] == pytest.approx(1 - np.median(np.abs(x - y)[clear] ** 0.06649346971087526))
    slopes, distances = [], []
    for i, j in np.ndindex(16, 16):
        known = np.flatnonzero(clear[:, i, j])
        if len(known) < 2:
            continue
        ndvi = [(v[:, i, j, 3] - v[:, i, j, 2]) / (v[:, i, j, 3] + v[:, i, j, 2] + 1e-6) for v in (x, y)]
        span = np.arange(known[0], known[-1] + 1)
        change = known[-1] - known[0]
        slope = [np.polyfit(span, ndvi[0][span], 1)[0] * change, np.polyfit(known, ndvi[1][known], 1)[0] * change]
        slopes.append((abs(slope[0] - slope[1]) / 4) ** 0.10082047548620601)
        distances.append(wasserstein_distance(ndvi[0], ndvi[1][known]) ** 0.10082047548620601)
    assert len(slopes) == 254
    assert parts["ols"] == pytest.approx(1 - np.mean(slopes))
    assert parts["emd"] == pytest.approx(1 - np.mean(distances))
    filled = np.where(clear[..., None], y, x)
    similar = [
        structural_similarity(filled[t, ..., c], x[t, ..., c], data_range=2)
        for t, c in np.ndindex(6, 4)
        if clear[t].mean() > 0.7
    ]
    assert parts["ssim"] == pytest.approx(np.mean(similar) ** 10.31885115)


def test_earthnet_score_averages_cubes_and_knows_undefined():
    clear = np.ones((2, 6, 16, 16), bool)
    clear[1] = False
    clear[1, 0, :2] = True  # enough for `mad` only
    predictions, targets = np.stack([cube(0), cube(2)]), np.stack([cube(1), cube(3)])
    metric = EarthNetScore()
    metric.update(predictions, targets, clear)
    result = metric.compute()
    first, second = (earthnet_parts(*each) for each in zip(predictions, targets, clear))
    assert [name for name, value in second.items() if np.isnan(value)] == ["ols", "emd", "ssim"]
    assert result["mad"] == pytest.approx((first["mad"] + second["mad"]) / 2) and result["ols"] == first["ols"]
    assert [result[f"{name}_cubes"] for name in first] == [2, 1, 1, 1]
    means = [result[name] for name in first]
    assert result["earthnet_score"] == pytest.approx(4 / sum(1 / value for value in means))
    perfect, undefined = EarthNetScore(), EarthNetScore()
    perfect.update(targets[:1], targets[:1], clear[:1])
    assert perfect.compute()["earthnet_score"] == pytest.approx(1)
    undefined.update(targets, targets, np.zeros_like(clear))
    assert np.isnan(undefined.compute()["earthnet_score"]) and undefined.compute()["mad_cubes"] == 0
    with pytest.raises(ValueError, match="T, H, W, 4"):
        metric.update(predictions[..., :3], targets[..., :3], clear)


def test_earth_movers_distance_by_hand():
    used = np.array([[True, True, False]])
    assert earth_movers_distance(np.array([[0.0, 0, 0]]), np.array([[1.0, 2, 9]]), used)[0] == pytest.approx(1.5)


def toy_features(videos):
    """Mean, deviation, mean of the first and of the last frame: (B, T, H, W) -> (B, 4)."""
    return torch.stack(
        [videos.mean((1, 2, 3)), videos.std((1, 2, 3)), videos[:, 0].mean((1, 2)), videos[:, -1].mean((1, 2))], dim=1
    )


@goldens
def test_recorded_frechet_video_distance():
    data, _ = recorded("metric_fvd")
    # the original repeats the channel three times, which the unbiased deviation notices: here side by side
    videos = {name: data[f"input/{name}"][..., 0].repeat(1, 1, 1, 3) for name in ("real", "fake")}  # (B, T, H, 3 W)
    for name, frames in videos.items():
        torch.testing.assert_close(toy_features(frames), data[f"output/features_{name}"])
    metric = FrechetVideoDistance(toy_features, num_features=4)
    for part in (slice(0, 6), slice(6, 12)):
        metric.update(videos["real"][part], real=True)
        metric.update(videos["fake"][part], real=False)
    torch.testing.assert_close(metric.real_features_cov_sum, data["output/real_features_cov_sum"])
    result = metric.compute()
    assert result["fvd"] == pytest.approx(float(data["output/fvd"]), rel=1e-6)
    assert (result["observed_videos"], result["forecast_videos"]) == (12, 10)


def test_frechet_distance_of_gaussians():
    """Of shifted copies it is the squared shift of the features; of one video it is undefined."""
    videos = torch.rand(50, 3, 4, 4, dtype=torch.float64)
    metric = FrechetVideoDistance(lambda x: x.mean((2, 3)), num_features=3)
    assert np.isnan(metric.compute()["fvd"])
    metric.update(videos, real=True)
    metric.update(videos + 2, real=False)
    assert metric.compute()["fvd"] == pytest.approx(3 * 2**2)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


def all_metrics(part: slice) -> dict:
    """Every metric after its share of the windows."""
    metrics = {}
    for name, (make, members) in FORECAST_METRICS.items():
        metrics[name] = make()
        if range(4)[part]:
            metrics[name].update(*(values[part] for values in forecasts(members)))
    metrics |= {"nino34": Nino34Skill(3), "earthnet": EarthNetScore(), "fvd": FrechetVideoDistance(toy_features, 4)}
    if range(4)[part]:
        index = rain(2, 48, 3).reshape(2, 4, 12, 3)[:, part].reshape(2, -1, 3)
        metrics["nino34"].update(*index, np.arange(index.shape[1]) % 12)
        cubes = np.stack([[cube(i), cube(i + 4)] for i in range(4)], axis=1)[:, part]
        metrics["earthnet"].update(*cubes, np.ones(cubes.shape[1:-1], bool))
        for real in (True, False):
            metrics["fvd"].update(torch.from_numpy(rain(2, 4, 3, 8, 8)[int(real), part]), real=real)
    return metrics


def score_a_share(rank: int, shares: list[slice], folder: str):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(shares)
    )
    results = {name: metric.compute() for name, metric in all_metrics(shares[rank]).items()}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("shares", [[slice(0, 3), slice(3, 4)], [slice(0, 4), slice(4, 4)]], ids=["uneven", "idle"])
def test_two_processes_score_as_one(shares, tmp_path):
    torch.multiprocessing.spawn(score_a_share, args=(shares, str(tmp_path)), nprocs=2)
    expected = {name: metric.compute() for name, metric in all_metrics(slice(0, 4)).items()}
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, result in results.items():
            equal(expected[name], result, rtol=1e-7 if name == "fvd" else 1e-12)  # roots of nearly singular matrices
