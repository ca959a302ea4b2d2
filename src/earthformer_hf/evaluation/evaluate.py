"""One way through a protocol: forecasts of a model and of simple methods in, scores with their counts and figures out.

    results = evaluate({"model": forecaster, ...}, windows, PROTOCOLS["radar-open"])
    results["scores"]["model"]["summary"]["csi_m"]

A *forecaster* is a function of a [`Window`]: it returns what follows in stored units, (T_out, H, W[, C]), an ensemble
(E, T_out, H, W), or, under a protocol of an index, the index (leads,). Every window is forecast by one process; the
sums that a score is made of are kept per event, added up over processes, and divided at the end.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torchmetrics import Metric
from transformers.utils import logging

from ..data import Windows
from ..data.open_sst import nino34, three_month_means
from .benchmark_metrics import EarthNetScore, Nino34Skill
from .forecasters import Forecaster, Window, _lengths, data_extractor, window_at
from .metrics import (
    ContingencyScores,
    EnsembleScores,
    ErrorScores,
    FractionsSkillScore,
    PowerSpectrum,
    ProbabilityScores,
    RankHistogram,
    StructuralSimilarity,
)
from .protocols import Protocol


FEWEST_EVENTS = 10  # independent events, below which an interval would mean nothing


RESAMPLES = 1000


# Families whose sums are kept per event, for intervals and regions.
PER_EVENT = ("contingency", "errors", "ssim", "ensemble", "earthnet")


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def metrics_of(protocol: Protocol, image_size: tuple[int, int] | None, members: int | None) -> dict[str, Metric]:
    """The protocol's scores of maps, of ensembles of so many members, or (without `image_size`) of an index."""
    length, thresholds, wet = protocol.prediction_length, protocol.thresholds, protocol.wet_threshold
    makers: dict[str, Callable[[], Metric]] = {"nino34": lambda: Nino34Skill(length - 2)}
    if image_size is not None:
        makers |= {
            "contingency": lambda: ContingencyScores(thresholds, length),
            "errors": lambda: ErrorScores(length, protocol.value_range),
            "ssim": lambda: StructuralSimilarity(length, protocol.value_range),
            "fss": lambda: FractionsSkillScore(thresholds, protocol.neighbourhoods, length),
            "spectrum": lambda: PowerSpectrum(image_size, length),
            "earthnet": EarthNetScore,
        }
    if members is not None:
        makers |= {
            "ensemble": lambda: EnsembleScores(length, protocol.value_range),
            "ranks": lambda: RankHistogram(members, length, wet),
            "probabilities": lambda: ProbabilityScores(thresholds, members, length, wet),
        }
    metrics = {family: make() for family, make in makers.items() if family in protocol.scores}
    if "contingency" in metrics:
        for pool in protocol.pools:
            metrics[f"contingency_pool{pool}"] = ContingencyScores(thresholds, length, pool)
        if protocol.physical_thresholds:
            stored = data_extractor(protocol).from_physical(np.array(protocol.physical_thresholds))
            metrics["contingency_physical"] = ContingencyScores(stored.tolist(), length)
    return metrics


def update(metric: Any, forecast: np.ndarray, window: Window, mask: np.ndarray, protocol: Protocol) -> None:
    """Add one forecast to a score, where `mask` (shape of the future) is true."""
    if isinstance(metric, Nino34Skill):
        metric.update(*_index_of(forecast, window, protocol))
        return
    target = np.where(mask, window.future, 0).astype("float32")
    members = forecast if forecast.ndim > target.ndim else forecast[None]
    if isinstance(metric, EnsembleScores | RankHistogram | ProbabilityScores):
        metric.update(members, target, mask)
        return
    if protocol.ensemble == "mean" and not isinstance(metric, PowerSpectrum):  # a mean has lost the small scales
        members = members.mean(0, keepdims=True)
    target, mask = (np.repeat(x[None], len(members), axis=0) for x in (target, mask))  # (B, T, H, W[, C])
    if isinstance(metric, EarthNetScore):
        metric.update(members, target, np.asarray(mask.all(-1)))
        return
    if target.ndim == 5:  # (B * C, T, H, W): each channel is an image
        members, target, mask = (np.moveaxis(x, -1, 1).reshape(-1, *x.shape[1:4]) for x in (members, target, mask))
    metric.update(members, target, mask)


