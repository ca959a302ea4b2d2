"""Model cards: the one place that writes them.

```
---
metadata        what the hub finds a repository by
---
# title
introduction
## section ...  inputs and outputs, use, data, scores, training, recipe, conversion
```

[`plain_card`] is that of an export which was given none, [`write_card`] that of a training run, and [`converted_card`]
that of a converted checkpoint. [`copy_card`] takes along a card that was written by hand.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..errors import one_line
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..modeling_earthformer import EarthformerForPrediction, EarthformerModel
from ..pipeline_prediff import PreDiffPipeline
from .card_text import card_metadata, read_card, shown_pictures
from .files import PICTURES, is_file_beside, is_picture_beside, refuse_link_out
from .tables import text_table
from .words import fenced, inline_code, plain, shown_command, without_local_paths


Shareable = EarthformerModel | EarthformerForPrediction | PreDiffPipeline | EarthformerFeatureExtractor


SCORES_START, SCORES_END = "<!-- scores, by earthformer-hf evaluate -->", "<!-- end of scores -->"
NO_SCORES = "No evaluation yet."


# -- whole cards ------------------------------------------------------------------------------------------------------


def plain_card(model_or_pipeline: Shareable, feature_extractor: EarthformerFeatureExtractor | None = None) -> str:
    """A card that says what follows from the configuration, and that nothing else is known."""
    extractor = getattr(model_or_pipeline, "feature_extractor", feature_extractor)
    unit = (
        "not stated"
        if extractor is None
        else f"the model's; raw values are {plain(extractor.variable)}, {plain(extractor.units)}"
    )
    return card_text(
        plain_title(type(model_or_pipeline)),
        metadata(type(model_or_pipeline), "other"),
        "No evaluation yet. Training data, licence and limits are not stated.",
        {"Inputs and outputs": inputs_and_outputs(model_or_pipeline, unit), "Use": usage(model_or_pipeline, "folder")},
    )


def converted_card(
    name: str,
    model_or_pipeline: EarthformerForPrediction | PreDiffPipeline,
    feature_extractor: EarthformerFeatureExtractor | None,
    sections: dict[str, str],
) -> str:
    """The card of a converted checkpoint.

    Args:
        name: its title, and the folder that its usage loads.
        feature_extractor: the range of the data, if it is known.
        sections: title -> text, where the weights come from.
    """
    paper, original = "https://arxiv.org/abs/2207.05833", "amazon-science/earth-forecasting-transformer"
    what = "An [Earthformer]"
    if isinstance(model_or_pipeline, PreDiffPipeline):
        paper, original, what = "https://arxiv.org/abs/2307.10422", "gaozhihan/PreDiff", "[PreDiff]"
        networks = (model_or_pipeline.vae, model_or_pipeline.unet, model_or_pipeline.alignment)
        parameters = " + ".join(f"{network.num_parameters():,}" for network in networks if network is not None)
    else:
        parameters = f"{model_or_pipeline.num_parameters():,}"
    introduction = (
        f"{what}({paper}) of {parameters} parameters, converted from what the\n"
        f"[original](https://github.com/{original}) saved. It has not been scored since.\n"
        "The licence of the weights is not known here: it is whatever their owner gave them."
    )
    unit, known = "as the original was trained on", "The range of the data is the original's; no file states it."
    if feature_extractor is not None:
        unit = "as the feature extractor gives it"
        raw = f"{feature_extractor.transform}(raw)" if feature_extractor.transform else "raw"
        known = (
            f"The feature extractor gives ({raw} - {feature_extractor.offset}) x {feature_extractor.scale}; raw "
            f"values are {plain(feature_extractor.variable)}, in units of {plain(feature_extractor.units)}."
        )
    inputs = f"{inputs_and_outputs(model_or_pipeline, unit)}\n\n{known}"
    return card_text(
        name,
        metadata(type(model_or_pipeline), "other"),
        introduction,
        {"Inputs and outputs": inputs, "Use": usage(model_or_pipeline, json.dumps(name))} | sections,
    )


def write_card(
    folder: str | Path,
    recipe: dict,
    data: str,
    *,
    steps: int,
    batch_size: int,
    num_processes: int,
    skipped_steps: int,
    best_step: int,
    best_loss: float,
    extensions: Sequence[dict[str, int]] = (),
):
    """Write the card of a training run: data, scores, code, recipe.

    Args:
        folder: holds the model, and `scores.json` once it was evaluated (`earthformer-hf evaluate --output`).
        recipe: as read from its file.
        data: what the model was trained on, in words.
        steps: training steps that were taken.
        batch_size: samples of a step, over all processes.
        num_processes: that trained together.
        skipped_steps: left out because they were not finite.
        best_step, best_loss: the step whose weights were kept, and its validation loss.
        extensions: of the run beyond its end: the `max_steps` that it had, and the `step` at which it got more.
    """
    folder = Path(folder)
    model_class = PreDiffPipeline if (folder / "model_index.json").is_file() else EarthformerForPrediction
    scores = NO_SCORES
    if (folder / "scores.json").is_file():
        scores = score_block(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    command = shown_command(["python", *sys.argv])
    stored_recipe = yaml.safe_dump(without_local_paths(recipe), sort_keys=False, default_flow_style=None, width=110)
    sections = {
        "Data": without_local_paths(data),
        "Scores": scores,
        "Training": f"{steps} steps of {batch_size} samples, processes: {num_processes}; skipped steps: "
        f"{skipped_steps}. Kept: step {best_step}, which has the lowest validation loss, {best_loss:.6g}."
        + "".join(f" Planned for {one['max_steps']} steps, and extended at step {one['step']}." for one in extensions)
        + f"\n\nCode: commit {code_version()}; torch {torch.__version__}.\n\n{fenced(command)}",
        "Recipe": fenced(stored_recipe, "yaml"),
    }
    title = f"{plain_title(model_class)}: {folder.name}"
    text = card_text(title, metadata(model_class, "unknown"), "", sections)
    (folder / "README.md").write_text(text, encoding="utf-8")


def copy_card(card: str | Path, folder: Path):
    """Put a card into a folder, with the pictures that it shows and the `scores.json` beside it, without local paths.

    Raises:
        ValueError: there is no such card; a picture is none, is no file beside it, or one of the model's; or one of
            these files is a link out of the card's folder.
    """
    card = Path(card)
    if not card.is_file():
        raise ValueError(f"`card` must be a Markdown file, got {str(card)!r}.")
    refuse_link_out(card)
    pictures = shown_pictures(read_card(card))
    shutil.copyfile(card, folder / "README.md")
    for name in dict.fromkeys(pictures):
        if not is_file_beside(card, name):
            raise ValueError(f"`card`: {card} shows {name!r}, which must be a file beside it.")
        if (folder / name).exists():
            raise ValueError(f"`card`: {card} shows {name!r}, which is a file of the model.")
        if not is_picture_beside(card, name):
            raise ValueError(f"`card`: {card} shows {name!r}, which must be a picture: {', '.join(PICTURES)}.")
        refuse_link_out(card.parent / name)
        shutil.copyfile(card.parent / name, folder / name)
    scores = card.parent / "scores.json"
    if scores.is_file():
        refuse_link_out(scores)
        text = scores.read_text(encoding="utf-8")
        (folder / "scores.json").write_text(without_local_paths(text), encoding="utf-8")


def with_tags(text: str, tags: list[str]) -> str:
    """A card with tags added to those of its metadata.

    Raises:
        ValueError: metadata that cannot be read, see [`card_metadata`].
    """
    data, body = card_metadata(text)
    data = data or {}
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), *tags]))
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{body}"


# -- their parts ------------------------------------------------------------------------------------------------------


def card_text(title: str, metadata: dict[str, Any], introduction: str, sections: dict[str, str]) -> str:
    """A card from its parts; `sections` maps titles to texts."""
    parts = [f"---\n{yaml.safe_dump(metadata, sort_keys=False, default_flow_style=None)}---", f"# {plain(title)}"]
    parts += [introduction] if introduction else []
    parts += [f"## {section}\n\n{text.strip()}" for section, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def plain_title(model_class: type[Shareable]) -> str:
    """What a model, pipeline or feature extractor is, in words."""
    if issubclass(model_class, EarthformerFeatureExtractor):
        return "A feature extractor of Earthformer"
    return "PreDiff ensemble forecasts" if issubclass(model_class, PreDiffPipeline) else "An Earthformer"


def metadata(model_class: type[Shareable], license: str) -> dict[str, Any]:
    """What the hub finds a repository of a model, pipeline or feature extractor by."""
    if issubclass(model_class, PreDiffPipeline):
        return {"license": license, "library_name": "diffusers", "tags": ["prediff"]}
    entries = {"license": license, "library_name": "transformers", "tags": ["earthformer"]}
    if issubclass(model_class, EarthformerFeatureExtractor):
        return entries
    return entries | {"pipeline_tag": "time-series-forecasting"}


def inputs_and_outputs(model_or_pipeline: Shareable, unit: str) -> str:
    """Table of names and shapes (E ensemble members), with the unit and range of the inputs in words."""
    rows = {"past_values": "(B, T, H, W, C)"}
    if isinstance(model_or_pipeline, PreDiffPipeline):
        unet, vae = model_or_pipeline.unet.config, model_or_pipeline.vae.config
        height, width = (n * 2 ** (len(vae.block_out_channels) - 1) for n in unet.sample_size)
        rows["past_values"] = f"(B, {unet.context_length}, {height}, {width}, {vae.in_channels})"
        rows["predictions"] = f"(B, E, {unet.prediction_length}, {height}, {width}, {vae.out_channels})"
    elif not isinstance(model_or_pipeline, EarthformerFeatureExtractor):
        config: Any = model_or_pipeline.config
        size = ", ".join(map(str, config.image_size))
        rows["past_values"] = f"(B, {config.context_length}, {size}, {config.num_channels})"
        if config.num_covariates:
            rows["past_covariates"] = f"(B, {config.context_length}, {size}, {config.num_covariates})"
            rows["future_covariates"] = f"(B, {config.prediction_length}, {size}, {config.num_covariates})"
        if config.num_time_features and isinstance(model_or_pipeline, EarthformerForPrediction):
            rows["past_time_features"] = f"(B, {config.context_length}, {config.num_time_features})"
        if isinstance(model_or_pipeline, EarthformerForPrediction):
            rows["predictions"] = f"(B, {config.prediction_length}, {size}, {config.num_output_channels})"
    units = {"predictions": "as `past_values`", "past_time_features": "the feature extractor's, of the frames' dates"}
    lines = [f"| `{name}` | {shape} float32 | {units.get(name, unit)} |" for name, shape in rows.items()]
    return "\n".join(["| name | shape | unit, range |", "|---|---|---|", *lines])


def usage(model_or_pipeline: Shareable, source: str) -> str:
    """The code that loads and calls what a folder holds.

    Args:
        source: the folder, as a Python expression.
    """
    name, loader = "model", "AutoModelForTimeSeriesPrediction"
    call = "predictions = model({}).predictions"
    if isinstance(model_or_pipeline, PreDiffPipeline):
        name, loader = "pipeline", "PreDiffPipeline"
        call = "predictions = pipeline(past_values, ensemble_size=8, num_inference_steps=10).predictions"
    elif isinstance(model_or_pipeline, EarthformerFeatureExtractor):
        name, loader, call = "extractor", "AutoFeatureExtractor", 'past_values = extractor(raw)["past_values"]'
    else:
        if isinstance(model_or_pipeline, EarthformerModel):
            loader, call = "AutoModel", "tokens = model({}).last_hidden_state"
        inputs = ["past_values"]
        inputs += ["past_covariates", "future_covariates"] if model_or_pipeline.config.num_covariates else []
        if model_or_pipeline.config.num_time_features and isinstance(model_or_pipeline, EarthformerForPrediction):
            inputs.append("past_time_features")
        call = call.format(", ".join(f"{name}={name}" for name in inputs))
    imports = f"from transformers import {loader}\n\nimport earthformer_hf  # registers the classes"
    other_loader = loader
    if isinstance(model_or_pipeline, PreDiffPipeline):
        imports, other_loader = f"from earthformer_hf import {loader}", "diffusers.DiffusionPipeline"
    return (
        f"```python\n{imports}\n\n{name} = {loader}.from_pretrained({source})\n{call}\n```\n\n"
        "This runs no code of the folder. Without the package, that code is run by\n"
        + inline_code(f"{other_loader}.from_pretrained({source}, trust_remote_code=True)")
        + "."
    )


def score_block(stored: dict[str, Any]) -> str:
    """The summary of a score file, one row per system, with the command that measured it, between two markers."""
    table = text_table({plain(system): entries["summary"] for system, entries in stored["scores"].items()})
    command = stored.get("command") or "earthformer-hf evaluate --model FOLDER --output FOLDER"
    text = (
        f"Protocol {inline_code(stored['protocol']['name'])}, {stored['windows']} windows, measured with\n\n"
        f"{fenced(without_local_paths(one_line(command)))}\n\n{table}"
    )
    if published := stored["protocol"].get("published"):
        text += f"\n\nMeasured by others, published: {plain(published)}."
    return f"{SCORES_START}\n{text}\n{SCORES_END}"


def with_scores(text: str, stored: dict[str, Any]) -> str:
    """A card with the summary of a score file: in the place of the last such summary, else first in the section
    "Scores", which is added if need be. What was written by hand stays."""
    block = score_block(stored)
    if text.count(SCORES_START) == text.count(SCORES_END) == 1 and text.index(SCORES_START) < text.index(SCORES_END):
        return text[: text.index(SCORES_START)] + block + text[text.index(SCORES_END) + len(SCORES_END) :]
    before, heading, after = text.partition("\n## Scores\n")
    if not heading:
        return f"{text.rstrip()}\n\n## Scores\n\n{block}\n"
    after = after.strip("\n").removeprefix(NO_SCORES).strip("\n")
    return f"{before}{heading}\n{block}\n" + (f"\n{after}\n" if after else "")


def code_version() -> str:
    """The commit of the working directory, and whether files differ from it."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + (", with changes that are not committed" if changes.strip() else "")


__all__ = [
    "Shareable",
    "converted_card",
    "copy_card",
    "plain_card",
    "with_scores",
    "with_tags",
    "write_card",
]
