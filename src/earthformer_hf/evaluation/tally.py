"""The sums that scores are made of, kept per event; and from them scores, headlines, intervals and differences."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torchmetrics import Metric
from transformers.utils import logging

from ..data.file_times import parsed_step
from ..data.open_sst import nino34, three_month_means
from .benchmark_metrics import EarthNetScore, Nino34Skill
from .forecasters import Window, data_extractor
from .metrics import (
    ContingencyScores,
    EnsembleScores,
    ErrorScores,
    FractionsSkillScore,
    PowerSpectrum,
    ProbabilityScores,
    RankHistogram,
    StructuralSimilarity,
    ratio,
)
from .protocols import Protocol


logger = logging.get_logger(__name__)
BOOTSTRAP_SAMPLES = 1000

# Families whose sums are kept per event, for intervals and regions.
PER_EVENT = ("contingency", "errors", "ssim", "ensemble", "earthnet")


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def metrics_of(protocol: Protocol, image_size: tuple[int, int] | None, members: int | None) -> dict[str, Metric]:
    """The protocol's scores of maps, of ensembles of so many members, or (without `image_size`) of an index.

    Raises:
        ValueError: it has none of such a forecast.
    """
    length, thresholds, wet = protocol.prediction_length, protocol.thresholds, protocol.wet_threshold
    size, count = image_size or (0, 0), members or 0
    makers: dict[str, Callable[[], Metric]] = {
        "nino34": lambda: Nino34Skill(length - 2),
        "contingency": lambda: ContingencyScores(thresholds, length),
        "errors": lambda: ErrorScores(length, protocol.value_range),
        "ssim": lambda: StructuralSimilarity(length, protocol.value_range),
        "fss": lambda: FractionsSkillScore(thresholds, protocol.neighbourhoods, length),
        "spectrum": lambda: PowerSpectrum(size, length),
        "earthnet": EarthNetScore,
        "ensemble": lambda: EnsembleScores(length, protocol.value_range),
        "ranks": lambda: RankHistogram(count, length, wet),
        "probabilities": lambda: ProbabilityScores(thresholds, count, length, wet),
    }
    kind = "index" if image_size is None else "maps" if members is None else "ensemble"
    chosen = protocol.families_of(kind, "a system")
    metrics = {family: make() for family, make in makers.items() if family in chosen}
    if "contingency" in metrics:
        for pool in protocol.pools:
            metrics[f"contingency_pool{pool}"] = ContingencyScores(thresholds, length, pool)
    if protocol.physical_thresholds:
        stored = data_extractor(protocol).from_physical(np.array(protocol.physical_thresholds)).tolist()
        if "contingency" in metrics:
            metrics["contingency_physical"] = ContingencyScores(stored, length)
        if "probabilities" in metrics:
            metrics["probabilities_physical"] = ProbabilityScores(stored, count, length, wet)
    return metrics


def update(metric: Any, forecast: np.ndarray, window: Window, mask: np.ndarray, protocol: Protocol) -> None:
    """Add one forecast to a score, where `mask` (shape of the future) is true; all values in float32, as the data are.

    A value of a threshold would miss it in float64, where the threshold has more digits.
    """
    if isinstance(metric, Nino34Skill):
        metric.update(*_index_of(forecast, window, protocol))
        return
    target = np.where(mask, window.future, 0).astype("float32")
    members = forecast if forecast.ndim > target.ndim else forecast[None]
    if isinstance(metric, EnsembleScores | RankHistogram | ProbabilityScores):
        metric.update(members.astype("float32"), target, mask)
        return
    if protocol.ensemble == "mean" and not isinstance(metric, PowerSpectrum):  # a mean has lost the small scales
        members = members.mean(0, keepdims=True)
    members = members.astype("float32")
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


def by_threshold(family: str, scores: dict[str, np.ndarray], protocol: Protocol) -> dict[str, np.ndarray]:
    """The headline scores that are means over thresholds, before that mean: (thresholds,), NaN where undefined."""
    suffix = family.removeprefix("contingency")
    if family == suffix or suffix == "_physical":
        return {}
    names = {f"csi_m{suffix}": "csi"} if suffix else {"csi_m": "csi", "hss_m": "hss"}
    if protocol.average == "pooled":
        return {headline: scores[name] for headline, name in names.items()}
    leads = {headline: scores[f"{name}_by_lead"] for headline, name in names.items()}  # (thresholds, T)
    return {name: ratio(np.nansum(values, 1), np.isfinite(values).sum(1)) for name, values in leads.items()}


def headline(
    family: str,
    scores: dict[str, np.ndarray],
    protocol: Protocol,
    pixels: int,
    chosen: dict[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """The headline scores of a family, averaged as the protocol says.

    Args:
        pixels: of a frame.
        chosen: name of a mean over thresholds -> bool (thresholds,), which to take; those at which the score is
            defined if omitted.
    """
    by_lead = "_by_lead" if protocol.average == "per lead" else ""

    def mean(name: str) -> float:
        return float(np.mean(scores[f"{name}{by_lead}"]))

    if family.startswith("contingency"):
        tables = by_threshold(family, scores, protocol).items()
        taken = {name: values[np.isfinite(values) if chosen is None else chosen[name]] for name, values in tables}
        return {name: float(values.mean()) if len(values) else math.nan for name, values in taken.items()}
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
        field: the map that the event is a tile of, by source or file and first time; the event itself where it is no
            tile.
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
        field, corner = event, (0, 0)
        if {"row", "column"} <= set(geo):
            corner = geo["row"], geo["column"]
            whole = geo.get("source", geo.get("file"))
            begin = "".join(map(str, window.event.get("time", ())[:1]))
            field = f"{whole} {begin}" if whole is not None else event.removesuffix(f":{corner[0]}:{corner[1]}")
        unit = stretch_of(window, independent)
        if unit is None and independent != "id" and independent not in geo:
            logger.warning_once(
                f"`independent`: {event!r} has no {independent!r}; it is taken as independent of others."
            )
        return cls(unit or str(geo.get(independent, field)), field, corner, window.future.shape[1:3])

    def overlaps(self, other: "EventLocation") -> bool:
        """Whether they share a pixel."""
        return self.field == other.field and all(
            a < b + m and b < a + n for a, b, n, m in zip(self.corner, other.corner, self.size, other.size)
        )


def stretch_of(window: Window, independent: str) -> str | None:
    """The begin of the stretch of time in which a window starts, if `independent` is its length, such as "1D"."""
    if not independent[:1].isdigit():
        return None
    length: Any = parsed_step(independent, "independent")
    unit = np.datetime_data(length)[0]
    time, size = window.event["time"][window.start].astype(f"datetime64[{unit}]"), int(length.astype(int))
    return str((time.astype(int) // size * size).astype(f"datetime64[{unit}]"))


class Tally:
    """The sums that scores are made of, by system, family of scores and event: what processes exchange."""

    def __init__(self, protocol: Protocol):
        self.protocol = protocol
        self.shapes: dict[str, tuple] = {}  # system -> image size (None: an index) and members (None: no ensemble)
        self.sums: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}  # system, family, event, state of the metric
        self.locations: dict[str, EventLocation] = {}  # by event
        self.errors: dict[int, float] = {}  # index of a window -> mean squared error of the first system
        self.windows: dict[int, tuple[str, str, str, bytes]] = {}  # index -> event, first and last time, digest
        self.empty: set[int] = set()  # windows without observed context or future
        self.fallbacks: dict[str, set[int]] = {}  # system -> windows for which its method could not be run
        self._metrics: dict[tuple, dict[str, Any]] = {}  # by shape

    def see(self, window: Window, frame_stride: int) -> None:
        """Note what is scored: the window's event, times, and a digest of its observed values in float32."""
        digest = hashlib.sha256(np.packbits(np.concatenate([window.past_observed, window.observed])).tobytes())
        for values, observed in ((window.past, window.past_observed), (window.future, window.observed)):
            digest.update(np.where(observed, values, 0).astype("<f4").tobytes())
        if not window.observed.any():
            self.empty.add(window.index)
        event, length = window.event, len(window.past) + len(window.future)
        ends = window.start, window.start + frame_stride * (length - 1)
        first, last = (str(event["time"][frame]) if "time" in event else str(frame) for frame in ends)
        self.windows[window.index] = str(event["id"]), first, last, digest.digest()

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
        stretch = stretch_of(window, self.protocol.independent)
        event = str(window.event["id"]) + (f" from {stretch}" if stretch else "")  # what is drawn, or is a region
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
        of_this_process = self.shapes, self.sums, self.locations, self.errors, self.windows, self.empty, self.fallbacks
        for shapes, sums, locations, errors, windows, empty, fallbacks in gather_object([of_this_process]):
            total.shapes |= shapes
            total.locations |= locations
            total.errors |= errors
            total.windows |= windows
            total.empty |= empty
            for system, missed in fallbacks.items():
                total.fallbacks[system] = total.fallbacks.get(system, set()) | missed
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

    def _headline(self, system: str, family: str, state: dict[str, Any], chosen: Any = None) -> dict[str, float]:
        scores = compute_from(self.metrics(system)[family], state)
        return headline(family, scores, self.protocol, math.prod(self.shapes[system][0] or ()), chosen)

    def _occurring(self, system: str, family: str) -> dict[str, np.ndarray]:
        """Name of a mean over thresholds -> bool (thresholds,), those at which the score is defined."""
        scores = compute_from(self.metrics(system)[family], sum_states(self.sums[system][family].values()))
        return {name: np.isfinite(values) for name, values in by_threshold(family, scores, self.protocol).items()}

    def headline_thresholds(self, system: str) -> dict[str, list[float]]:
        """Name of a mean over thresholds -> those that it is over, where these are not all."""
        chosen = {name: used for family in self.sums[system] for name, used in self._occurring(system, family).items()}
        return {
            name: [threshold for threshold, used in zip(self.protocol.thresholds, row) if used]
            for name, row in chosen.items()
            if not row.all()
        }

    def scored(self) -> dict[str, Any]:
        """What was scored: `digest`, and of each event its first and last time, number of windows, and digest."""
        events: dict[str, list[Any]] = {}
        whole = hashlib.sha256()
        for index in sorted(self.windows):
            event, first, last, digest = self.windows[index]
            whole.update(f"{event} {first}".encode() + digest)
            known = events.setdefault(event, [first, last, 0, hashlib.sha256()])
            known[:3] = min(known[0], first), max(known[1], last), known[2] + 1
            known[3].update(digest)
        table = {event: [*entry[:3], entry[3].hexdigest()[:16]] for event, entry in events.items()}
        return {"digest": whole.hexdigest(), "events": table}

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

    def draws(self, system: str) -> dict[str, np.ndarray]:
        """The headline scores (BOOTSTRAP_SAMPLES,) of independent units that are drawn with replacement.

        Every system sees the same draws, so that those of two systems may be subtracted. Means over thresholds are of
        those that occur in all units; NaN where a draw lacks one of them. Efron and Tibshirani, "An introduction to
        the bootstrap", 1993, chapter 13.
        """
        units = self.units()
        drawn_scores: dict[str, np.ndarray] = {}
        for family, events in self.sums[system].items():
            if family.startswith(PER_EVENT):
                chosen = self._occurring(system, family)
                states = [sum_states(events[event] for event in unit) for unit in units]
                stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
                random, draws = np.random.default_rng(0), []
                for _ in range(BOOTSTRAP_SAMPLES):
                    times = torch.from_numpy(random.multinomial(len(units), np.full(len(units), 1 / len(units))))
                    drawn = {name: torch.tensordot(times.to(x.dtype), x, 1) for name, x in stacked.items()}
                    draws.append(self._headline(system, family, drawn, chosen))
                drawn_scores |= {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
        return drawn_scores


def interval(draws: np.ndarray) -> list[float] | None:
    """The 95 % interval of draws, by percentiles; those in which a score is undefined are left out."""
    known = np.isfinite(draws)
    return np.quantile(draws[known], (0.025, 0.975)).tolist() if known.any() else None


def differences(
    summaries: list[dict[str, float]], draws: list[dict[str, np.ndarray]], thresholds: list[dict[str, list[float]]]
) -> dict[str, list[float | None]]:
    """The headline scores of one system minus those of another on the same windows, each with its paired interval.

    Args:
        summaries, draws, thresholds: of both; see [`Tally`]. A mean over other thresholds gives no difference.

    Returns:
        Name of a score -> the difference, and the ends of its 95 % interval.
    """
    found: dict[str, list[float | None]] = {}
    for name in (name for name in draws[0] if name in draws[1]):
        if thresholds[0].get(name) == thresholds[1].get(name):
            low, high = interval(draws[0][name] - draws[1][name]) or (None, None)
            found[name] = [summaries[0][name] - summaries[1][name], low, high]
    return found


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


__all__ = [
    "EventLocation",
    "Tally",
    "differences",
    "headline",
    "interval",
    "metrics_of",
    "update",
]
