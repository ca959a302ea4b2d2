"""What an evaluation leaves behind: a score file, its scores as text, and figures.

A score file holds the protocol with its hash, what was scored (events, times, a digest of the values), scores with
their counts, and what made them: the weights' digests, the versions of the libraries, and the command. An undefined
score is null.
"""

import importlib.metadata
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import plotting
from ..data.measures import UNKNOWN, DataFacts, canonical_units
from ..data.rain import rain_coding
from ..data.windows import Windows
from ..plotting.canvas import time_labels
from ..sharing.card_text import read_card
from ..sharing.cards import with_scores
from ..sharing.files import write_file
from ..sharing.tables import format_number, text_table
from ..sharing.words import without_local_paths
from .forecasters import Forecaster, Window, data_extractor, window_at
from .protocols import Protocol, hash_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("earthformer-hf", "torch", "transformers", "diffusers", "datasets", "torchmetrics", "numpy", "pysteps")
LEAD_UNITS = {"s": "s", "m": "min", "h": "h", "D": "days", "W": "weeks", "M": "months", "Y": "years"}
COUNTS = ("hits", "misses", "false_alarms")


# ---------------------------------------------------------------------------------------------------------------------
# Score files
# ---------------------------------------------------------------------------------------------------------------------


def score_file(results: dict[str, Any], protocol: Protocol, **made_by: Any) -> dict[str, Any]:
    """The contents of a score file: what [`~earthformer_hf.evaluation.evaluate`] returned, and what made it.

    Absolute paths are from the working directory, or their last parts, also in the protocol that is hashed.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    fields = _json_value(without_local_paths(asdict(protocol)), digits=None)
    header = {"protocol": fields, "protocol_hash": hash_of(fields)}
    return header | _json_value(without_local_paths(made_by | {"versions": versions} | results))


def _json_value(value: Any, digits: int | None = 6) -> Any:
    """A value as JSON can hold it: lists for arrays, null for what is undefined; so many significant digits."""
    if isinstance(value, dict):
        return {str(key): _json_value(entry, digits) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_json_value(entry, digits) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}") if isinstance(value, float) and digits is not None else value


def write_score_file(document: dict[str, Any], path: Path) -> None:
    """Write JSON in which each list of numbers is one line; if that fails, the file is as it was before."""
    text = json.dumps(document, indent=1, allow_nan=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    write_file(path, text + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def score_text(document: dict[str, Any], protocol: Protocol) -> str:
    """The scores of a score file as text, with the counts."""
    systems = document["scores"]
    lines = [
        f"{protocol.name}: {document['windows']:,} windows, independent events: {document['independent_events']:,}; "
        f"averages {protocol.average}" + (f"; {protocol.missing}" if protocol.missing else ""),
        "data: " + ", ".join(f"{name.replace('_', ' ')} {text}" for name, text in document["data"].items()),
    ]
    rows = {system: dict(scores["summary"]) for system, scores in systems.items()}
    for system, scores in systems.items():
        rows[system] |= {"pixels": sum(scores["errors"]["pixels"])} if "errors" in scores else {}
    lines += ["", text_table(rows), *_remarks(document, protocol)]
    if protocol.published:
        lines += ["", f"measured by others, published: {protocol.published}"]
    for title, name in (("95 % intervals", "interval"), ("regions that share no pixel", "regions")):
        rows = {}
        for system, scores in systems.items():
            if name == "interval" and name in scores:
                ends = {n: interval or [None, None] for n, interval in scores[name].items()}
                rows[system] = {n: f"{format_number(low)}..{format_number(high)}" for n, (low, high) in ends.items()}
            elif name in scores:
                rows |= {f"{system}, {region}": row for region, row in scores[name].items()}
        lines += ["", title, "", text_table(rows)] if rows else []
    if rows := difference_rows(document.get("differences", {})):
        lines += ["", "paired differences with 95 % intervals, from the same draws of events", "", text_table(rows)]
    for family, names in threshold_names(document, protocol).items():
        tables = {system: scores[family] for system, scores in systems.items() if family in scores}
        if tables:
            csi = {system: dict(zip(names, table["csi"])) for system, table in tables.items()}
            title = "CSI, pooled"
            if protocol.physical_thresholds:
                title += ", by physical thresholds" if "physical" in family else ", by thresholds of the stored values"
            lines += ["", title, "", text_table(csi), "", "hits / misses / false alarms", ""]
            rows = {}
            for system, table in tables.items():
                counts = zip(*([f"{sum(row):,}" for row in table[count]] for count in COUNTS))
                rows[system] = dict(zip(names, map(" / ".join, counts)))
            lines += [text_table(rows)]
    leads, unit = lead_times(document, protocol)
    for title, curves in curves_by_lead(document, protocol).items():
        names = [f"{lead:g}" for lead in leads]
        lines += ["", f"{title}, by lead time in {unit}", ""]
        lines += [text_table({system: dict(zip(names, values.tolist())) for system, values in curves.items()})]
    if any("undefined" in line for line in lines):
        lines += ["", "undefined: there was no event, or no pixel, to score"]
    return "\n".join(lines)


def _remarks(document: dict[str, Any], protocol: Protocol) -> list[str]:
    """What must be known of the headline scores: thresholds that they are not over, and methods that did not run."""
    lines, alike = [], dict[tuple[str, str], list[str]]()  # scores and thresholds -> systems
    for system, chosen in document["headline_thresholds"].items():
        for values in {tuple(values): None for values in chosen.values()}:
            scores = ", ".join(name for name in chosen if tuple(chosen[name]) == values)
            words = ", ".join(f"{threshold:g}" for threshold in values) or "none"
            alike.setdefault((scores, words), []).append(system)
    for (scores, words), systems in alike.items():
        whose = "all systems" if len(systems) == len(document["scores"]) else "; ".join(systems)
        every = ", ".join(f"{threshold:g}" for threshold in protocol.thresholds)
        lines.append(f"{scores} of {whose}: over the thresholds that occur, {words}, not over all of {every}")
    if count := document["unobserved_windows"]:
        lines.append(
            f"{count:,} of {document['windows']:,} windows have no observed context or future, and count for nothing"
        )
    for system, count in document["fallbacks"].items():
        if count:
            lines.append(
                f"{system}: for {count:,} of {document['windows']:,} windows pysteps could not run it, as on fields "
                "almost without rain; the extrapolation took its place"
            )
    return ["", *lines] if lines else []


def difference_rows(differences: dict[str, dict[str, list]]) -> dict[str, dict[str, str]]:
    """Differences and the ends of their intervals as cells of a table."""
    return {
        pair: {name: f"{format_number(x)} ({format_number(a)}..{format_number(b)})" for name, (x, a, b) in row.items()}
        for pair, row in differences.items()
        if row
    }


def threshold_names(document: dict[str, Any], protocol: Protocol) -> dict[str, list[str]]:
    """Family of counts -> its thresholds in words."""
    units = canonical_units(document["data"]["units"])
    units = "" if units in ("1", UNKNOWN) else f" {units}"  # codes have none
    names = {"contingency": [f"{threshold:g}{units}" for threshold in protocol.thresholds]}
    if protocol.physical_thresholds:
        physical = data_extractor(protocol).physical_units
        names["contingency_physical"] = [f"{threshold:g} {physical}" for threshold in protocol.physical_thresholds]
    return names


def lead_times(document: dict[str, Any], protocol: Protocol) -> tuple[np.ndarray, str]:
    """Lead time of each frame, and its unit: that of the scored events' times."""
    frames, step = np.arange(1, protocol.prediction_length + 1), DataFacts(**document["data"]).step
    if step is None:
        return frames, "frames"
    return int(step.astype(int)) * frames, LEAD_UNITS[np.datetime_data(step)[0]]


