"""Two systems on the same windows: paired differences, headlines over what occurs, and methods that did not run."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_evaluation import codes, cut, persistence

from earthformer_hf.data import simulated
from earthformer_hf.evaluation import (
    PROTOCOLS,
    Protocol,
    baseline_forecaster,
    baselines,
    compare,
    data_extractor,
    evaluate,
    reports,
    window_at,
)
from earthformer_hf.evaluation.forecasters import protocol_baselines


COIN = Protocol(
    name="coin", source="a test", dataset="open-radar", context_length=1, prediction_length=1,
    scores=("contingency", "errors"), thresholds=(1,),
)  # fmt: skip


def coins(number=200):
    """Events of one pixel: it happens in 3 of 10."""
    events = codes(number, length=2, size=1)
    for index, event in enumerate(events):
        event["values"] = np.full((2, 1, 1), int(index % 10 < 3), "uint8")
    return events


def always(window):
    return np.ones((1, 1, 1))


def nearly(window):
    """Right in all events but every tenth."""
    return window.future * 0 + (window.future if int(window.event["id"][1:]) % 10 else 0)


def test_the_interval_of_a_difference_is_that_of_paired_draws():
    """`nearly` misses one event of ten: the difference of the errors is a difference of indicators, event by event."""
    events = coins()
    results = evaluate({"always": always, "nearly": nearly}, cut(events, COIN), COIN)
    difference, low, high = results["differences"]["always - nearly"]["mse"]
    happened = np.array([event["values"][1, 0, 0] for event in events], float)
    missed = np.arange(200) % 10 == 0
    each = (1 - happened) - np.where(missed, happened, 0)  # of each event
    assert difference == pytest.approx(each.mean()) == 0.7 - 0.1
    order = [int(event["id"][1:]) for event in sorted(events, key=lambda event: event["id"])]
    random = np.random.default_rng(0)
    drawn = [random.multinomial(200, np.full(200, 1 / 200)) @ each[order] / 200 for _ in range(1000)]
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, (0.025, 0.975))))
    # not what the two intervals alone would say
    alone = [results["scores"][name]["interval"]["mse"] for name in ("always", "nearly")]
    assert high - low < (alone[0][1] - alone[1][0]) - (alone[0][0] - alone[1][1])
    text = reports.score_text(reports.score_file(results, COIN), COIN)
    assert "paired differences with 95 % intervals" in text and f"0.6 ({low:.4g}.." in text


def test_files_are_compared_by_the_same_draws(tmp_path):
    windows = cut(coins(), COIN)
    both = evaluate({"always": always, "nearly": nearly}, windows, COIN)
    for name, forecaster in (("always", always), ("nearly", nearly)):
        document = reports.score_file(evaluate({name: forecaster}, windows, COIN), COIN)
        reports.write_score_file(document, tmp_path / name)
    text = compare([tmp_path / "always", tmp_path / "nearly"])
    for score, (difference, low, high) in both["differences"]["always - nearly"].items():
        assert f"{difference:.4g} ({low:.4g}..{high:.4g})" in text, score
    few = evaluate({"always": always}, cut(coins(9), COIN), COIN)
    assert "differences" not in few and "draws" not in few
    reports.write_score_file(reports.score_file(few, COIN), tmp_path / "few")
    assert "no paired differences with" in compare([tmp_path / "few", tmp_path / "few"])


def test_a_long_record_is_drawn_by_stretches_of_time():
    """30 hours of one event, with windows every hour: by the hour they count as 30 events of two frames."""
    random, protocol = np.random.default_rng(1), replace(COIN, independent="1h", window_stride=2)
    values = random.integers(0, 2, (60, 1, 1)).astype("uint8")
    time = np.datetime64("2024-01-01T00:00", "s") + np.timedelta64(1800, "s") * np.arange(60)
    record = {"id": "record", "time": time, "values": values, "geo": {}}
    apart = [
        {"id": f"{n:02d}", "time": time[2 * n :][:2], "values": values[2 * n :][:2], "geo": {}} for n in range(30)
    ]
    forecasters = {"always": always, "persistence": persistence(protocol)}
    results = evaluate(forecasters, cut([record], protocol), protocol)
    events = evaluate(forecasters, cut(apart, COIN), COIN)
    assert results["windows"] == results["independent_events"] == 30
    assert results["differences"] == events["differences"] and results["differences"]
    assert [results["scores"][name]["interval"] for name in forecasters] == [
        events["scores"][name]["interval"] for name in forecasters
    ]
    by_day = evaluate(forecasters, cut([record], protocol), replace(protocol, independent="1D"))
    assert by_day["independent_events"] == 2 and "differences" not in by_day


def test_a_mean_over_thresholds_is_of_those_that_occur():
    protocol, events = replace(PROTOCOLS["radar-open"], scores=("contingency",), pools=(4,)), codes(1, length=25)
    events[0]["values"] = np.minimum(events[0]["values"], 150)  # thresholds 160, 181 and 219 do not occur
    results = evaluate({"persistence": persistence(protocol)}, cut(events, protocol), protocol)
    scores = results["scores"]["persistence"]
    for name, family, score in (("csi_m", "contingency", "csi"), ("hss_m", "contingency", "hss")):
        values = scores[family][score]
        assert np.isnan(values[3:]).all() and scores["summary"][name] == pytest.approx(values[:3].mean())
    assert scores["summary"]["csi_m_pool4"] == pytest.approx(scores["contingency_pool4"]["csi"][:3].mean())
    used = {"csi_m": [16, 74, 133], "hss_m": [16, 74, 133], "csi_m_pool4": [16, 74, 133]}
    assert results["headline_thresholds"] == {"persistence": used}
    document = reports.score_file(results, protocol)
    line = "csi_m, hss_m, csi_m_pool4 of all systems: over the thresholds that occur, 16, 74, 133, not over all of 16,"
    assert line in reports.score_text(document, protocol)

    by_lead = replace(protocol, average="per lead", pools=())
    scores = evaluate({"persistence": persistence(by_lead)}, cut(events, by_lead), by_lead)["scores"]["persistence"]
    assert scores["summary"]["csi_m"] == pytest.approx(scores["contingency"]["csi_by_lead"][:3].mean())
    all_occur = evaluate({"persistence": persistence(protocol)}, cut(codes(1, 25), protocol), protocol)
    assert all_occur["headline_thresholds"] == {}


def test_means_over_other_thresholds_have_no_difference():
    """One system forecasts what never occurs: its mean is over one threshold more."""
    protocol = replace(COIN, thresholds=(1, 2))

    def bold(window):
        return 2 * np.ones((1, 1, 1))

    results = evaluate({"always": always, "bold": bold}, cut(coins(), protocol), protocol)
    assert results["headline_thresholds"] == {"always": {"csi_m": [1], "hss_m": [1]}}
    assert "csi_m" not in results["differences"]["always - bold"] and "mse" in results["differences"]["always - bold"]
    assert results["scores"]["bold"]["summary"]["csi_m"] == pytest.approx((0.3 + 0) / 2)
    assert results["scores"]["always"]["summary"]["csi_m"] == pytest.approx(0.3)


@pytest.mark.skipif(not baselines.is_pysteps_available(), reason="pysteps and OpenCV are not installed")
def test_methods_that_could_not_be_run_are_counted():
    protocol = replace(
        PROTOCOLS["radar-open"], dataset="folder", independent="id", feature_extractor={"units": "mm/h"},
        context_length=4, prediction_length=3, window_stride=7, physical_thresholds=(), scores=("errors",),
        value_range=1.0,
    )  # fmt: skip
    (wet,) = simulated.rain_events(1, length=7, size=64, seed=3)
    dry = wet | {"id": "dry", "values": np.zeros_like(wet["values"])}
    dry["values"][:, 5, 5] = 0.2
    other = dry | {"id": "other"}
    forecasters = {
        name: baseline_forecaster(name, protocol, lambda split: None) for name in ("persistence", "s-prog", "anvil")
    }
    results = evaluate(forecasters, cut([wet, dry, other], protocol), protocol)
    assert results["fallbacks"] == {"s-prog": 2, "anvil": 0}
    document = json.loads(json.dumps(reports.score_file(results, protocol)))
    assert document["fallbacks"] == {"s-prog": 2, "anvil": 0}
    assert "s-prog: for 2 of 3 windows pysteps could not run it" in reports.score_text(document, protocol)


def test_the_earthnet_score_has_the_last_clear_value_beside_the_last_frame():
    protocol = replace(
        PROTOCOLS["earthnet2021"], dataset="simulated-land", split="test", scores=("earthnet", "errors")
    )
    assert protocol_baselines(PROTOCOLS["sevir-per-lead"])[0].keys() == {"persistence"}
    forecasters, _ = protocol_baselines(protocol)
    assert list(forecasters) == ["persistence", "last clear value"]
    event = simulated.land_event(0)
    windows = cut([event], protocol)
    scores = evaluate(forecasters, windows, protocol)["scores"]
    past, clear = event["values"][:10], event["observed"]
    last = np.array(past[-1])
    for y, x in np.ndindex(*last.shape[:2]):
        seen = np.flatnonzero(clear[:10, y, x])
        last[y, x] = past[seen[-1] if len(seen) else -1, y, x]
    assert not clear[9].all()
    for name, frame in (("persistence", past[-1]), ("last clear value", last)):
        error = np.square(frame - event["values"][10:], dtype="float64")[clear[10:]].mean()
        assert scores[name]["summary"]["mse"] == pytest.approx(error, rel=1e-5), name
    assert scores["last clear value"]["summary"]["mse"] < 0.5 * scores["persistence"]["summary"]["mse"]
    window = window_at(windows, 0, data_extractor(protocol))
    np.testing.assert_array_equal(window.past_observed[..., 0], clear[:10])
