"""Run a protocol: forecasts of a model and of simple methods, as scores with their counts, and as text."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers.utils import logging

from . import baselines
from .benchmark_metrics import correlation_by_lead, rmse_by_lead
from .data.open_radar import rain_rate, stored_code
from .data.open_sst import nino34, three_month_means
from .data.windows import Windows
from .metrics import ContingencyScores, EnsembleScores, ErrorScores


@torch.no_grad()
def forecast_windows(model, windows: Windows, batch_size: int = 4) -> Iterator[np.ndarray]:
    """Predictions in the model's range (T_out, H, W), one by one in the order of the windows."""
    for batch in logging.tqdm(DataLoader(windows, batch_size), desc="forecast"):
        yield from model(batch["past_values"].to(model.device)).predictions[..., 0].float().cpu().numpy()


def score_rain(
    model, extractor, windows: Windows, with_extrapolation: bool = False
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Forecast every window with the model and without it.

    Args:
        model, extractor: what `from_pretrained` gives; the extractor needs `fill_value` and `physical_table`.
        windows: not augmented.
        with_extrapolation: needs the extra `optical-flow`; also scores what it could reach from within the frame.

    Returns:
        system -> {"code": [`ContingencyScores`] at `extractor.thresholds`, "physical": at
        `extractor.physical_thresholds`, "errors": [`ErrorScores`] of code / 255}.
    """
    past_length, length = windows.context_length, windows.length - windows.context_length
    systems: dict[str, dict[str, ContingencyScores | ErrorScores]] = {}

    def update(system, code, target, observed):
        if system not in systems:
            systems[system] = {
                "code": ContingencyScores(extractor.thresholds, length),
                "physical": ContingencyScores(extractor.from_physical(extractor.physical_thresholds), length),
                "errors": ErrorScores(length, value_range=255),
            }
        for scores in systems[system].values():
            scores.update(code, target, observed)

    for item, predictions in enumerate(forecast_windows(model, windows)):
        raw = windows.raw(item)
        observed = extractor.observed(raw)
        code = _filled(extractor, raw)
        target, mask = code[past_length:], observed[past_length:]
        model_code = extractor.decode(predictions)
        update("model", model_code, target, mask)
        update("persistence", baselines.persistence(code[:past_length], len(target)), target, mask)
        if with_extrapolation:
            rain, reachable = baselines.extrapolation(extractor.to_physical(code[:past_length]), len(target))
            # to half a dB, as the data are coded
            moved = np.round(extractor.from_physical(rain_rate(stored_code(rain))))
            update("extrapolation", moved, target, mask)
            update("model, reachable pixels", model_code, target, mask & reachable)
            update("extrapolation, reachable pixels", moved, target, mask & reachable)
    return {system: {kind: score.compute() for kind, score in scores.items()} for system, scores in systems.items()}


def rain_table(systems: dict[str, dict[str, dict[str, np.ndarray]]], extractor, score_name: str, minutes: int) -> str:
    """The scores as text: at the codes' thresholds, and at rain rates by lead time; `minutes` is the time step."""
    lines = [f"{score_name}, and MSE of code / 255"]
    thresholds = "".join(f"{f'CSI-{threshold:g}':>9s}" for threshold in extractor.thresholds)
    lines.append(f"{'':32s}{'CSI-M':>8s}{'MSE':>10s}{thresholds}{'pixels':>11s}{'windows':>9s}")
    for system, scores in systems.items():
        csi, errors = scores["code"]["csi"], scores["errors"]
        by_threshold = "".join(f"{value:9.4f}" for value in csi)
        counts = f"{errors['pixels'].sum():11d}{errors['windows']:9d}"
        lines.append(f"{system:32s}{csi.mean():8.4f}{errors['mse']:10.6f}{by_threshold}{counts}")
    if any(np.isnan(scores["code"]["csi"]).any() for scores in systems.values()):
        lines.append("nan: rain that heavy was neither observed nor forecast; its CSI, and so the mean, is undefined")
    lines += ["", "CSI at rain rates, by lead in minutes"]
    leads = next(iter(systems.values()))["physical"]["csi_by_lead"].shape[1]
    lines.append(" " * 43 + "".join(f"{minutes * (i + 1):6d}" for i in range(leads)))
    for system, scores in systems.items():
        for rate, values in zip(extractor.physical_thresholds, scores["physical"]["csi_by_lead"]):
            name = f"{rate:g} {extractor.physical_units}"
            lines.append(f"{system:32s}{name:>11s}" + "".join(f"{value:6.3f}" for value in values))
    lines += ["", "hits / misses / false alarms, pooled over lead times"]
    for system, scores in systems.items():
        named = [
            ("code", "code", extractor.thresholds),
            ("physical", extractor.physical_units, extractor.physical_thresholds),
        ]
        for kind, unit, values in named:
            for i, value in enumerate(values):
                names = ("hits", "misses", "false_alarms")
                parts = " / ".join(f"{scores[kind][name][i].sum():d}" for name in names)
                lines.append(f"{system:32s}{f'{value:g} {unit}':>11s}  {parts}")
    return "\n".join(lines)


def forecast_ensembles(
    pipeline, windows: Windows, ensemble_size: int, num_inference_steps: int, batch_size: int = 2, seed: int = 0
) -> Iterator[np.ndarray]:
    """Ensembles of a [`PreDiffPipeline`] in stored units (E, T_out, H, W), in the order of the windows."""
    pipeline.set_progress_bar_config(disable=True)
    for number, batch in enumerate(logging.tqdm(DataLoader(windows, batch_size), desc="ensembles")):
        ensembles = pipeline(
            batch["past_values"],
            ensemble_size=ensemble_size,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed + number),
        ).predictions[..., 0]
        yield from pipeline.feature_extractor.decode(ensembles)


