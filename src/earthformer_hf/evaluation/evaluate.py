"""The engine of evaluation: forecasts of a model and of baselines in, scores with their counts out.

    results = evaluate({"model": forecaster, ...}, windows, PROTOCOLS["radar-open"])
    results["scores"]["model"]["summary"]["csi_m"]

A *forecaster* is a function of a [`~earthformer_hf.evaluation.Window`], see `forecasters.py`. Every window is forecast
by one process; the sums that a score is made of are kept per event, added up over processes, and divided at the end.
[`run_protocol`] is what `earthformer-hf evaluate` calls.

What [`evaluate`] returns, and a score file holds:

- `data`: what the numbers are, [`~earthformer_hf.data.measures.DataFacts`];
- `scored`: the events, their times, and digests of the values;
- `windows`, `independent_events`: how many there are; `unobserved_windows`: how many windows have no observed context
  or future, and count for nothing;
- `cases`: the windows with the lowest, median and highest squared error of the first system;
- `fallbacks`: system -> for how many windows its method could not be run;
- `headline_thresholds`: system -> mean over thresholds -> those that it is over, where not all;
- `draws`, `differences`, with `MIN_EVENTS_FOR_INTERVAL` independent events or more: the headline scores of draws of
  events; and the first system's scores minus those of each other one, with an interval;
- `scores`: system -> `summary`, the headline scores; `interval` of each or, with fewer events, summaries of `regions`
  that share no pixel; and scores and counts of each family.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from transformers.utils import logging

from ..data import Windows
from ..data.measures import DataFacts
from ..sharing.files import check_writable, digests
from .data_facts import check_model, check_scores, facts_of
from .forecasters import (
    Forecaster,
    LoadedModel,
    OceanForecaster,
    data_extractor,
    load_forecaster,
    protocol_baselines,
    protocol_windows,
    window_at,
    window_lengths,
)
from .own_protocol import find_protocol
from .protocols import Protocol
from .reports import score_file, score_text, update_card, write_report
from .stored import StoredForecasts
from .tally import Tally, differences, interval


MIN_EVENTS_FOR_INTERVAL = 10  # independent events; an interval of fewer would mean nothing


def evaluate(forecasters: dict[str, Forecaster], windows: Windows, protocol: Protocol) -> dict[str, Any]:
    """Score forecasts of every window, on as many processes as there are.

    Args:
        forecasters: by name. Of the first one, the best, median and worst cases are found. A forecaster may return a
            masked array whose masked pixels it could not reach, such as those into which rain moves from outside the
            frame. They are scored like all others, and all systems once more on the pixels that every one reached.
        windows: of [`protocol_windows`], or of other events in the same units.
        protocol: what to score.

    Returns:
        The results that the top of this file lists, the same on every process.

    Raises:
        ValueError: lengths that are not the protocol's, scores that it cannot have, events of several units, time
            steps or grid spacings, or a forecast that is not finite.
    """
    lengths = windows.context_length, windows.length - windows.context_length
    if lengths != window_lengths(protocol):
        raise ValueError(
            f"`windows` must be of {window_lengths(protocol)} frames for {protocol.name!r}, got {lengths}."
        )
    facts = facts_of(windows, protocol)
    check_scores(windows, facts, protocol)
    if protocol.physical_thresholds:
        data_extractor(protocol).from_physical(protocol.physical_thresholds)
    tally = _tally(forecasters, windows, protocol)
    units, regions = tally.units(), tally.regions()
    scores: dict[str, dict[str, Any]] = {system: {"summary": tally.summary(system)} for system in tally.shapes}
    thresholds = {system: tally.headline_thresholds(system) for system in tally.shapes}
    paired: dict[str, Any] = {}
    if len(units) >= MIN_EVENTS_FOR_INTERVAL:
        draws = {system: tally.draws(system) for system in tally.shapes}
        for system, drawn in draws.items():
            scores[system]["interval"] = {name: interval(values) for name, values in drawn.items()}
        paired = {"draws": draws, "differences": _differences(scores, draws, thresholds)}
    elif len(regions) > 1:
        for system in tally.shapes:
            scores[system]["regions"] = {event: tally.summary(system, event) for event in regions}
    for system in tally.shapes:
        scores[system] |= tally.scores(system)
    ordered = sorted(tally.errors, key=lambda index: (tally.errors[index], index))
    cases = {"best": ordered[0], "median": ordered[len(ordered) // 2], "worst": ordered[-1]} if ordered else {}
    return {
        "data": asdict(facts),
        "scored": tally.scored(),
        "windows": len(tally.windows),
        "unobserved_windows": len(tally.empty),
        "independent_events": len(units),
        "cases": cases,
        "fallbacks": {system: len(missed) for system, missed in tally.fallbacks.items()},
        "headline_thresholds": {system: chosen for system, chosen in thresholds.items() if chosen},
        **paired,
        "scores": scores,
    }


def _tally(forecasters: dict[str, Forecaster], windows: Windows, protocol: Protocol) -> Tally:
    """The sums over all windows, or as many as the protocol has, of all processes."""
    state, extractor, tally = PartialState(), data_extractor(protocol), Tally(protocol)
    indices: Any = range(len(windows))
    if protocol.max_windows is not None and protocol.max_windows < len(windows):
        indices = np.linspace(0, len(windows) - 1, protocol.max_windows).round().astype(int).tolist()
    of_this_process = indices[state.process_index :: state.num_processes]
    for index in logging.tqdm(of_this_process, desc=protocol.name, disable=not state.is_main_process):
        window = window_at(windows, index, extractor)
        tally.see(window, windows.frame_stride)
        forecasts = {system: forecaster(window) for system, forecaster in forecasters.items()}
        reached = window.observed
        for forecast in forecasts.values():
            if isinstance(forecast, np.ma.MaskedArray):
                reached = reached & ~np.ma.getmaskarray(forecast)
        for system, forecast in forecasts.items():
            tally.add(system, np.ma.getdata(forecast), window, window.observed)
        families = tuple(family for family in ("contingency", "errors") if family in protocol.scores)
        if reached is not window.observed and families:
            for system, forecast in forecasts.items():
                tally.add(f"{system}, reachable pixels", np.ma.getdata(forecast), window, reached, families)
    for system, forecaster in forecasters.items():
        if hasattr(forecaster, "fallbacks"):
            tally.fallbacks[system] = set(forecaster.fallbacks)
    return tally.gather()


def _differences(
    scores: dict[str, dict[str, Any]], draws: dict[str, dict[str, np.ndarray]], thresholds: dict[str, Any]
) -> dict[str, dict[str, list[float | None]]]:
    """ "first - other" -> score -> the difference and the ends of its interval; on reachable pixels, of those."""
    found = {}
    first = next(iter(scores), "")
    for base in (first, f"{first}, reachable pixels"):
        for other in (name for name in scores if name != base and ("reachable" in name) == ("reachable" in base)):
            pair = base, other
            found[f"{base} - {other}"] = differences(
                [scores[system]["summary"] for system in pair],
                [draws[system] for system in pair],
                [thresholds[system] for system in pair],
            )
    return found


def run_protocol(
    model: str | Path | None = None,
    protocol: str | None = None,
    data_dir: str | Path | None = None,
    ensemble_size: int = 8,
    num_inference_steps: int = 10,
    max_windows: int | None = None,
    output: str | Path | None = None,
    command: str = "",
    show: Callable[[str], object] | None = None,
    card: bool = False,
    further_baselines: Sequence[str] = (),
) -> str | None:
    """Score a model beside the protocol's baselines, on as many processes as there are.

    Args:
        model: a folder or a hub id; or a `.zarr` store of an archive's forecasts, of which the windows that it holds
            are scored; baselines only if omitted.
        protocol: a name of `PROTOCOLS`, or a YAML file ([`~earthformer_hf.evaluation.load_protocol`]); the one that
            the model's feature extractor names if omitted.
        data_dir: the folder of the data; EARTHFORMER_HF_DATA (default ../shared/data) if omitted.
        ensemble_size, num_inference_steps: members, of baselines that are ensembles too; and steps of a pipeline.
        max_windows: see [`Protocol`]; the protocol's if omitted.
        output: a folder for `scores.json` and the figures.
        command: what was typed, for the score file.
        show: takes the scores as text before anything is written, so that a full disk does not lose them.
        card: whether `scores.json` is written into the model's folder too, and its summary into the card there.
        further_baselines: names of baselines to score beside the protocol's; the model's scores are what they are.

    Returns:
        The scores as text; None on all processes but the main one.

    Raises:
        ValueError: before anything is forecast: no such protocol, data that are missing or crafted, a baseline that
            cannot work on them, a model of another unit, time step or grid spacing, an `output` that is not writable.
    """
    forecasters, made_by = dict[str, Forecaster](), dict[str, Any](command=command)
    is_store = str(model).rstrip("/").endswith(".zarr")
    loaded = None if model is None or is_store else load_forecaster(model, ensemble_size, num_inference_steps)
    chosen = find_protocol(protocol or (loaded.extractor.protocol if loaded else None))
    chosen = replace(chosen, max_windows=chosen.max_windows if max_windows is None else max_windows)
    windows, facts = _windows_and_facts(chosen, data_dir)
    if model is not None:
        forecasters["model"], known = _scored(model, loaded, windows, facts, chosen)
        made_by |= {"model": str(model)} | known
    baselines, left_out = protocol_baselines(chosen, data_dir, ensemble_size, facts, further_baselines)
    best_settings = {name: f.setting for name, f in baselines.items() if isinstance(f, OceanForecaster) and f.setting}
    made_by |= {"ensemble_size": ensemble_size, "chosen_on_validation": best_settings, "left_out": left_out}
    forecasters |= baselines
    if not forecasters:
        raise ValueError(f"`protocol`: {chosen.name!r} has nothing to score; name `baselines`, or give a model.")
    if card:
        _check_card(model, chosen)
    if output is not None:
        check_writable(output)
    document = score_file(evaluate(forecasters, windows, chosen), chosen, **made_by)
    if not PartialState().is_main_process:
        return None
    notes = [f"{name}: left out, {reason}" for name, reason in left_out.items()]
    notes += [f"{name}: chosen on the validation split {setting}" for name, setting in best_settings.items()]
    text = "\n".join([score_text(document, chosen), *notes])
    if show is not None:
        show(text)
    if card:
        update_card(Path(str(model)), document)
    if output is not None:
        write_report(Path(output), document, forecasters, windows, chosen)
    return text


def _check_card(model: str | Path | None, protocol: Protocol) -> None:
    """
    Raises:
        ValueError: the model is no folder with a card that can be written, or only some windows are to be scored.
    """
    folder = Path(str(model))
    if model is None or not (folder / "README.md").is_file():
        raise ValueError(f"`card` needs a `model` that is a folder with a card, README.md, got {str(model)!r}.")
    if protocol.max_windows is not None:
        raise ValueError("`card` tells scores of all windows: leave out `max_windows`.")
    check_writable(folder)


def _scored(
    model: str | Path, loaded: LoadedModel | None, windows: Windows, facts: DataFacts, protocol: Protocol
) -> tuple[Forecaster, dict[str, Any]]:
    """The forecaster of a model or, if none is loaded, of a store, to whose forecasts the windows are restricted; and
    what the score file tells of it."""
    if loaded is None:
        stored = StoredForecasts(model, protocol, facts)
        protocol.families_of("ensemble" if stored.is_ensemble else "maps", f"the forecasts of {model}")
        stored.restrict(windows)
        return stored, {"forecasts": stored.made_by}
    check_model(loaded.extractor, facts, protocol)
    protocol.families_of("ensemble" if loaded.settings else "maps", f"the model {model}")
    return loaded.forecaster, {"weights": digests(loaded.folder)} | loaded.settings


def _windows_and_facts(protocol: Protocol, data_dir: str | Path | None) -> tuple[Windows, DataFacts]:
    try:
        windows = protocol_windows(protocol, data_dir)
    except ValueError as reason:
        if data_dir is None:
            raise ValueError(f"{reason} Set EARTHFORMER_HF_DATA, or give `data_dir`.") from reason
        raise
    return windows, facts_of(windows, protocol)


__all__ = ["MIN_EVENTS_FOR_INTERVAL", "evaluate", "run_protocol"]
