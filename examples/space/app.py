"""The demo: choose a storm or upload files, and look at the forecast. README.md says how it becomes a Space.

    make demo-space
    EARTHFORMER_HF_MODELS=you/an-ensemble,models/mine python app.py    # hub ids or folders

```
storm, or files: bounded, checked -> observe -> forecast -> animation, chances, members, scores, NetCDF
```
"""

import functools
import html
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import numpy as np
from xarray import DataArray, Dataset

from earthformer_hf import EarthformerFeatureExtractor
from earthformer_hf.data.file_times import parsed_step
from earthformer_hf.data.guards import check_files
from earthformer_hf.data.inputs import rain_input
from earthformer_hf.data.measures import parsed_spacing
from earthformer_hf.data.open_radar import OpenRadar
from earthformer_hf.errors import ends_in_one_line, one_line
from earthformer_hf.evaluation.metrics import ContingencyScores, EnsembleScores, ErrorScores
from earthformer_hf.forecasting import describe, forecast, observe, observed_maps, save
from earthformer_hf.forecasting.grids import coarsening
from earthformer_hf.forecasting.nowcasters import Nowcaster, load_nowcaster
from earthformer_hf.plotting import animate_forecast, plot_forecast
from earthformer_hf.sharing.loading import has_weights


STORM, FILES = "a storm", "files of mine"
STORMS = 4
MEMBERS, MOST_MEMBERS = 8, 16
STEPS, MOST_STEPS = 5, 20  # with 5, eight members of a tile take less than 15 s on two cores
THRESHOLDS = (0.5, 1.0, 2.0, 5.0, 10.0)  # mm/h
ABOUT = {"units": "mm/h", "time_step": "5m", "grid_spacing": "1 km", "start": "2020-06-01T12:00"}  # and an example
MAX_UPLOAD = 32 * 2**20  # bytes of all files
MAX_CELLS, MAX_MEMORY = 400 * 400, "500MB"  # of the model's grid; of a forecast
INTRODUCTION = """# Rain, forecast by Earthformer and PreDiff
Choose a storm or upload radar rain, and see how it may go on: as one future, or as an ensemble. The models are small
and were trained on little data: this is no operational nowcast."""
ABOUT_FILES = f"""NetCDF, or a GeoTIFF for each time: rain in mm/h, mm, mm/day or dBZ, up to {MAX_UPLOAD >> 20} MB.
Finer grids are averaged to the model's spacing; frames of other times are moved along the motion between two."""
GUIDANCE = "Asks for mean rain that changes by n standard deviations more than usual: slower. 0 asks for nothing."
CSS = """@media (max-width: 640px) {
    .picture .image-frame { overflow-x: auto; display: block; padding-top: 2.5rem }
    .picture img { max-width: none; width: auto; height: auto; zoom: 0.55 }
}"""
LAUNCH: dict[str, Any] = {"css": CSS, "max_file_size": MAX_UPLOAD, "ssr_mode": False, "footer_links": ["gradio"]}
LAUNCH |= {"state_session_capacity": 100}


@dataclass
class Result:
    """A forecast, what was observed, and the folder of its files, which is removed together with it."""

    dataset: Dataset
    observed: DataArray | None
    folder: TemporaryDirectory = field(default_factory=lambda: TemporaryDirectory(prefix="forecast-"))

    def path(self, name: str) -> str:
        return str(Path(self.folder.name) / name)


# -- models and storms ------------------------------------------------------------------------------------------------


def load_models() -> dict[str, Nowcaster]:
    """Name -> model of rain, ensembles first: of the folders and hub ids in the environment variable
    `EARTHFORMER_HF_MODELS`, or else of the folders with weights below `model_cards/`.

    Raises:
        ValueError: a name that is no model, or no model of rain among them.
    """
    names = [name.strip() for name in os.environ.get("EARTHFORMER_HF_MODELS", "").split(",") if name.strip()]
    names = names or [str(folder) for folder in sorted(Path("model_cards").glob("*")) if has_weights(folder)]
    models = {name: load_nowcaster(name, device="auto") for name in names}
    models = {name: model for name, model in models.items() if describe(model)["forecasts"] == "rain rate"}
    if not models:
        raise ValueError("no model of rain in model_cards/; list folders or hub ids in EARTHFORMER_HF_MODELS.")
    return dict(sorted(models.items(), key=lambda item: not item[1].makes_ensembles))


def can_be_guided(model: Nowcaster) -> bool:
    """Whether a model has an alignment network that knows the usual change."""
    try:
        load_nowcaster(model, guide="change=0sigma")
    except ValueError:
        return False
    return True


