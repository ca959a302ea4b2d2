"""The command `earthformer-hf`; it needs the extra `cli`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError


try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("earthformer-hf: typer is missing; install it with: pip install 'earthformer-hf[cli]'") from None


app = typer.Typer(help="Earthformer and PreDiff.", no_args_is_help=True, pretty_exceptions_enable=False)
hub_app = typer.Typer(help="Write, push and check model folders.", no_args_is_help=True)
app.add_typer(hub_app, name="hub")
data_app = typer.Typer(help="Prepare, describe, draw and push data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


Source = Annotated[str, typer.Argument(help="a model folder, or a hub id")]
Card = Annotated[Path | None, typer.Option(help="model card; that of SOURCE if omitted")]
Token = Annotated[str | None, typer.Option(help="of the hub; that of `hf auth login` if omitted")]
Revision = Annotated[str | None, typer.Option(help="of a hub id")]


# What a broken file or a refusing hub raises.
ERRORS = (ValueError, TypeError, KeyError, OSError, SafetensorError, HfHubHTTPError)


def fail(reason: object):
    typer.echo(f"error: {' '.join(str(reason).split())}", err=True)
    raise typer.Exit(1)


def card_of(folder: Path, card: Path | None) -> Path | None:
    beside = folder / "README.md"
    return card or (beside if beside.is_file() else None)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str | None, typer.Option(help="a model folder, or a hub id; baselines only if omitted")] = None,
    protocol: Annotated[str | None, typer.Option(help="the one that the model names if omitted")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data_dir", help="EARTHFORMER_HF_DATA, or ../shared/data if omitted")
    ] = None,
    ensemble_size: Annotated[int, typer.Option("--ensemble_size", help="members")] = 8,
    num_inference_steps: Annotated[int, typer.Option("--num_inference_steps", help="of a pipeline")] = 20,
    max_windows: Annotated[int | None, typer.Option("--max_windows", help="a quick look at so many windows")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for scores.json and figures")] = None,
):
    """Score a model under a named protocol, beside forecasts without a neural network."""
    from .evaluation import run_protocol

    command = shlex.join(["earthformer-hf", *sys.argv[1:]])
    options = (ensemble_size, num_inference_steps, max_windows, output)
    try:
        text = run_protocol(model, protocol, data_dir, *options, command)
    except (ValueError, OSError, HfHubHTTPError) as reason:
        fail(reason)
    if text is not None:
        typer.echo(text)


@app.command("compare")
def compare_command(files: Annotated[list[Path], typer.Argument(help="scores.json files of one protocol")]):
    """Put the headline scores of score files side by side; files of different protocols are refused."""
    from .evaluation import compare

    try:
        typer.echo(compare(files))
    except ValueError as reason:
        fail(reason)


@hub_app.command("export")
def export_command(
    source: Source,
    folder: Annotated[Path, typer.Argument(help="where to write")],
    card: Card = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the model that FOLDER holds")] = False,
    revision: Revision = None,
    token: Token = None,
):
    """Write a folder that loads with this package, and without it by trust_remote_code."""
    from . import sharing

    try:
        place, model, extractor = sharing.load(source, revision, token)
        sharing.export(model, folder, extractor, card_of(place, card), overwrite)
    except ERRORS as reason:
        fail(reason)
    typer.echo(f"{folder}: written")


@hub_app.command("push")
def push_command(
    source: Source,
    repo_id: Annotated[str, typer.Argument(help="name or namespace/name")],
    card: Card = None,
    branch: Annotated[str | None, typer.Option(help="branch to push to, created if need be")] = None,
    tag: Annotated[str | None, typer.Option(help="name for the resulting commit")] = None,
    private: Annotated[bool | None, typer.Option(help="of a repository that is created")] = None,
    token: Token = None,
):
    """Push a model or pipeline, the card first; a folder without weights as it is, card and configuration."""
    from . import sharing

    options: dict[str, Any] = {"private": private, "token": token, "revision": branch, "tag": tag}
    try:
        if Path(source).is_dir() and not sharing.has_weights(Path(source)):
            commit = sharing.upload(Path(source), repo_id, "Upload the configuration", **options)
        else:
            place, model, extractor = sharing.load(source, token=token)
            commit = sharing.push(model, repo_id, extractor, card_of(place, card), **options)
    except ERRORS as reason:
        fail(reason)
    typer.echo(str(commit))


@hub_app.command("check")
def check_command(
    folders: Annotated[list[Path], typer.Argument(help="model folders, or a folder of them")],
):
    """Check cards and configurations: metadata, shapes, and that every score has a source."""
    from . import sharing

    places = []
    for folder in folders:
        alone = (folder / "README.md").is_file() or not folder.is_dir()
        places += [folder] if alone else sorted(place for place in folder.iterdir() if place.is_dir())
    failed = 0
    for place in places:
        problems = sharing.check(place)
        failed += bool(problems)
        typer.echo(f"{place}: {'fine' if not problems else ''}".rstrip())
        for problem in problems:
            typer.echo(f"  {problem}")
    if failed or not places:
        fail(f"{failed} of {len(places)} folders have problems" if places else "no folders")


# -- data -------------------------------------------------------------------------------------------------------------

Name = Annotated[str, typer.Argument(help="a source, such as open-radar; or a prepared folder, or its hub id")]
DataDir = Annotated[Path | None, typer.Option(help="folder of the source's files; EARTHFORMER_HF_DATA if omitted")]
Option = Annotated[list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of the source; may be repeated")]


def parsed(options: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE -> the value as YAML reads it, lists as tuples."""
    import yaml

    values = {}
    for option in options or ():
        name, equals, value = option.partition("=")
        if not equals:
            fail(f"--option must be NAME=VALUE, got {option!r}")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as reason:
            fail(f"--option {name}: {reason}")
        values[name] = tuple(read) if isinstance(read, list) else read
    return values


