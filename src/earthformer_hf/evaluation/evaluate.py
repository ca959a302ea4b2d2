"""The engine of evaluation: forecasts of a model and of baselines in, scores with their counts out.

    results = evaluate({"model": forecaster, ...}, windows, PROTOCOLS["radar-open"])
    results["scores"]["model"]["summary"]["csi_m"]

A *forecaster* is a function of a [`~earthformer_hf.evaluation.Window`], see `forecasters.py`. Every window is forecast
by one process; the sums that a score is made of are kept per event, added up over processes, and divided at the end.
[`run_protocol`] is what `earthformer-hf evaluate` calls.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
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
from .forecasters import (
    Forecaster,
    OceanForecaster,
    Window,
    data_extractor,
    load_forecaster,
    protocol_baselines,
    protocol_windows,
    window_at,
    window_lengths,
)
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
from .protocols import PROTOCOLS, Protocol
from .reports import digests, score_file, score_text, write_report


MIN_EVENTS_FOR_INTERVAL = 10  # independent events; an interval of fewer would mean nothing
BOOTSTRAP_SAMPLES = 1000

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


@dataclass(frozen=True)
class EventLocation:
    """Where an event lies, and what it is independent of.

    Args:
        unit: events of the same unit, such as tiles of one storm, are not independent.
        field: the map that the event is a tile of; the event itself where it is no tile.
        corner: first row and column in the field.
        size: rows and columns.
    """

    unit: str
    field: str
    corner: tuple[int, int]
    size: tuple[int, ...]

    @classmethod
    def of(cls, window: Window, independent: str) -> "EventLocation":
        """That of a window's event; `independent` is a field of [`~earthformer_hf.evaluation.Protocol`]."""
        geo, event = window.event.get("geo", {}), str(window.event["id"])
        is_tile = {"row", "column"} <= set(geo)
        field, corner = (geo.get("source", event), (geo["row"], geo["column"])) if is_tile else (event, (0, 0))
        return cls(str(geo.get(independent, event)), field, corner, window.future.shape[1:3])

    def overlaps(self, other: "EventLocation") -> bool:
        """Whether they share a pixel."""
        return self.field == other.field and all(
            a < b + m and b < a + n for a, b, n, m in zip(self.corner, other.corner, self.size, other.size)
        )


