"""What is refused before anything is forecast, and what is counted as independent."""

import re
from dataclasses import replace

import numpy as np
import pytest
from test_evaluation import codes, cut, persistence

from earthformer_hf.data import simulated
from earthformer_hf.data.tiles import Tiles
from earthformer_hf.evaluation import PROTOCOLS, Protocol, evaluate, reports


@pytest.mark.parametrize("geo", [{}, {"file": "a.nc"}])
def test_tiles_of_a_map_are_drawn_together(geo):
    """The interval of tiles is that of the maps which they are cut from."""
    protocol = replace(PROTOCOLS["radar-open"], scores=("errors",), independent="id")
    events = [event | {"geo": geo, "id": f"{number:02d}"} for number, event in enumerate(codes(12, length=25))]
    for number, event in enumerate(events):
        event["time"] = event["time"] + np.timedelta64(number, "D")
    forecasters = {"persistence": persistence(protocol)}
    whole, tiles = (evaluate(forecasters, cut(each, protocol), protocol) for each in (events, Tiles(events, (8, 8))))
    assert whole["independent_events"] == tiles["independent_events"] == 12 and tiles["windows"] == 4 * 12
    intervals = [results["scores"]["persistence"]["interval"]["mse"] for results in (whole, tiles)]
    np.testing.assert_allclose(*intervals, rtol=1e-12)

    few = evaluate(forecasters, cut(Tiles(events[:1], (12, 12)), protocol), protocol)  # each overlaps all others
    assert few["independent_events"] == 1 and "regions" not in few["scores"]["persistence"]


def never(window):
    raise AssertionError("nothing may be forecast")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pools": (4, 17)}, "`pools` of 'radar-open' must be at most 16 for maps of 16 x 16"),
        ({"scores": ("nino34",)}, "'nino34' is of monthly maps of 24 x 48"),
        ({"scores": ("earthnet",)}, r"'earthnet' is of maps \(H, W, 4\), got maps of 16 x 16"),
        ({"independent": "sorce"}, r"`independent` of 'radar-open' must be .*\['source'\], got 'sorce'"),
        ({"dataset": "folder"}, "knows no physical units"),
    ],
)
def test_scores_that_the_data_cannot_have_are_refused_before_any_forecast(changes, message):
    protocol = replace(PROTOCOLS["radar-open"], **({"baselines": ()} | changes))
    with pytest.raises(ValueError, match=message):
        evaluate({"never": never}, cut(codes(1, length=25), protocol), protocol)


def test_maps_of_months_without_the_stated_labels_or_the_right_step_have_no_index():
    (event,) = simulated.sst_events(6)
    protocol = replace(PROTOCOLS["sst-kaplan"], index_series="labels")
    with pytest.raises(ValueError, match=r"`index_series` of 'sst-kaplan' must be one of \[\], got 'labels'"):
        evaluate({"never": never}, cut([event], protocol), protocol)
    event["time"] = np.datetime64("2024-01-01", "s") + np.timedelta64(300, "s") * np.arange(len(event["values"]))
    protocol = PROTOCOLS["sst-kaplan"]
    with pytest.raises(ValueError, match="with a time step of 5m"):
        evaluate({"never": never}, cut([event], protocol), protocol)


@pytest.mark.parametrize("size", [5, 6])
def test_similarity_needs_six_pixels(size):
    protocol = replace(PROTOCOLS["radar-open"], scores=("ssim",))
    windows = cut(codes(1, length=25, size=size), protocol)
    if size == 5:
        with pytest.raises(ValueError, match="'ssim' needs at least 6 pixels a side, got maps of 5 x 5"):
            evaluate({"never": never}, windows, protocol)
    else:
        scores = evaluate({"truth": lambda window: window.future}, windows, protocol)["scores"]
        assert scores["truth"]["summary"]["ssim"] == pytest.approx(1)


def test_a_forecast_without_any_score_is_refused():
    protocol = replace(PROTOCOLS["sevir-lr-prediff"], scores=("ranks",), baselines=())
    with pytest.raises(ValueError, match="`scores` must hold one of maps, which a system forecasts"):
        evaluate({"maps": persistence(protocol)}, cut(codes(1, length=25), protocol), protocol)


def test_reachable_pixels_have_no_score_without_counts_and_errors():
    protocol = replace(PROTOCOLS["radar-open"], scores=("fss",))
    windows = cut(codes(1, length=25), protocol)

    def half(window):
        return np.ma.masked_array(window.future, np.indices(window.future.shape)[2] < 8)

    assert list(evaluate({"half": half}, windows, protocol)["scores"]) == ["half"]


def test_tables_by_stored_and_by_physical_thresholds_are_told_apart():
    protocol = PROTOCOLS["radar-open"]
    results = evaluate({"persistence": persistence(protocol)}, cut(codes(1, length=25), protocol), protocol)
    lines = reports.score_text(reports.score_file(results, protocol), protocol).splitlines()
    for title, names in (
        ("CSI, pooled, by thresholds of the stored values", "| 16 | 74 |"),
        ("CSI, pooled, by physical thresholds", "| 0.5 mm/h | 1 mm/h |"),
    ):
        assert lines.count(title) == 1
        assert names in re.sub(" +", " ", lines[lines.index(title) + 2])


def test_nothing_is_said_of_missing_values_if_the_protocol_does_not():
    own = Protocol(
        name="own", source="a test", dataset="folder", context_length=1, prediction_length=1, scores=("errors",)
    )
    windows = cut(codes(1, length=2), own)
    for protocol, words in ((own, ""), (replace(own, missing="clutter enters no score"), "; clutter enters no score")):
        results = evaluate({"persistence": persistence(protocol)}, windows, protocol)
        first = reports.score_text(reports.score_file(results, protocol), protocol).splitlines()[0]
        assert first == f"own: 1 windows, independent events: 1; averages pooled{words}"