def dressed_ensembles(windows: Windows, train_windows: Windows, ensemble_size: int, extractor) -> Iterator[np.ndarray]:
    """Dressed persistence in stored units, with errors of training windows that are drawn anew for each window."""
    random, past = np.random.default_rng(0), windows.context_length
    for item in range(len(windows)):
        errors = []
        for other in random.integers(len(train_windows), size=ensemble_size):
            raw = train_windows.raw(int(other))
            known = extractor.observed(raw)
            errors.append(np.where(known[past:] & known[past - 1], raw[past:].astype("float64") - raw[past - 1], 0.0))
        yield baselines.dressed_persistence(_filled(extractor, windows.raw(item))[:past], np.stack(errors))


def steps_ensembles(windows: Windows, ensemble_size: int, extractor) -> Iterator[np.ndarray]:
    """Ensembles of STEPS in stored units; needs the extra `optical-flow`."""
    minutes = windows.events[0]["geo"]["minutes"] * windows.frame_stride
    kilometers = float(extractor.grid_spacing.split()[0])
    past = windows.context_length
    for item in logging.tqdm(range(len(windows)), desc="STEPS"):
        rain = extractor.to_physical(_filled(extractor, windows.raw(item))[:past])
        ensemble = baselines.steps_ensemble(rain, windows.length - past, ensemble_size, minutes, kilometers, item)
        yield np.round(extractor.from_physical(ensemble))


def _filled(extractor, raw: np.ndarray) -> np.ndarray:
    return np.where(extractor.observed(raw), raw, extractor.fill_value).astype("float64")