class Tally:
    """The sums that scores are made of, by system, family of scores and event: what processes exchange."""

    def __init__(self, protocol: Protocol):
        self.protocol = protocol
        self.shapes: dict[str, tuple] = {}  # system -> image size (None: an index) and members (None: no ensemble)
        self.sums: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}  # system, family, event, state of the metric
        self.locations: dict[str, EventLocation] = {}  # by event
        self.errors: dict[int, float] = {}  # index of a window -> mean squared error of the first system
        self._metrics: dict[tuple, dict[str, Any]] = {}  # by shape

    def metrics(self, system: str) -> dict[str, Any]:
        """Metrics that do the arithmetic; the sums are kept here, so the metrics' own states mean nothing."""
        shape = self.shapes[system]
        if shape not in self._metrics:
            self._metrics[shape] = metrics_of(self.protocol, *shape)
        return self._metrics[shape]

    def add(
        self, system: str, forecast: np.ndarray, window: Window, mask: np.ndarray, families: tuple[str, ...] = ("",)
    ) -> None:
        """Add one forecast, where `mask` is true, to the families whose names begin with one of `families`.

        Raises:
            ValueError: the image size or the ensemble size is not that of the system's other forecasts.
        """
        size = None if forecast.ndim == 1 else window.future.shape[1:3]
        shape = size, len(forecast) if forecast.ndim > window.future.ndim else None
        if self.shapes.setdefault(system, shape) != shape:
            raise ValueError(
                f"forecasts of {system!r} must all have the same image size and ensemble size, "
                f"got {self.shapes[system]} and {shape}."
            )
        event = str(window.event["id"])
        self.locations[event] = EventLocation.of(window, self.protocol.independent)
        for family, metric in self.metrics(system).items():
            if family.startswith(families):
                metric.reset()
                update(metric, forecast, window, mask, self.protocol)
                self._sum(system, family, event if family.startswith(PER_EVENT) else "all", metric.metric_state)
                if family == "errors" and system == next(iter(self.shapes)) and metric.pixels.any():
                    self.errors[window.index] = float(metric.squared.sum() / metric.pixels.sum())

    def _sum(self, system: str, family: str, event: str, state: dict[str, Any]) -> None:
        events = self.sums.setdefault(system, {}).setdefault(family, {})
        events[event] = sum_states([events.get(event, {}), state])

    def gather(self) -> "Tally":
        """The tally of all processes."""
        total = Tally(self.protocol)
        for shapes, sums, locations, errors in gather_object([(self.shapes, self.sums, self.locations, self.errors)]):
            total.shapes |= shapes
            total.locations |= locations
            total.errors |= errors
            for system, families in sums.items():
                for family, events in families.items():
                    for event, state in events.items():
                        total._sum(system, family, event, state)
        return total

    def scores(self, system: str) -> dict[str, dict[str, np.ndarray]]:
        """Family -> its scores and counts."""
        sums = {family: sum_states(events.values()) for family, events in self.sums[system].items()}
        return {family: compute_from(self.metrics(system)[family], state) for family, state in sums.items()}

    def summary(self, system: str, event: str | None = None) -> dict[str, float]:
        """The headline scores, over all events or of one."""
        summary: dict[str, float] = {}
        for family, events in self.sums[system].items():
            states = [state for name, state in events.items() if event in (None, name)]
            if states:
                summary |= self._headline(system, family, sum_states(states))
        return summary

    def _headline(self, system: str, family: str, state: dict[str, Any]) -> dict[str, float]:
        scores = compute_from(self.metrics(system)[family], state)
        return headline(family, scores, self.protocol, math.prod(self.shapes[system][0] or ()))

    def units(self) -> list[list[str]]:
        """The events of each independent unit."""
        units: dict[str, list[str]] = {}
        for event in sorted(self.locations):
            units.setdefault(self.locations[event].unit, []).append(event)
        return list(units.values())

    def regions(self) -> list[str]:
        """Events that share no pixel: in the order of their names, each that shares none with those chosen before."""
        chosen: list[str] = []
        for event in sorted(self.locations):
            if not any(self.locations[event].overlaps(self.locations[other]) for other in chosen):
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
                states = [sum_states(events[event] for event in unit) for unit in units]
                stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
                random, draws = np.random.default_rng(0), []
                for _ in range(BOOTSTRAP_SAMPLES):
                    times = torch.from_numpy(random.multinomial(len(units), np.full(len(units), 1 / len(units))))
                    drawn = {name: torch.tensordot(times.to(x.dtype), x, 1) for name, x in stacked.items()}
                    draws.append(self._headline(system, family, drawn))
                for name in draws[0]:
                    values = np.array([draw[name] for draw in draws])
                    known = np.isfinite(values)
                    intervals[name] = np.quantile(values[known], (0.025, 0.975)).tolist() if known.any() else None
        return intervals


def sum_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """States of a metric in one: sums are added, lists put end to end."""
    total: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            total[name] = total[name] + value if name in total else copy.copy(value)
    return total


def compute_from(metric: Metric, state: dict[str, Any]) -> dict[str, np.ndarray]:
    """What a metric computes from this state."""
    for name, value in state.items():
        setattr(metric, name, value)
    return type(metric).compute(metric)  # not `metric.compute()`, which would add up over processes once more