@data_app.command("prepare")
def prepare_command(
    name: Annotated[str, typer.Argument(help="a source, such as open-radar")],
    folder: Annotated[Path, typer.Argument(help="where to write; finished shards in it are kept")],
    data_dir: DataDir = None,
    option: Option = None,
    max_shard_size: Annotated[str, typer.Option(help="of a shard's frames, before compression")] = "500MB",
    num_proc: Annotated[int, typer.Option(min=1, help="processes that write shards")] = 1,
):
    """Write parquet that streams from a folder or a hub. Events that cannot be used are listed, and the exit is 1."""
    from .data.events import load_dataset, make_builder
    from .data.hosted import prepare

    options = parsed(option)
    try:
        tables = load_dataset(name, data_dir, keep_bad=True, **options)
        facts = make_builder(name, data_dir, **options).facts
        problems = prepare(tables, folder, facts, max_shard_size, num_proc)
    except (ValueError, OSError) as reason:
        fail(reason)
    typer.echo(f"{folder}: written")
    for problem in problems:
        typer.echo(f"left out: {problem}", err=True)
    if problems:
        fail(f"{len(problems)} events cannot be used")


@data_app.command("push")
def push_data_command(
    folder: Annotated[Path, typer.Argument(help="as written by `prepare`")],
    repo_id: Annotated[str, typer.Argument(help="name or namespace/name")],
    private: Annotated[bool | None, typer.Option(help="of a repository that is created")] = None,
    token: Token = None,
):
    """Push a prepared folder to a hub, if it agrees with its checksums."""
    from .data.hosted import push

    try:
        typer.echo(str(push(folder, repo_id, private, token)))
    except (ValueError, OSError, HfHubHTTPError) as reason:
        fail(reason)