def curves_by_lead(document: dict[str, Any], protocol: Protocol) -> dict[str, dict[str, np.ndarray]]:
    """Name of a score -> system -> its value at each lead time, NaN where undefined; none that is undefined everywhere
    beside others, and no CSI of a threshold that nothing observed reached."""
    curves: dict[str, dict[str, np.ndarray]] = {}

    def add(title: str, family: str, score: str, row: int | None = None):
        for system, scores in document["scores"].items():
            if family in scores and "reachable" not in system:
                values = np.array(scores[family][f"{score}_by_lead"], dtype="float64")
                curves.setdefault(title, {})[system] = values if row is None else values[row]

    family, names = list(threshold_names(document, protocol).items())[-1]  # in physical units if there are any
    counts = [scores[family] for scores in document["scores"].values() if family in scores]
    for row, name in enumerate(names):
        if any(sum(table["hits"][row]) + sum(table["misses"][row]) for table in counts):
            add(f"CSI at {name}", family, "csi", row)
    add("mean squared error", "errors", "mse")
    add("fair CRPS", "ensemble", "fair_crps")
    add("spread / error", "ensemble", "spread_skill_ratio")
    add("correlation of the index", "nino34", "correlation")
    add("RMSE of the index", "nino34", "rmse")
    defined = {title: panel for title, panel in curves.items() if any(np.isfinite(x).any() for x in panel.values())}
    return defined or curves


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def figures(
    document: dict[str, Any], forecasters: dict[str, Forecaster], windows: Windows, protocol: Protocol
) -> "dict[str, Figure]":
    """File name -> figure, of the scores that the document holds, and of the first system's cases."""
    systems = {name: scores for name, scores in document["scores"].items() if "reachable" not in name}
    leads, unit = lead_times(document, protocol)
    title, colors = f"{protocol.name}, {document['windows']:,} windows", plotting.system_colors(list(systems))
    curves = curves_by_lead(document, protocol)
    drawn = {"scores_by_lead": plotting.plot_by_lead(curves, leads, unit, title, colors)} if curves else {}

    spectra = {name: scores["spectrum"] for name, scores in systems.items() if "spectrum" in scores}
    if spectra:
        first = next(iter(spectra.values()))
        panels = {}
        for lead in (0, len(leads) - 1):
            power = {name: np.array(spectrum["forecast_power"], float)[lead] for name, spectrum in spectra.items()}
            observed = np.array(first["observed_power"], dtype="float64")[lead]
            panels[f"after {leads[lead]:g} {unit}"] = {"observed": observed} | power
        wavelength = 2 * len(first["wavenumber"]) / np.arange(1, len(first["wavenumber"]))
        drawn["spectrum"] = plotting.plot_spectrum(wavelength, panels, title, colors)

    suffix = "_physical" if protocol.physical_thresholds else ""
    family = f"probabilities{suffix}"
    chances = {name: scores[family] for name, scores in systems.items() if family in scores}
    if chances:
        panels = {}
        for row, threshold in enumerate(threshold_names(document, protocol)[f"contingency{suffix}"]):
            panels[f"{threshold} or more"] = {
                name: (np.array(s["reliability"], float)[row], np.array(s["forecasts"])[row].sum(0))
                for name, s in chances.items()
            }
        drawn["reliability"] = plotting.plot_reliability(panels, title, colors)

    ranks = {name: np.array(scores["ranks"]["ranks"]).sum(0) for name, scores in systems.items() if "ranks" in scores}
    if ranks:
        panels = {"all pixels": ranks}
        if protocol.wet_threshold is not None:
            wet = {name: np.array(systems[name]["ranks"]["ranks_wet"]).sum(0) for name in ranks}
            to_physical, units = _physical(document, protocol)
            least = f"{to_physical(np.array([protocol.wet_threshold]))[0]:.2g} {units}".removesuffix(" stored values")
            panels[f"wet pixels: observation or a member at {least} or more"] = wet
        drawn["rank_histogram"] = plotting.plot_rank_histogram(panels, title, colors)

    if document["cases"]:
        drawn["cases"] = _plot_cases(document, forecasters, windows, protocol, title)
    return drawn