# ---------------------------------------------------------------------------------------------------------------------
# All windows of a protocol
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(forecasters: dict[str, Forecaster], windows: Windows, protocol: Protocol) -> dict[str, Any]:
    """Score forecasts of every window, on as many processes as there are.

    Args:
        forecasters: by name. Of the first one, the best, median and worst cases are found. A forecaster may return a
            masked array whose masked pixels it could not reach, such as those into which rain moves from outside the
            frame. They are scored like all others, and all systems once more on the pixels that every one reached.
        windows: of [`protocol_windows`], or of other events in the same units.
        protocol: what to score.

    Returns:
        The same on every process: `windows` and `independent_events`, how many there are; `cases`, the indices of the
        windows with the lowest, median and highest squared error of the first system; and `scores` by system:
        `summary`, the headline scores, `interval` or `regions`, and scores and counts of each family. An interval is
        given for `MIN_EVENTS_FOR_INTERVAL` independent events or more, else the summaries of regions that share no
        pixel.

    Raises:
        ValueError: lengths that are not the protocol's, or a forecast that is not finite.
    """
    lengths = windows.context_length, windows.length - windows.context_length
    if lengths != window_lengths(protocol):
        raise ValueError(
            f"`windows` must be of {window_lengths(protocol)} frames for {protocol.name!r}, got {lengths}."
        )
    state, extractor, tally = PartialState(), data_extractor(protocol), Tally(protocol)
    indices = range(len(windows))
    if protocol.max_windows is not None and protocol.max_windows < len(windows):
        indices = np.linspace(0, len(windows) - 1, protocol.max_windows).round().astype(int).tolist()
    of_this_process = indices[state.process_index :: state.num_processes]
    for index in logging.tqdm(of_this_process, desc=protocol.name, disable=not state.is_main_process):
        window = window_at(windows, index, extractor)
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
    for system in tally.shapes:
        scores[system] = {"summary": tally.summary(system)}
        if len(units) >= MIN_EVENTS_FOR_INTERVAL:
            scores[system]["interval"] = tally.intervals(system)
        elif len(regions) > 1:
            scores[system]["regions"] = {event: tally.summary(system, event) for event in regions}
        scores[system] |= tally.scores(system)
    ordered = sorted(tally.errors, key=lambda index: (tally.errors[index], index))
    cases = {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]} if ordered else {}
    return {"windows": len(indices), "independent_events": len(units), "cases": cases, "scores": scores}


def run_protocol(
    model: str | Path | None = None,
    protocol: str | None = None,
    data_dir: str | Path | None = None,
    ensemble_size: int = 8,
    num_inference_steps: int = 20,
    max_windows: int | None = None,
    output: str | Path | None = None,
    command: str = "",
) -> str | None:
    """Score a model beside the protocol's baselines, on as many processes as there are.

    Args:
        model: a folder or a hub id; baselines only if omitted.
        protocol: a name of `PROTOCOLS`; the one that the model's feature extractor names if omitted.
        data_dir: the folder of the data; EARTHFORMER_HF_DATA (default ../shared/data) if omitted.
        ensemble_size: members, of a pipeline and of baselines that are ensembles.
        num_inference_steps: of a pipeline.
        max_windows: see [`Protocol`].
        output: a folder for `scores.json` and the figures.
        command: what was typed, for the score file.

    Returns:
        The scores as text; None on all processes but the main one.

    Raises:
        ValueError: no such protocol, a model that does not fit it, or data that are missing or crafted.
    """
    forecasters: dict[str, Forecaster] = {}
    made_by: dict[str, Any] = {"command": command}
    if model is not None:
        forecasters["model"], named, folder, settings = load_forecaster(model, ensemble_size, num_inference_steps)
        protocol = protocol or named
        made_by |= {"model": str(model), "weights": digests(folder)} | settings
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {sorted(PROTOCOLS)}, got {protocol!r}.")
    chosen = replace(PROTOCOLS[protocol], max_windows=max_windows)
    try:
        windows = protocol_windows(chosen, data_dir)
    except ValueError as reason:
        if data_dir is None:
            raise ValueError(f"{reason} Set EARTHFORMER_HF_DATA, or give `data_dir`.") from reason
        raise
    baselines, left_out = protocol_baselines(chosen, data_dir, ensemble_size)
    best_settings = {name: f.setting for name, f in baselines.items() if isinstance(f, OceanForecaster) and f.setting}
    made_by |= {"ensemble_size": ensemble_size, "chosen_on_validation": best_settings, "left_out": left_out}
    forecasters |= baselines
    document = score_file(evaluate(forecasters, windows, chosen), chosen, **made_by)
    if not PartialState().is_main_process:
        return None
    if output is not None:
        write_report(Path(output), document, forecasters, windows, chosen)
    notes = [f"{name}: left out, {reason}" for name, reason in left_out.items()]
    notes += [f"{name}: chosen on the validation split {setting}" for name, setting in best_settings.items()]
    return "\n".join([score_text(document, chosen), *notes])


__all__ = ["EventLocation", "Tally", "evaluate", "headline", "metrics_of", "run_protocol", "update"]