@data_app.command("info")
def info_command(
    name: Name,
    data_dir: DataDir = None,
    option: Option = None,
    sample: Annotated[int, typer.Option(min=0, help="events of each split whose missing values are counted")] = 8,
):
    """Print what a data set is: units, coding, licence, sizes of the splits, and how much is missing."""
    from dataclasses import fields

    from huggingface_hub import DatasetCard

    from .data.events import SOURCES, load_dataset, make_builder
    from .data.hosted import event_in_memory, missing_values
    from .feature_extraction_earthformer import EarthformerFeatureExtractor

    try:
        if name not in SOURCES:
            typer.echo(DatasetCard.load(Path(name) / "README.md" if Path(name).is_dir() else name).content)
            return
        facts = make_builder(name, data_dir, **parsed(option)).facts
        for field in fields(facts):
            stated = str(getattr(facts, field.name))
            short = stated if len(stated) < 400 else f"{stated[:400]} ..."  # a table of codes
            typer.echo(f"{field.name.replace('_', ' ') + ':':20s}{short}")
        extractor = EarthformerFeatureExtractor(**facts.feature_extractor)
        tables = load_dataset(name, data_dir, keep_bad=True, **parsed(option))
        for split, table in tables.items():
            table = table.with_format(None)
            fine = table.filter(lambda problem: not problem, input_columns="problem")
            read = [event_in_memory(row) for row in fine.select(range(min(sample, len(fine))))]
            missing = sum(missing_values(event, extractor) for event in read)
            share = missing / max(sum(event["values"].size for event in read), 1)
            bad = f", {len(table) - len(fine)} events cannot be used" if len(fine) < len(table) else ""
            counts = f"{len(fine)} events, {sum(fine['length'][:])} frames{bad}"
            typer.echo(f"{split + ':':20s}{counts}; {share:.3%} missing in the first {len(read)}")
    except (ValueError, OSError, HfHubHTTPError) as reason:
        fail(reason)


@data_app.command("preview")
def preview_command(
    name: Name,
    output: Annotated[Path, typer.Argument(help="a .png file")],
    data_dir: DataDir = None,
    option: Option = None,
    split: Annotated[str, typer.Option(help="to draw from")] = "train",
    events: Annotated[int, typer.Option(min=1, help="rows: of a source from all over the split, else the first")] = 6,
    frames: Annotated[int, typer.Option(min=1, help="columns: from an event's first to its last")] = 6,
    channel: Annotated[int, typer.Option(min=0, help="of values with channels")] = 0,
):
    """Draw a contact sheet: a row per event, a column per time."""
    import datasets
    import numpy as np

    from .data.events import SOURCES, as_event, check_origin, load_dataset, make_builder
    from .feature_extraction_earthformer import EarthformerFeatureExtractor
    from .plotting import plot_events

    chosen: Any
    times: dict[str, Sequence[str]] = {}
    try:
        if name in SOURCES:
            facts = make_builder(name, data_dir, **parsed(option)).facts
            extractor = EarthformerFeatureExtractor(**facts.feature_extractor)
            label = f"{facts.variable}, {facts.units}"
            table = load_dataset(name, data_dir, split, keep_bad=True, **parsed(option)).with_format(None)
            table = table.filter(lambda problem: not problem, input_columns="problem")
            if not len(table):
                raise ValueError(f"split {split!r} of {name} holds no event that can be used")
            numbers = np.unique(np.linspace(0, len(table) - 1, events).round().astype(int))
            chosen = map(as_event, table.select(numbers))
        else:
            extractor, label = EarthformerFeatureExtractor(), "stored values"
            stream = datasets.load_dataset(name, split=split, streaming=True)
            check_origin(stream)
            chosen = map(as_event, stream.take(events))
        rows = {}
        for event in chosen:
            columns = np.linspace(0, len(event["time"]) - 1, frames).round().astype(int)
            values = np.stack([event["values"][n] for n in columns.tolist()])
            values = np.where(extractor.observed(values), values, np.nan)
            rows[event["id"]] = values[..., channel] if values.ndim == 4 else values
            times[event["id"]] = [str(time).replace("T", " ") for time in event["time"][columns]]
    except (ValueError, OSError, IndexError, HfHubHTTPError) as reason:
        fail(reason)
    output.parent.mkdir(parents=True, exist_ok=True)
    plot_events(rows, times, label, f"{name}, {split}").savefig(output, dpi=110)
    typer.echo(f"{output}: written")


@data_app.command("downsample")
def downsample_command(
    sevir_dir: Annotated[Path, typer.Argument(help="folder of SEVIR's CATALOG.csv and data")],
    output_dir: Annotated[Path, typer.Argument(help="folder of SEVIR-LR; finished files in it are kept")],
):
    """Make SEVIR-LR from SEVIR: every second frame, and the maximum of 3 x 3 pixels."""
    from .data.sevir import downsample

    try:
        downsample(sevir_dir, output_dir)
    except (ValueError, OSError) as reason:
        fail(reason)
    typer.echo(f"{output_dir}: written")


def main():
    app()


if __name__ == "__main__":
    main()