@functools.lru_cache
def storms(time_step: str) -> tuple[str, dict[str, DataArray]]:
    """What they are, in words, and some from wet to dry, of a time step that suits a model's: of the open radar data
    where they are at hand, else simulated."""
    coding = EarthformerFeatureExtractor(**OpenRadar.FACTS.feature_extractor, time_step=time_step)
    label, events = rain_input(None, coding)
    if np.isnat(events[0]["time"][0]):
        label += ", dates unknown: counted from 2000"
    ranked = sorted(events, key=lambda event: -float(coding.encode(np.asarray(event["values"]))[0].mean()))
    chosen = ranked[:: -(-len(ranked) // STORMS)]
    return label, {f"storm {number}": rain_of(event, coding) for number, event in enumerate(chosen, start=1)}


def rain_of(event: dict, coding: EarthformerFeatureExtractor) -> DataArray:
    """Rain in mm/h (time, y, x), the north above, of an event in codes."""
    codes, time = np.asarray(event["values"]), np.asarray(event["time"], "datetime64[ns]")
    if np.isnat(time).any():
        time = np.datetime64("2000-01-01", "ns") + np.timedelta64(event["geo"]["minutes"], "m") * np.arange(len(codes))
    axes: dict[str, Any] = {"time": time}
    spacing = 1000 * parsed_spacing(coding.grid_spacing)[0]
    for name, size, sign in (("y", codes.shape[1], -1), ("x", codes.shape[2], 1)):
        attributes = {"units": "m", "standard_name": f"projection_{name}_coordinate"}
        axes[name] = (name, spacing * np.arange(size)[::sign], attributes)
    rain = np.where(coding.observed(codes), coding.to_physical(codes), np.nan)
    return DataArray(rain.astype("float32"), axes, ("time", "y", "x"), "rain", {"units": "mm/h"})


# -- forecasts, their scores and pictures -----------------------------------------------------------------------------


def forecast_files(
    paths: Sequence[str] | None, model: Nowcaster, hold_back: bool, options: dict, about: dict
) -> Result:
    """The forecast of uploaded files, checked as the service checks them; arguments as of [`forecast_rain`].

    Raises:
        ValueError: no files, too large ones, or such as cannot be used; see also [`forecast_rain`].
    """
    if not paths:
        raise ValueError("choose a file first.")
    if sum(Path(path).stat().st_size for path in paths) > MAX_UPLOAD:
        raise ValueError(f"the files are larger than {MAX_UPLOAD >> 20} MB together.")
    with TemporaryDirectory(prefix="upload-", ignore_cleanup_errors=True) as folder:
        try:
            copies = [shutil.copy(path, Path(folder) / Path(path).name) for path in paths]
            if len(set(copies)) < len(paths):
                raise ValueError("two files have the same name.")
            for path, problem in check_files(copies).items():
                raise ValueError(f"{path} {problem}.")
            given = {name: text.strip() for name, text in about.items() if text and text.strip()}
            given["cache_dir"] = str(Path(folder) / ".tables")
            return forecast_rain([str(path) for path in copies], model, hold_back, options, given)
        except ValueError as reason:
            raise ValueError(str(reason).replace(f"{folder}/", "")) from reason


def forecast_rain(data: Any, model: Nowcaster, hold_back: bool, options: dict, about: dict) -> Result:
    """The forecast of rain on any grid.

    Args:
        data, about: see [`~earthformer_hf.forecasting.observe`].
        hold_back: forecast from so early a time that the last frame is of the longest lead.
        options: `members`, `steps` and `sigma`, of ensembles.

    Raises:
        ValueError: see [`~earthformer_hf.forecasting.forecast`]; more than `MAX_CELLS` cells of the model's grid.
    """
    observations, extractor = observe(data, **about), model.extractor
    if hold_back:
        ahead = model.prediction_length * parsed_step(extractor.time_step)
        observations = observations.until(observations.time[-1] - ahead)
    cells = np.prod(observations.grid.shape) / coarsening(observations.grid, extractor.grid_spacing) ** 2
    if cells > MAX_CELLS:
        raise ValueError(f"the map has {cells:.0f} cells of {extractor.grid_spacing}, at most {MAX_CELLS} are taken.")
    asked: dict[str, Any] = {"coarsen_to": extractor.grid_spacing, "resample_time": extractor.time_step}
    if model.makes_ensembles:
        asked |= {"ensemble_size": int(options["members"]), "num_inference_steps": int(options["steps"])}
        asked |= {"mean": True, "thresholds": THRESHOLDS}
        if options["sigma"] and can_be_guided(model):
            asked["guide"] = f"change={options['sigma']:+g}sigma"
    dataset = forecast(model, observations, max_memory=MAX_MEMORY, **asked)
    return Result(dataset, observed_maps(dataset, observations))


def scores(result: Result, threshold: float) -> str:
    """A table of scores, and those of persistence, if what followed is known."""
    dataset, observed, rain = result.dataset, result.observed, result.dataset["rainfall_rate"]
    best = dataset["rainfall_rate_mean"] if "realization" in rain.dims else rain  # (T, y, x)
    if observed is None or not {"time"} <= set(dataset.coords) & set(observed.coords):
        return "Without dates there is nothing to score."
    near = {"method": "nearest", "tolerance": dataset["lead_time"].values[0] / 4}
    known = observed.reindex(time=dataset["time"].values, **near)
    if known.shape != best.shape:
        return "The grid is too fine to score here."
    last = observed.sel(time=slice(None, dataset["forecast_reference_time"].values))[-1]
    persistence = np.tile(last.values, (len(known), 1, 1))
    seen = np.isfinite(known.values) & np.isfinite(best.values) & np.isfinite(persistence)
    if not seen.any():
        return "What followed is not known, so there is nothing to score."
    lines = [f"| | mean absolute error, mm/h | CSI at {threshold:g} mm/h |", "|---|---|---|"]
    rows = {"forecast" if best is rain else "mean of members": best.values, "persistence": persistence}
    for name, values in rows.items():
        error, events = ErrorScores(len(known)), ContingencyScores([threshold], len(known))
        for metric in (error, events):
            metric.update(values, known.values, seen)
        lines.append(f"| {name} | {error.compute()['mae']:.3f} | {events.compute()['csi'][0]:.3f} |")
    if best is not rain:
        ensemble = EnsembleScores(len(known))
        ensemble.update(rain.values, known.values, seen)
        found = ensemble.compute()
        lines += ["", f"Fair CRPS of the members: {found['fair_crps']:.3f} mm/h. It compares with the mean absolute "]
        lines[-1] += f"error of persistence. Spread-skill ratio: {found['spread_skill_ratio']:.2f}, 1 is best."
    return "\n".join([*lines, "", "One storm says little; the models' cards have scores of many."])


def animation(result: Result, threshold: float) -> str:
    path, dataset = result.path("forecast.gif"), result.dataset
    chosen = {"threshold": [threshold]} if "threshold" in dataset.dims else {}
    animate_forecast(dataset.sel(chosen), path, result.observed)
    return path


def chance_map(result: Result, threshold: float) -> str | None:
    if "threshold" not in result.dataset.dims:
        return None
    path = result.path("chance.png")
    plot_forecast(result.dataset, threshold=threshold).savefig(path)
    return path


def maps(result: Result, lead: str) -> str:
    """All members at one lead; of a model that makes one forecast, all leads."""
    path, dataset = result.path("maps.png"), result.dataset.drop_dims("threshold", errors="ignore")
    plot_forecast(dataset, result.observed, lead=lead if "realization" in dataset.dims else None).savefig(path)
    return path


# -- the page ---------------------------------------------------------------------------------------------------------


def says_why(function: Callable) -> Callable:
    """A bad choice or file becomes a message of one line on the page; before the first forecast nothing changes."""

    @functools.wraps(function)
    def run(first: Any, *others: Any) -> Any:
        try:
            return gr.skip() if first is None else function(first, *others)
        except (ValueError, OSError) as reason:
            raise gr.Error(html.escape(one_line(reason), quote=False), print_exception=False) from reason

    return run


def suited(model: Nowcaster) -> list[dict[str, Any]]:
    """Properties of the components that depend on the model: itself, storm, members, steps, sigma."""
    facts, (label, known) = describe(model), storms(model.extractor.time_step)
    storm = {"choices": list(known), "value": next(iter(known))}
    storm["info"] = f"{label}. From wet to dry; what followed is known, and compared."
    of_ensembles = {"visible": model.makes_ensembles}
    about = {"info": f"Takes {facts['takes']}. Gives {facts['gives']}."}
    return [about, storm, of_ensembles, of_ensembles, {"visible": can_be_guided(model)}]


def controls(models: dict[str, Nowcaster]) -> tuple[list, list, list]:
    """What a visitor chooses: model, storm, members, steps, sigma; source, files, whether to hold back; `ABOUT`."""
    model, storm, members, steps, sigma = suited(next(iter(models.values())))
    names = [(each.identity["model_id"], name) for name, each in models.items()]
    chosen = [gr.Dropdown(names, value=names[0][1], label="Model", **model)]
    source = gr.Radio([STORM, FILES], value=STORM, label="Forecast")
    chosen.append(gr.Dropdown(label="Storm", **storm))
    with gr.Column(visible=False) as upload:
        files = gr.File(label="Files", file_count="multiple", file_types=[".nc", ".nc4", ".tif", ".tiff"], height=140)
        gr.Markdown(ABOUT_FILES)
        hold_back = gr.Checkbox(label="Hold back the last frames, to compare the forecast with them")
        with gr.Accordion("What the files do not say", open=False):
            about = [gr.Textbox(label=name.replace("_", " "), placeholder=text) for name, text in ABOUT.items()]
    chosen.append(gr.Slider(2, MOST_MEMBERS, MEMBERS, step=1, label="Members", **members))
    chosen.append(gr.Slider(1, MOST_STEPS, STEPS, step=1, label="Denoising steps", **steps))
    chosen.append(gr.Slider(-4, 4, 0, step=0.5, label="Guidance by n sigma", info=GUIDANCE, **sigma))
    visible = [lambda choice, each=each: gr.update(visible=choice == each) for each in (STORM, FILES)]
    for function, component in zip(visible, (chosen[1], upload)):
        source.change(function, source, component, api_visibility="private")
    return chosen, [source, files, hold_back], about


def build(models: dict[str, Nowcaster]) -> gr.Blocks:
    """The page, with the models of [`load_models`]."""

    def run(name: str, storm: str, *rest: Any) -> tuple:
        options, (source, files, hold_back) = dict(zip(("members", "steps", "sigma"), rest)), rest[3:6]
        model, about, threshold = models[name], dict(zip(ABOUT, rest[6:])), rest[-1]
        if source == STORM:
            result = forecast_rain(storms(model.extractor.time_step)[1][storm], model, True, options, {})
        else:
            result = forecast_files(files, model, hold_back, options, about)
        save(result.dataset, result.path("forecast.nc"))
        minutes = [int(lead / np.timedelta64(1, "m")) for lead in result.dataset["lead_time"].values]
        choices = [(f"+{each} min", f"{each}m") for each in minutes]
        lead = gr.update(choices=choices, value=choices[-1][1], visible=model.makes_ensembles)
        download = gr.update(value=result.path("forecast.nc"), interactive=True)
        return result, animation(result, threshold), lead, download

    with gr.Blocks(title="Rain forecasts", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                chosen, source, about = controls(models)
                button = gr.Button("Forecast", variant="primary")
            with gr.Column(scale=2, min_width=320):
                picture = {"type": "filepath", "interactive": False, "elem_classes": "picture", "show_label": False}
                picture["buttons"] = ["download", "fullscreen"]
                result, label = gr.State(time_to_live=3600), "Threshold of chances and scores, mm/h"
                threshold = gr.Radio([(f"{each:g}", each) for each in THRESHOLDS], value=1.0, label=label)
                with gr.Tab("Animation"):
                    moving = gr.Image(alt_text="the forecast as a moving picture", **picture)
                with gr.Tab("Chance"):
                    gr.Markdown("How many members of an ensemble reach the threshold.")
                    chance = gr.Image(alt_text="maps of the chance of the threshold", **picture)
                with gr.Tab("Members"):
                    lead = gr.Dropdown([], label="Ahead", visible=False)
                    stamps = gr.Image(alt_text="maps of the forecast", **picture)
                with gr.Tab("Scores"):
                    table = gr.Markdown("Press *Forecast* first.")
                download = gr.DownloadButton("Download NetCDF", interactive=False)
        private: dict[str, Any] = {"api_visibility": "private"}
        chances = says_why(lambda result, threshold: (chance_map(result, threshold), scores(result, threshold)))
        drawn = (chances, [result, threshold], [chance, table])
        mapped = (says_why(maps), [result, lead], stamps)
        adapt = says_why(lambda name: [gr.update(**each) for each in suited(models[name])])
        chosen[0].change(adapt, chosen[0], chosen, **private)
        made = [result, moving, lead, download]
        click = button.click(
            says_why(run), [*chosen, *source, *about, threshold], made, scroll_to_output=True, **private
        )
        click.success(*drawn, **private).success(*mapped, **private)
        threshold.input(*drawn, **private)
        lead.input(*mapped, **private)
    return demo.queue(max_size=16)


@ends_in_one_line
def main():
    build(load_models()).launch(**LAUNCH)


if __name__ == "__main__":
    main()
