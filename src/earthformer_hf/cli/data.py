"""Commands that prepare, describe, draw and push data sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .frame import Private, RepoId, Token, data_app, fail, fails_in_one_line


SourceName = Annotated[str, typer.Argument(metavar="NAME", help="a source, such as open-radar")]
DataName = Annotated[str, typer.Argument(metavar="NAME", help="a source; or a prepared folder, or its hub id")]
DataDir = Annotated[Path | None, typer.Option(help="folder of the source's files; EARTHFORMER_HF_DATA if omitted")]
SourceOptions = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="NAME=VALUE of the source; may be repeated")
]


PLAIN_TEXT = ("pattern", "series", "name_time", "file")  # options whose brackets are no lists


def source_options(options: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE -> the value as YAML reads it, lists as tuples; what is no YAML is plain text."""
    import yaml

    values = {}
    for option in options or ():
        name, equals, text = option.partition("=")
        if not equals:
            fail(f"--option must be NAME=VALUE, got {option!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as reason:
            if text[:1] in ("[", "{", "'", '"') and name not in PLAIN_TEXT:
                fail(f"--option {name}: {reason}")
            value = text  # such as *.nc or %Y%m%d.nc
        if name in PLAIN_TEXT and isinstance(value, list | dict):
            value = text
        values[name] = tuple(value) if isinstance(value, list) else value
    values.pop("keep_bad", None)  # these commands list what cannot be used, in any case
    return values


@data_app.command("prepare")
@fails_in_one_line
def prepare_command(
    name: SourceName,
    folder: Annotated[Path, typer.Argument(help="where to write; finished shards in it are kept")],
    data_dir: DataDir = None,
    option: SourceOptions = None,
    max_shard_size: Annotated[str, typer.Option(help="of a shard's frames, before compression")] = "500MB",
    num_proc: Annotated[int, typer.Option(min=1, help="processes that write shards")] = 1,
):
    """Write parquet that streams from a folder or a hub. Events that cannot be used are listed, and the exit is 1."""
    from ..data.events import load_dataset, make_builder
    from ..data.hosted import prepare

    options = source_options(option)
    tables = load_dataset(name, data_dir, keep_bad=True, **options)
    facts = make_builder(name, data_dir, **options).facts
    problems = prepare(tables, folder, facts, max_shard_size, num_proc)
    typer.echo(f"{folder}: written")
    for problem in problems:
        typer.echo(f"left out: {problem}", err=True)
    if problems:
        fail(f"{len(problems)} events cannot be used")


@data_app.command("push")
@fails_in_one_line
def push_data_command(
    folder: Annotated[Path, typer.Argument(help="as written by `prepare`")],
    repo_id: RepoId,
    private: Private = None,
    token: Token = None,
):
    """Push a prepared folder to a hub, if it agrees with its checksums."""
    from ..data.hosted import push

    typer.echo(str(push(folder, repo_id, private, token)))


def measured(event: dict[str, Any], units: str) -> str:
    """Units, size, grid spacing and time step of an event, as it states them; `units` are the source's."""
    from ..data.measures import spacing_of, step_of

    geo, size = event["geo"], " x ".join(map(str, event["values"].shape[1:]))
    step = step_of(event["time"], geo)
    return f"in {geo.get('units', units)}, {size} pixels, grid spacing {spacing_of(geo)}, time step {step}"


@data_app.command("info")
@fails_in_one_line
def info_command(
    name: DataName,
    data_dir: DataDir = None,
    option: SourceOptions = None,
    sample: Annotated[int, typer.Option(min=0, help="events of each split whose missing values are counted")] = 8,
):
    """Print what a data set is: units, coding, licence, splits, how much is missing, and what cannot be used."""
    from dataclasses import fields

    from huggingface_hub import DatasetCard

    from ..data.events import is_source, load_dataset, make_builder
    from ..data.hosted import event_in_memory, missing_values
    from ..feature_extraction_earthformer import EarthformerFeatureExtractor

    if not is_source(name):
        typer.echo(DatasetCard.load(Path(name) / "README.md" if Path(name).is_dir() else name).content)
        return
    options = source_options(option)
    facts = make_builder(name, data_dir, **options).facts
    for field in fields(facts):
        text = str(getattr(facts, field.name))
        text = text if len(text) < 400 else f"{text[:400]} ..."  # a table of codes
        typer.echo(f"{field.name.replace('_', ' ') + ':':20s}{text}")
    extractor, usable_events = EarthformerFeatureExtractor(**facts.feature_extractor), 0
    for split, table in load_dataset(name, data_dir, keep_bad=True, **options).items():
        table = table.with_format(None)
        usable = table.filter(lambda problem: not problem, input_columns="problem")
        events = [event_in_memory(row) for row in usable.select(range(min(sample, len(usable))))]
        missing = sum(missing_values(event, extractor) for event in events)
        missing /= max(sum(event["values"].size for event in events), 1)
        unusable = f", {len(table) - len(usable)} events cannot be used" if len(usable) < len(table) else ""
        counts = f"{len(usable)} events, {sum(usable['length'][:])} frames{unusable}"
        typer.echo(f"{split + ':':20s}{counts}; {missing:.3%} missing in the first {len(events)}")
        for words in sorted({measured(event, facts.units) for event in events}):
            typer.echo(f"{'':20s}{words}")
        for row in table.filter(bool, input_columns="problem"):
            typer.echo(f"  {row['id']}: {row['problem']}")
        usable_events += len(usable)
    if not usable_events:
        fail("no event can be used")


@data_app.command("preview")
@fails_in_one_line
def preview_command(
    name: DataName,
    output: Annotated[Path, typer.Argument(help="a .png file")],
    data_dir: DataDir = None,
    option: SourceOptions = None,
    split: Annotated[str, typer.Option(help="to draw from")] = "train",
    events: Annotated[int, typer.Option(min=1, help="rows: of a source from all over the split, else the first")] = 6,
    frames: Annotated[int, typer.Option(min=1, help="columns: from an event's first to its last")] = 6,
    channel: Annotated[int, typer.Option(min=0, help="of values with channels")] = 0,
):
    """Draw a contact sheet: a row per event, a column per time."""
    import datasets
    import numpy as np

    from ..data.events import as_event, check_origin, is_source, load_dataset, make_builder
    from ..evaluation.reports import write_figure
    from ..feature_extraction_earthformer import EarthformerFeatureExtractor
    from ..plotting import plot_events
    from ..plotting.canvas import quantity_label, time_labels
    from ..sharing.files import check_writable

    check_writable(output.parent)
    chosen: Any
    if is_source(name):
        options = source_options(option)
        facts = make_builder(name, data_dir, **options).facts
        extractor = EarthformerFeatureExtractor(**facts.feature_extractor)
        label = quantity_label(facts.variable, facts.units)
        table = load_dataset(name, data_dir, split, keep_bad=True, **options).with_format(None)
        table = table.filter(lambda problem: not problem, input_columns="problem")
        if not len(table):
            raise ValueError(f"split {split!r} of {name} holds no event that can be used")
        numbers = np.unique(np.linspace(0, len(table) - 1, events).round().astype(int))
        chosen = table.select(numbers)
    else:
        extractor, label = EarthformerFeatureExtractor(), "stored values"
        try:
            stream = datasets.load_dataset(name, split=split, streaming=True)
        except ValueError as reason:
            raise ValueError(f"{name}, split {split!r}: {reason}") from reason
        check_origin(stream)
        chosen = stream.take(events)
    rows: dict[str, np.ndarray] = {}
    times: dict[str, Sequence[str]] = {}
    for event in map(as_event, chosen):
        columns = np.linspace(0, len(event["time"]) - 1, frames).round().astype(int)
        values = np.stack([event["values"][n] for n in columns.tolist()])
        values = np.where(extractor.observed(values), values, np.nan)
        rows[event["id"]] = values[..., channel] if values.ndim == 4 else values
        time, minutes = event["time"][columns], event["geo"].get("minutes")
        dated = not np.isnat(time).any()
        unnamed = [f"frame {n + 1}" if minutes is None else f"{n * minutes:g} min" for n in columns]
        times[event["id"]] = time_labels(time) if dated else unnamed
    write_figure(plot_events(rows, times, label, f"{name}, {split}"), output)
    typer.echo(f"{output}: written")


@data_app.command("unpack")
@fails_in_one_line
def unpack_command(
    archive: Annotated[Path, typer.Argument(help=".zip, .tar, .tar.gz or .gz, as data sets are published")],
    folder: Annotated[Path, typer.Argument(help="a new folder")],
    limit: Annotated[str, typer.Option(help="an archive that holds more is refused")] = "100GB",
):
    """Unpack an archive, completely or not at all; what leads out of the folder is refused."""
    from datasets.utils.py_utils import convert_file_size_to_int

    from ..data.guards import extract

    typer.echo(f"{extract(archive, folder, convert_file_size_to_int(limit))}: written")


@data_app.command("downsample")
@fails_in_one_line
def downsample_command(
    sevir_dir: Annotated[Path, typer.Argument(help="folder of SEVIR's CATALOG.csv and data")],
    output_dir: Annotated[Path, typer.Argument(help="folder of SEVIR-LR; finished files in it are kept")],
):
    """Make SEVIR-LR from SEVIR: every second frame, and the maximum of 3 x 3 pixels."""
    from ..data.sevir import downsample

    downsample(sevir_dir, output_dir)
    typer.echo(f"{output_dir}: written")


@data_app.command("sst-anomalies")
@fails_in_one_line
def sst_anomalies_command(
    source: Annotated[Path, typer.Argument(help="monthly sea-surface temperatures on a grid of their own")],
    output: Annotated[Path, typer.Argument(help="a .nc file of anomalies on the grid of the ocean models")],
    base: Annotated[str, typer.Option(help="first and last year of the base period")] = "1981-2010",
):
    """Make monthly anomalies on the grid of the ocean models: for `open-sst`, and `make forecast INPUT=`."""
    from ..data.sst_anomalies import sst_anomalies

    years = base.split("-")
    if len(years) != 2 or not all(year.isdigit() for year in years) or years[0] > years[1]:
        fail(f"--base must be two years such as 1981-2010, got {base!r}")
    observed = sst_anomalies(source, output, (int(years[0]), int(years[1])))
    typer.echo(f"{output}: written, {observed} nodes of sea")


__all__ = ["info_command", "prepare_command", "preview_command"]