def write_report(
    folder: Path,
    document: dict[str, Any],
    forecasters: dict[str, Forecaster],
    windows: Windows,
    protocol: Protocol,
) -> None:
    """Write `scores.json` and the figures into a folder, created if need be; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_score_file(document, folder / "scores.json")
    for name, figure in figures(document, forecasters, windows, protocol).items():
        write_figure(figure, folder / f"{name}.png")


def update_card(folder: Path, document: dict[str, Any]) -> None:
    """Write `scores.json` into the folder of a model, and its summary into the card there."""
    card = with_scores(read_card(folder / "README.md"), document)
    write_score_file(document, folder / "scores.json")
    write_file(folder / "README.md", card)


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as a picture; if that fails, the file is as it was before."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:] or "png", dpi=110)
    write_file(path, drawn.getvalue())


def _plot_cases(document: dict[str, Any], forecasters, windows: Windows, protocol: Protocol, title: str) -> "Figure":
    """Observation and forecast of the first system, for the windows of its lowest, median and highest error."""
    extractor, (system, forecaster) = data_extractor(protocol), next(iter(forecasters.items()))
    leads, unit = lead_times(document, protocol)
    columns = np.unique(np.linspace(0, len(leads) - 1, 6).round().astype(int))
    to_physical, units = _physical(document, protocol)
    rows, described = {}, []
    for index in dict.fromkeys(document["cases"].values()):
        window = window_at(windows, index, extractor)
        case = " and ".join(case for case, other in document["cases"].items() if other == index)
        described.append(f"{case}: {_case_name(window, windows)}")
        forecast = np.ma.getdata(forecaster(window))
        forecast = forecast.mean(0) if forecast.ndim > window.future.ndim else forecast
        shown = {"observed": window.future, system: forecast}
        if "persistence" in forecasters and system != "persistence":
            shown["persistence"] = np.ma.getdata(forecasters["persistence"](window))
        for label, frames in shown.items():
            frames = np.where(window.observed, frames, np.nan)[columns]
            frames = frames if frames.ndim == 3 else frames[..., -1]  # one channel: the last
            rows[f"{case}: {label}"] = to_physical(frames[:, ::-1] if _is_south_up(window.event) else frames)
    names = [f"+{leads[n]:g} {unit if leads[n] != 1 else unit.removesuffix('s')}" for n in columns]
    title = "\n".join([f"{title}: windows of lowest, median and highest error", *described])
    return plotting.plot_sequence(rows, names, title, units=units)


def _case_name(window: Window, windows: Windows) -> str:
    """The event of a window, and from when the forecast is."""
    last = window.start + windows.cutter.frame_stride * (len(window.past) - 1)
    time = np.asarray(window.event.get("time", ()), "datetime64[s]")
    known = last < len(time) and not np.isnat(time[last])
    return str(window.event["id"]) + (f", from {time_labels(time)[last]}" if known else "")


def _physical(document: dict[str, Any], protocol: Protocol) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """From stored values to what is drawn, and its unit: rain in mm/h, by a table of codes, else as they are."""
    extractor, facts = data_extractor(protocol), DataFacts(**document["data"])
    try:
        return rain_coding(extractor, facts).to_rain, "mm/h"
    except ValueError:
        pass
    if extractor.physical_table:
        return extractor.to_physical, extractor.physical_units or UNKNOWN
    return np.asarray, "stored values" if canonical_units(facts.units) == "1" else facts.units


def _is_south_up(event: dict[str, Any]) -> bool:
    """Whether the first row of the frames is the southernmost."""
    geo = event.get("geo", {})
    on_earth = {"crs", "grid_mapping", "y_units"} & set(geo)
    rows = geo.get("lat", geo.get("y") if on_earth else None)
    return rows is not None and len(rows) > 1 and rows[0] < rows[-1]


__all__ = [
    "LEAD_UNITS",
    "curves_by_lead",
    "difference_rows",
    "figures",
    "lead_times",
    "score_file",
    "score_text",
    "threshold_names",
    "update_card",
    "write_figure",
    "write_report",
    "write_score_file",
]