def score_ensembles(
    systems: dict[str, Iterator[np.ndarray]], windows: Windows, extractor
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Score ensembles (E, T_out, H, W) in stored units, given in the order of the windows, where it was observed.

    Returns:
        system -> {"ensemble": [`EnsembleScores`] of code / 255; of the ensemble's mean "code": [`ContingencyScores`]
        at `extractor.thresholds`, and "errors": [`ErrorScores`] of code / 255}.
    """
    length, scores = windows.length - windows.context_length, {}
    for system, ensembles in systems.items():
        of_ensemble = EnsembleScores(length, value_range=255)
        of_mean = {
            "code": ContingencyScores(extractor.thresholds, length),
            "errors": ErrorScores(length, value_range=255),
        }
        for item, ensemble in enumerate(ensembles):
            target = windows.raw(item)[windows.context_length :]
            observed = extractor.observed(target)
            of_ensemble.update(ensemble, target, observed)
            for score in of_mean.values():
                score.update(ensemble.mean(0), target, observed)
        scores[system] = {"ensemble": of_ensemble.compute()}
        scores[system] |= {kind: score.compute() for kind, score in of_mean.items()}
    return scores


def ensemble_table(scores: dict[str, dict[str, dict[str, np.ndarray]]], score_name: str, minutes: int) -> str:
    """The scores as text; `minutes` is the time step."""
    leads = len(next(iter(scores.values()))["ensemble"]["fair_crps_by_lead"])
    lines = [f"{score_name}; CSI-M and MSE of the ensemble's mean"]
    by_lead = "".join(f"{minutes * (lead + 1):>5d} min" for lead in range(leads))
    lines.append(
        f"{'':22s}{'fair CRPS':>10s}{'CSI-M':>8s}{'MSE':>10s}{'pixels':>11s}{'windows':>9s}  CRPS at{by_lead}"
    )
    for system, score in scores.items():
        ensemble, errors = score["ensemble"], score["errors"]
        by_lead = "".join(f"{value:9.5f}" for value in ensemble["fair_crps_by_lead"])
        lines.append(
            f"{system:22s}{ensemble['fair_crps']:10.6f}{score['code']['csi'].mean():8.4f}{errors['mse']:10.6f}"
            f"{errors['pixels'].sum():11d}{errors['windows']:9d}         {by_lead}"
        )
    return "\n".join(lines)


def score_index(
    model, extractor, event: dict, train_event: dict | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Forecast Nino3.4 over every window of an event, with the model and without it.

    Args:
        model, extractor: what `from_pretrained` gives.
        event: a record of months, see `earthformer_hf.data`; its `geo` holds `lat`.
        train_event: the record on which the statistical forecasts are fitted; without it only persistence is made.

    Returns:
        system -> three-month means of the index (windows, leads) in degrees Celsius; and the observed ones.
    """
    lengths = model.config.context_length, model.config.prediction_length
    test = baselines.OceanRecord(event, nino34, *lengths)
    ocean = extractor.observed(event["values"]).all(0)
    maps = np.stack(
        [extractor.decode(x) for x in forecast_windows(model, Windows([event], extractor.encode, *lengths))]
    )
    index = nino34(np.where(ocean, maps, np.nan).astype("float64"))
    systems = {"model": three_month_means(index), "persistence": baselines.persisted_index(test)}
    if train_event is not None:
        train, lat = baselines.OceanRecord(train_event, nino34, *lengths), event["geo"]["lat"]
        systems["damped persistence"] = baselines.damped_persistence(train, test)
        systems["linear inverse model"] = baselines.linear_inverse_model(train, test, lat)
        systems["seasonal ridge"] = baselines.seasonal_ridge(train, test, lat)
    return systems, test.targets()


def index_table(systems: dict[str, np.ndarray], targets: np.ndarray, score_name: str) -> str:
    """The scores as text: correlation and RMSE averaged over leads, and correlation by lead."""
    leads = "".join(f"{lead:6d}" for lead in range(1, targets.shape[1] + 1))
    lines = [f"{score_name}; RMSE in degC", f"{'':22s}{'skill':>8s}{'RMSE':>8s}{'windows':>9s}  by lead{leads}"]
    for system, forecast in systems.items():
        skill, error = correlation_by_lead(forecast, targets), rmse_by_lead(forecast, targets)
        by_lead = "".join(f"{value:6.2f}" for value in skill)
        lines.append(f"{system:22s}{skill.mean():8.3f}{error.mean():8.3f}{len(targets):9d}         {by_lead}")
    return "\n".join(lines)
