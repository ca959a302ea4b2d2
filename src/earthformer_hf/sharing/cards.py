"""Model cards: what training and export write."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..pipeline_prediff import PreDiffPipeline


def git_state() -> str:
    """The commit of the working directory, and whether files differ from it."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        commit, changes = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + (", with changes that are not committed" if changes.strip() else "")


def write_card(folder: str | Path, recipe: dict, data: str, run: Any):
    """Write the model card of what a run trained: data, scores, code, recipe.

    Args:
        folder: holds the model, and `scores.json` once it was evaluated (`examples/evaluate.py --output`).
        recipe: as read from its file.
        data: what it was trained on, in words.
        run: at its end.
    """
    folder = Path(folder)
    pipeline = (folder / "model_index.json").is_file()
    header: dict[str, Any] = {"license": "unknown", "library_name": "diffusers" if pipeline else "transformers"}
    header |= {} if pipeline else {"pipeline_tag": "time-series-forecasting"}
    header |= {"tags": ["prediff" if pipeline else "earthformer"]}
    scores = "No evaluation yet."
    if (folder / "scores.json").is_file():
        scores = _score_table(json.loads((folder / "scores.json").read_text()))
    progress = run.progress
    here = str(Path.cwd()) + os.sep
    command = shlex.join(["python", *(argument.removeprefix(here) for argument in sys.argv)])
    sections = {
        "Data": data,
        "Scores": scores,
        "Training": f"{progress['step']} steps of {run.samples} samples, processes: {run.accelerator.num_processes}; "
        f"skipped steps: {progress['skipped']}. Kept: step {progress['best_step']}, which has the lowest validation "
        f"loss, {progress['best']:.6g}.\n\nCode: commit {git_state()}; torch {torch.__version__}.\n\n"
        f"```\n{command}\n```",
        "Recipe": f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110)}```",
    }
    body = "\n\n".join(f"## {title}\n\n{section}" for title, section in sections.items())
    kind = "PreDiff ensemble forecasts" if pipeline else "An Earthformer"
    text = f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {kind}: {folder.name}\n\n{body}\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _score_table(stored: dict) -> str:
    """The summary of `scores.json`, one row per system, with the command that measured it."""
    rows = {system: entries["summary"] for system, entries in stored["scores"].items()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["system", *names], ["---"] * (len(names) + 1)]
    for system, row in rows.items():
        lines.append([system, *("" if row.get(name) is None else f"{row[name]:.4g}" for name in names)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    command = "python examples/evaluate.py --model FOLDER --output FOLDER"
    return (
        f"Protocol `{stored['protocol']['name']}`, {stored['windows']} windows, measured with\n\n"
        f"```\n{command}\n```\n\n{table}"
    )


def copy_card(thing: Any, card: str | Path | None, folder: Path):
    if card is None:
        (folder / "README.md").write_text(_plain_card(thing), encoding="utf-8")
        return
    card = Path(card)
    if not card.is_file():
        raise ValueError(f"`card` must be a Markdown file, got {str(card)!r}.")
    shutil.copyfile(card, folder / "README.md")
    for name in pictures_of(card.read_text(encoding="utf-8")):
        if not beside(card, name):
            raise ValueError(f"`card`: {card} shows {name!r}, which must be a file beside it.")
        shutil.copyfile(card.parent / name, folder / name)
    if (card.parent / "scores.json").is_file():
        shutil.copyfile(card.parent / "scores.json", folder / "scores.json")


def pictures_of(text: str) -> list[str]:
    """The pictures that a card shows, but for those of other sites."""
    return [name for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", text) if "://" not in name]


def beside(card: Path, name: str) -> bool:
    return Path(name).name == name and (card.parent / name).is_file()


def _plain_card(thing: Any) -> str:
    """A card that says what follows from the configuration, and that nothing else is known."""
    note = "With the package earthformer_hf imported, its own classes are loaded and no code of this folder is run."
    if isinstance(thing, PreDiffPipeline):
        unet, vae = thing.unet.config, thing.vae.config
        size = [n * 2 ** (len(vae.block_out_channels) - 1) for n in unet.sample_size]
        given = f"(B, {unet.context_length}, {size[0]}, {size[1]}, {vae.in_channels})"
        result = f"(B, E, {unet.prediction_length}, {size[0]}, {size[1]}, {vae.out_channels})"
        extractor, header = thing.feature_extractor, {"library_name": "diffusers", "tags": ["prediff"]}
        load, kind = "from earthformer_hf import PreDiffPipeline", "PreDiff ensemble forecasts"
        load += "\n\npipeline = PreDiffPipeline.from_pretrained(folder)"
        note = (
            "This runs no code of this folder. Without the package, the code in this folder is run by\n"
            "`diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`."
        )
    elif isinstance(thing, EarthformerFeatureExtractor):
        given, result, extractor = "(B, T, H, W, C)", "(B, T, H, W, C)", thing
        header = {"library_name": "transformers", "tags": ["earthformer"]}
        load, kind = "from transformers import AutoFeatureExtractor", "A feature extractor of Earthformer"
        load += "\n\nextractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)"
    else:
        config = thing.config
        height, width = config.image_size
        given = f"(B, {config.context_length}, {height}, {width}, {config.num_channels})"
        result = f"(B, {config.prediction_length}, {height}, {width}, {config.num_output_channels})"
        extractor, header = None, {"library_name": "transformers", "pipeline_tag": "time-series-forecasting"}
        header |= {"tags": ["earthformer"]}
        load, kind = "from transformers import AutoModelForTimeSeriesPrediction", "An Earthformer"
        load += "\n\nmodel = AutoModelForTimeSeriesPrediction.from_pretrained(folder, trust_remote_code=True)"
    raw = "not stated" if extractor is None else f"the model's; raw values are {extractor.variable}, {extractor.units}"
    return (
        f"---\nlicense: other\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {kind}\n\n"
        "No evaluation yet. Training data, licence and limits are not stated.\n\n"
        "| name | shape | range |\n|---|---|---|\n"
        f"| `past_values` | {given} float32 | {raw} |\n| `predictions` | {result} float32 | as `past_values` |\n\n"
        f"```python\n{load}\n```\n\n{note}\n"
    )
