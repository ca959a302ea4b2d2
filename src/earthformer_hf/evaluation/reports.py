"""What an evaluation leaves behind: a score file, its scores as text, and figures; and the comparison of score files.

A score file holds the protocol with its hash, scores with their counts, and what made them: the weights' digests, the
versions of the libraries, and the command. An undefined score is null.
"""

import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState

from .. import plotting
from ..data.events import builder_of
from ..data.windows import Windows
from ..pipeline_prediff import PreDiffPipeline
from ..sharing.push import load as load_model
from .evaluate import evaluate
from .forecasters import (
    Forecaster,
    OceanForecaster,
    baseline_forecaster,
    data_extractor,
    model_forecaster,
    pipeline_forecaster,
    protocol_windows,
    window_at,
)
from .protocols import PROTOCOLS, Protocol


if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("earthformer-hf", "torch", "transformers", "diffusers", "datasets", "torchmetrics", "numpy", "pysteps")
COUNTS = ("hits", "misses", "false_alarms")


# ---------------------------------------------------------------------------------------------------------------------
# Score files
# ---------------------------------------------------------------------------------------------------------------------


def score_file(results: dict[str, Any], protocol: Protocol, **made_by: Any) -> dict[str, Any]:
    """The contents of a score file: what [`~earthformer_hf.evaluation.evaluate`] returned, and what made it."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    stated = {"protocol": asdict(protocol), "protocol_hash": protocol.hash, **made_by, "versions": versions}
    return _plain(stated | results)


def _plain(value: Any) -> Any:
    """As JSON has it: lists for arrays, null for what is undefined; six significant digits."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_score_file(document: dict[str, Any], path: Path) -> None:
    """One line for each list of numbers."""
    text = json.dumps(document, indent=1, allow_nan=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    path.write_text(text + "\n", encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """File of weights -> SHA-256."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def compare(paths: Sequence[Path]) -> str:
    """The headline scores of several score files as text; the fair CRPS alone where ensembles differ in size.

    Raises:
        ValueError: a file that is no score file, or another protocol than the first file's: its fields that differ.
    """
    documents = []
    for path in paths:
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            documents.append(document)
            document["protocol"], document["protocol_hash"], document["scores"]
        except (OSError, ValueError, KeyError, TypeError) as reason:
            raise ValueError(f"{path} is not a score file: {type(reason).__name__}: {reason}") from reason
    first = documents[0]
    for path, document in zip(paths, documents):
        if document["protocol_hash"] != first["protocol_hash"]:
            names = sorted(first["protocol"].keys() | document["protocol"].keys())
            differing = [n for n in names if first["protocol"].get(n) != document["protocol"].get(n)]
            raise ValueError(
                f"{paths[0]} and {path} do not compare: their protocols {first['protocol'].get('name')!r} and "
                f"{document['protocol'].get('name')!r} differ in {', '.join(differing) or 'their hash'}."
            )
        if document["windows"] != first["windows"]:
            raise ValueError(
                f"{paths[0]} and {path} do not compare: {first['windows']} and {document['windows']} windows."
            )
    rows = {
        f"{path}: {system}": scores["summary"]
        for path, document in zip(paths, documents)
        for system, scores in document["scores"].items()
    }
    if len({document.get("ensemble_size") for document in documents}) > 1:  # of these only the fair score compares
        rows = {label: {name: x for name, x in row.items() if name != "crps"} for label, row in rows.items()}
    return "\n".join([f"protocol {first['protocol']['name']}, {first['windows']} windows", *_table(rows)])


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def _table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Rows of numbers under the names of their columns; a number that a row has not is left blank."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["", *names], *([label, *(_number(row.get(name, "")) for name in names)] for label, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    ]


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if value is None or value != value:
        return "undefined"
    return value if isinstance(value, str) else f"{value:.4g}"


def score_text(document: dict[str, Any], protocol: Protocol) -> str:
    """The scores of a score file as text, with the counts."""
    systems = document["scores"]
    lines = [
        f"{protocol.name}: {document['windows']:,} windows, independent events: {document['independent_events']:,}; "
        f"averages {protocol.average}; {protocol.missing}"
    ]
    rows = {system: dict(scores["summary"]) for system, scores in systems.items()}
    for system, scores in systems.items():
        rows[system] |= {"pixels": sum(scores["errors"]["pixels"])} if "errors" in scores else {}
    lines += _table(rows)
    for title, name in (("95 % intervals", "interval"), ("regions that share no pixel", "regions")):
        rows = {}
        for system, scores in systems.items():
            if name == "interval" and name in scores:
                ends = {n: interval or [None, None] for n, interval in scores[name].items()}
                rows[system] = {n: f"{_number(low)}..{_number(high)}" for n, (low, high) in ends.items()}
            elif name in scores:
                rows |= {f"{system}, {region}": row for region, row in scores[name].items()}
        lines += ["", title, *_table(rows)] if rows else []
    for family, names in threshold_names(protocol).items():
        tables = {system: scores[family] for system, scores in systems.items() if family in scores}
        if tables:
            lines += ["", "CSI, pooled", *_table({s: dict(zip(names, table["csi"])) for s, table in tables.items()})]
            lines += ["", "hits / misses / false alarms"]
            rows = {}
            for system, table in tables.items():
                counts = zip(*([f"{sum(row):,}" for row in table[count]] for count in COUNTS))
                rows[system] = dict(zip(names, map(" / ".join, counts)))
            lines += _table(rows)
    leads, unit = lead_times(protocol)
    for title, curves in curves_by_lead(document, protocol).items():
        names = [f"{lead:g}" for lead in leads]
        lines += ["", f"{title}, by lead time in {unit}"]
        lines += _table({system: dict(zip(names, values.tolist())) for system, values in curves.items()})
    if any("undefined" in line for line in lines):
        lines += ["", "undefined: nothing of the kind was observed or forecast"]
    return "\n".join(lines)


def threshold_names(protocol: Protocol) -> dict[str, list[str]]:
    """Family of counts -> its thresholds in words."""
    names = {"contingency": [f"{threshold:g}" for threshold in protocol.thresholds]}
    if protocol.physical_thresholds:
        units = data_extractor(protocol).physical_units
        names["contingency_physical"] = [f"{threshold:g} {units}" for threshold in protocol.physical_thresholds]
    return names


def lead_times(protocol: Protocol) -> tuple[np.ndarray, str]:
    """Lead time of each frame, and its unit."""
    step = builder_of(protocol.dataset).FACTS.time_step
    unit = {"m": "min", "M": "months", "D": "days", "s": "s"}[step[-1]]
    return int(step[:-1]) * protocol.frame_stride * np.arange(1, protocol.prediction_length + 1), unit


def curves_by_lead(document: dict[str, Any], protocol: Protocol) -> dict[str, dict[str, np.ndarray]]:
    """Name of a score -> system -> its value at each lead time, NaN where undefined."""
    curves: dict[str, dict[str, np.ndarray]] = {}

    def add(title: str, family: str, score: str, row: int | None = None):
        for system, scores in document["scores"].items():
            if family in scores and "reachable" not in system:
                values = np.array(scores[family][f"{score}_by_lead"], dtype="float64")
                curves.setdefault(title, {})[system] = values if row is None else values[row]

    family, names = list(threshold_names(protocol).items())[-1]  # in physical units if there are any
    for row, name in enumerate(names):
        add(f"CSI at {name}", family, "csi", row)
    add("mean squared error", "errors", "mse")
    add("fair CRPS", "ensemble", "fair_crps")
    add("spread / error", "ensemble", "spread_skill_ratio")
    add("correlation of the index", "nino34", "correlation")
    add("RMSE of the index", "nino34", "rmse")
    return curves


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def figures(
    document: dict[str, Any], forecasters: dict[str, Forecaster], windows: Windows, protocol: Protocol
) -> "dict[str, Figure]":
    """File name -> figure, of the scores that the document holds, and of the first system's cases."""
    systems = {name: scores for name, scores in document["scores"].items() if "reachable" not in name}
    leads, unit = lead_times(protocol)
    title = f"{protocol.name}, {document['windows']:,} windows"
    drawn = {"scores_by_lead": plotting.plot_by_lead(curves_by_lead(document, protocol), leads, unit, title)}

    spectra = {name: scores["spectrum"] for name, scores in systems.items() if "spectrum" in scores}
    if spectra:
        first = next(iter(spectra.values()))
        panels = {}
        for lead in (0, len(leads) - 1):
            power = {name: np.array(spectrum["forecast_power"], float)[lead] for name, spectrum in spectra.items()}
            observed = np.array(first["observed_power"], dtype="float64")[lead]
            panels[f"after {leads[lead]:g} {unit}"] = {"observed": observed} | power
        wavelength = 2 * len(first["wavenumber"]) / np.arange(1, len(first["wavenumber"]))
        drawn["spectrum"] = plotting.plot_spectrum(wavelength, panels, title)

    chances = {name: scores["probabilities"] for name, scores in systems.items() if "probabilities" in scores}
    if chances:
        panels = {}
        for row, threshold in enumerate(protocol.thresholds):
            panels[f"{threshold:g} or more"] = {
                name: (np.array(s["reliability"], float)[row], np.array(s["forecasts"])[row].sum(0))
                for name, s in chances.items()
            }
        drawn["reliability"] = plotting.plot_reliability(panels, title)

    ranks = {name: np.array(scores["ranks"]["ranks"]).sum(0) for name, scores in systems.items() if "ranks" in scores}
    if ranks:
        panels = {"all pixels": ranks}
        if protocol.wet_threshold is not None:
            wet = {name: np.array(systems[name]["ranks"]["ranks_wet"]).sum(0) for name in ranks}
            panels[f"wet pixels: observation or a member at {protocol.wet_threshold:g} or more"] = wet
        drawn["rank_histogram"] = plotting.plot_rank_histogram(panels, title)

    if document["cases"]:
        drawn["cases"] = _plot_cases(document["cases"], forecasters, windows, protocol, title)
    return drawn


def _plot_cases(cases: dict[str, int], forecasters, windows: Windows, protocol: Protocol, title: str) -> "Figure":
    """Observation and forecast of the first system, of three windows by its mean squared error."""
    extractor, (system, forecaster) = data_extractor(protocol), next(iter(forecasters.items()))
    leads, unit = lead_times(protocol)
    columns = np.unique(np.linspace(0, len(leads) - 1, 6).round().astype(int))
    rows = {}
    for case, number in cases.items():
        window = window_at(windows, number, extractor)
        forecast = np.ma.getdata(forecaster(window))
        forecast = forecast.mean(0) if forecast.ndim > window.future.ndim else forecast
        for label, frames in (("observed", window.future), (system, forecast)):
            frames = np.where(window.observed, frames, np.nan)[columns]
            frames = frames if frames.ndim == 3 else frames[..., -1]  # one channel: the last
            lat = window.event.get("geo", {}).get("lat")
            if lat is not None and lat[0] < lat[-1]:
                frames = frames[:, ::-1]  # north is up
            rows[f"{case}:\n{label}"] = extractor.to_physical(frames) if extractor.physical_table else frames
    names = [f"+{leads[column]:g} {unit}" for column in columns]
    units = extractor.physical_units or builder_of(protocol.dataset).FACTS.units
    return plotting.plot_sequence(rows, names, f"{title}: windows of lowest, median and highest error", units=units)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


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
    state = PartialState()
    forecasters: dict[str, Forecaster] = {}
    left_out: dict[str, str] = {}
    made_by: dict[str, Any] = {"command": command}
    loaded: Any = None
    extractor: Any = None
    if model is not None:
        folder, loaded, extractor = load_model(model)
        extractor = extractor or getattr(loaded, "feature_extractor", None)
        if extractor is None:
            raise ValueError(f"`model`: {model} has no feature extractor.")
        made_by |= {"model": str(model), "weights": digests(folder)}
        protocol = protocol or extractor.protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"`protocol` must be one of {sorted(PROTOCOLS)}, got {protocol!r}.")
    chosen = replace(PROTOCOLS[protocol], max_windows=max_windows)
    try:
        windows = protocol_windows(chosen, data_dir)
    except ValueError as reason:
        if data_dir is None:
            raise ValueError(f"{reason} Set EARTHFORMER_HF_DATA, or give `data_dir`.") from reason
        raise
    if isinstance(loaded, PreDiffPipeline):
        made_by |= {"num_inference_steps": num_inference_steps, "scheduler": type(loaded.scheduler).__name__}
        loaded.to(state.device, torch.float32)
        forecasters["model"] = pipeline_forecaster(loaded, ensemble_size, num_inference_steps)
    elif loaded is not None:
        forecasters["model"] = model_forecaster(loaded.eval().to(state.device), extractor)
    for name in chosen.baselines:
        try:
            load = partial(protocol_windows, chosen, data_dir)
            forecasters[name] = baseline_forecaster(name, chosen, load, ensemble_size)
        except ImportError as reason:
            left_out[name] = str(reason)
    settings = {name: f.setting for name, f in forecasters.items() if isinstance(f, OceanForecaster) and f.setting}
    made_by |= {"ensemble_size": ensemble_size, "chosen_on_validation": settings, "left_out": left_out}
    document = score_file(evaluate(forecasters, windows, chosen), chosen, **made_by)
    if not state.is_main_process:
        return None
    if output is not None:
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        write_score_file(document, output / "scores.json")
        for name, figure in figures(document, forecasters, windows, chosen).items():
            figure.savefig(output / f"{name}.png", dpi=110)
    notes = [f"{name}: left out, {reason}" for name, reason in left_out.items()]
    notes += [f"{name}: chosen on the validation split {setting}" for name, setting in settings.items()]
    return "\n".join([score_text(document, chosen), *notes])