def _index_of(forecast: np.ndarray, window: Window, protocol: Protocol) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forecast and observed three-month means (1, leads), and the first month (1,), 0 for January."""

    def means(maps):
        return three_month_means(nino34(np.where(window.observed, maps, np.nan).astype("float64")))

    predicted, first = forecast if forecast.ndim == 1 else means(forecast), window.start + len(window.past)
    if protocol.index_series is None:
        target = means(window.future)
    else:  # a label is the mean of its month and the next two
        target = np.asarray(window.event["series"][protocol.index_series])[first : first + len(predicted)]
    month = window.event["time"][first].astype("datetime64[M]").astype(int) % 12
    return predicted[None], target[None], np.array([month])


def headline(family: str, scores: dict[str, np.ndarray], protocol: Protocol, pixels: int) -> dict[str, float]:
    """The headline scores of a family, averaged as the protocol says; `pixels` are those of a frame."""
    by_lead = "_by_lead" if protocol.average == "per lead" else ""

    def mean(name: str) -> float:
        return float(np.mean(scores[f"{name}{by_lead}"]))

    if family == "contingency":
        return {"csi_m": mean("csi"), "hss_m": mean("hss")}
    if family.startswith("contingency_pool"):
        return {f"csi_m_{family.removeprefix('contingency_')}": mean("csi")}
    if family == "errors":
        return {name: mean(name) * (pixels if protocol.frame_sums else 1) for name in ("mse", "mae")}
    if family == "ssim":
        return {"ssim": mean("ssim")}
    if family == "ensemble":
        return {name: mean(name) for name in ("fair_crps", "crps", "spread_skill_ratio")}
    if family == "nino34":
        return {
            "c_nino34_m": float(scores["c_nino34_m"]),
            "c_nino34_wm": float(scores["c_nino34_wm"]),
            "index_rmse": float(scores["rmse"]),
        }
    if family == "earthnet":
        return {"earthnet_score": float(scores["earthnet_score"])}
    return {}


class Tally:
    """The sums that scores are made of, by system, family of scores and event: what processes exchange."""

    def __init__(self, protocol: Protocol):
        self.protocol = protocol
        self.kinds: dict[str, tuple] = {}  # system -> its forecasts' image size and members
        self.sums: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}  # system, family, event, state of the metric
        self.places: dict[str, tuple] = {}  # event -> see `_place`
        self.errors: dict[int, float] = {}  # window -> mean squared error of the first system
        self.known: dict[tuple, dict[str, Any]] = {}

    def metrics(self, system: str) -> dict[str, Any]:
        """Metrics to compute with; what they hold is of no meaning."""
        kind = self.kinds[system]
        if kind not in self.known:
            self.known[kind] = metrics_of(self.protocol, *kind)
        return self.known[kind]

    def add(
        self, system: str, forecast: np.ndarray, window: Window, mask: np.ndarray, families: tuple[str, ...] = ("",)
    ) -> None:
        """Add one forecast, where `mask` is true, to the families that begin like this."""
        size = None if forecast.ndim == 1 else window.future.shape[1:3]
        kind = size, len(forecast) if forecast.ndim > window.future.ndim else None
        if self.kinds.setdefault(system, kind) != kind:
            raise ValueError(f"forecasts of {system!r} must be of one kind, got {self.kinds[system]} and {kind}.")
        event = str(window.event["id"])
        self.places[event] = _place(window, self.protocol.independent)
        for family, metric in self.metrics(system).items():
            if family.startswith(families):
                metric.reset()
                update(metric, forecast, window, mask, self.protocol)
                self._sum(system, family, event if family.startswith(PER_EVENT) else "all", metric.metric_state)
                if family == "errors" and system == next(iter(self.kinds)) and metric.pixels.any():
                    self.errors[window.number] = float(metric.squared.sum() / metric.pixels.sum())

    def _sum(self, system: str, family: str, event: str, state: dict[str, Any]) -> None:
        events = self.sums.setdefault(system, {}).setdefault(family, {})
        events[event] = _added([events.get(event, {}), state])

    def gather(self) -> "Tally":
        """The tally of all processes."""
        total = Tally(self.protocol)
        for kinds, sums, places, errors in gather_object([(self.kinds, self.sums, self.places, self.errors)]):
            total.kinds |= kinds
            total.places |= places
            total.errors |= errors
            for system, families in sums.items():
                for family, events in families.items():
                    for event, state in events.items():
                        total._sum(system, family, event, state)
        return total

    def scores(self, system: str) -> dict[str, dict[str, np.ndarray]]:
        """Family -> its scores and counts."""
        sums = {family: _added(events.values()) for family, events in self.sums[system].items()}
        return {family: _computed(self.metrics(system)[family], state) for family, state in sums.items()}

    def summary(self, system: str, event: str | None = None) -> dict[str, float]:
        """The headline scores, over all events or of one."""
        summary: dict[str, float] = {}
        for family, events in self.sums[system].items():
            states = [state for name, state in events.items() if event in (None, name)]
            if states:
                summary |= self._headline(system, family, _added(states))
        return summary

    def _headline(self, system: str, family: str, state: dict[str, Any]) -> dict[str, float]:
        scores = _computed(self.metrics(system)[family], state)
        return headline(family, scores, self.protocol, math.prod(self.kinds[system][0] or ()))

    def units(self) -> list[list[str]]:
        """The events of each independent unit."""
        units: dict[str, list[str]] = {}
        for event in sorted(self.places):
            units.setdefault(self.places[event][0], []).append(event)
        return list(units.values())

    def regions(self) -> list[str]:
        """Events that share no pixel: each in turn that shares none with those before it."""
        chosen: list[str] = []
        for event in sorted(self.places):
            if not any(_overlap(self.places[event], self.places[other]) for other in chosen):
                chosen.append(event)
        return chosen

    def intervals(self, system: str) -> dict[str, list[float] | None]:
        """95 % intervals of the headline scores: the bootstrap over independent units, drawn with replacement.

        Every system sees the same draws. A draw in which a score is undefined is left out of that score's interval.
        Efron and Tibshirani, "An introduction to the bootstrap", 1993, section 13.3 (percentiles).
        """
        units, intervals = self.units(), {}
        for family, events in self.sums[system].items():
            if family.startswith(PER_EVENT):
                states = [_added(events[event] for event in unit) for unit in units]
                stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
                random, draws = np.random.default_rng(0), []
                for _ in range(RESAMPLES):
                    times = torch.from_numpy(random.multinomial(len(units), np.full(len(units), 1 / len(units))))
                    drawn = {name: torch.tensordot(times.to(x.dtype), x, 1) for name, x in stacked.items()}
                    draws.append(self._headline(system, family, drawn))
                for name in draws[0]:
                    values = np.array([draw[name] for draw in draws])
                    known = np.isfinite(values)
                    intervals[name] = np.quantile(values[known], (0.025, 0.975)).tolist() if known.any() else None
        return intervals


def _place(window: Window, independent: str) -> tuple:
    """What makes an event independent; the field it lies in, its first row and column, and its size."""
    geo, event = window.event.get("geo", {}), str(window.event["id"])
    corner = (geo["row"], geo["column"]) if {"row", "column"} <= set(geo) else (0, 0)
    field = geo.get("source", event) if {"row", "column"} <= set(geo) else event
    return str(geo.get(independent, event)), field, corner, window.future.shape[1:3]


def _overlap(first: tuple, second: tuple) -> bool:
    (_, field, corner, size), (_, other_field, other_corner, other_size) = first, second
    return field == other_field and all(
        a < b + m and b < a + n for a, b, n, m in zip(corner, other_corner, size, other_size)
    )


def _added(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """States of a metric in one: sums are added, lists put end to end."""
    total: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            total[name] = total[name] + value if name in total else copy.copy(value)
    return total


def _computed(metric: Metric, state: dict[str, Any]) -> dict[str, np.ndarray]:
    for name, value in state.items():
        setattr(metric, name, value)
    return type(metric).compute(metric)  # the plain method: that of the object would add processes up once more


# ---------------------------------------------------------------------------------------------------------------------
# The way through
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(forecasters: dict[str, Forecaster], windows: Windows, protocol: Protocol) -> dict[str, Any]:
    """Score forecasts of every window, on as many processes as there are.

    Args:
        forecasters: by name. The first one is the one that matters: its best, median and worst cases are looked for.
            One may return a masked array: what it says of masked pixels for want of better is scored as it is, and
            every system is scored once more on the pixels that all of them reach.
        windows: of [`protocol_windows`], or of other events in the same units.
        protocol: what to score.

    Returns:
        The same on every process: `windows` and `independent_events`, their numbers; `cases`, the numbers of the
        windows with the lowest, median and highest squared error of the first system; and `scores` by system:
        `summary`, the headline scores, `interval` or `regions`, and scores and counts of each family. An interval is
        given for `FEWEST_EVENTS` independent events or more, else the summaries of regions that share no pixel.

    Raises:
        ValueError: lengths that are not the protocol's, or a forecast that is not finite.
    """
    lengths = windows.context_length, windows.length - windows.context_length
    if lengths != _lengths(protocol):
        raise ValueError(f"`windows` must be of {_lengths(protocol)} frames for {protocol.name!r}, got {lengths}.")
    state, extractor, tally = PartialState(), data_extractor(protocol), Tally(protocol)
    numbers = range(len(windows))
    if protocol.max_windows is not None and protocol.max_windows < len(windows):
        numbers = np.linspace(0, len(windows) - 1, protocol.max_windows).round().astype(int).tolist()
    mine = numbers[state.process_index :: state.num_processes]
    for number in logging.tqdm(mine, desc=protocol.name, disable=not state.is_main_process):
        window = window_at(windows, number, extractor)
        forecasts = {system: forecaster(window) for system, forecaster in forecasters.items()}
        reached = window.observed
        for forecast in forecasts.values():
            if isinstance(forecast, np.ma.MaskedArray):
                reached = reached & ~np.ma.getmaskarray(forecast)
        for system, forecast in forecasts.items():
            tally.add(system, np.ma.getdata(forecast), window, window.observed)
        if reached is not window.observed:
            for system, forecast in forecasts.items():
                name, families = f"{system}, reachable pixels", ("contingency", "errors")
                tally.add(name, np.ma.getdata(forecast), window, reached, families)
    tally = tally.gather()
    units, regions = tally.units(), tally.regions()
    scores: dict[str, dict[str, Any]] = {}
    for system in tally.kinds:
        scores[system] = {"summary": tally.summary(system)}
        if len(units) >= FEWEST_EVENTS:
            scores[system]["interval"] = tally.intervals(system)
        elif len(regions) > 1:
            scores[system]["regions"] = {event: tally.summary(system, event) for event in regions}
        scores[system] |= tally.scores(system)
    ordered = sorted(tally.errors, key=lambda number: (tally.errors[number], number))
    cases = {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]} if ordered else {}
    return {"windows": len(numbers), "independent_events": len(units), "cases": cases, "scores": scores}
