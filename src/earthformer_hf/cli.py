"""The command `earthformer-hf`; it needs the extra `cli`."""

import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

from .errors import DEBUG, described, one_line


try:
    import typer
except ModuleNotFoundError:
    raise SystemExit("earthformer-hf: typer is missing; install it with: pip install 'earthformer-hf[cli]'") from None


# An option may be written with - or _ between its words.
app = typer.Typer(
    help="Earthformer and PreDiff.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
hub_app = typer.Typer(help="Write, push and check model folders.", no_args_is_help=True)
app.add_typer(hub_app, name="hub")
data_app = typer.Typer(help="Prepare, describe, draw and push data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def fail(reason: object):
    """End with one line of what is wrong, and exit code 1."""
    typer.echo(f"error: {one_line(reason)}", err=True)
    raise typer.Exit(1)


def fails_in_one_line(command: Callable) -> Callable:
    """A command that ends with one line where bad input would end it with a traceback."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except Exception as reason:  # whatever it is, a user wants the words first
            if DEBUG in sys.argv:
                raise
            fail(described(reason))

    return wrapped


@app.callback()
def options_of_all_commands(
    debug: Annotated[bool, typer.Option(DEBUG, help="show where an error arose; anywhere on the line")] = False,
): ...


# -- evaluate ---------------------------------------------------------------------------------------------------------


@app.command("evaluate")
@fails_in_one_line
def evaluate_command(
    model: Annotated[str | None, typer.Option(help="a model folder, or a hub id; baselines only if omitted")] = None,
    protocol: Annotated[
        str | None, typer.Option(help="a name, or a .yaml file; the one that the model names if omitted")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="EARTHFORMER_HF_DATA, or ../shared/data if omitted")] = None,
    ensemble_size: Annotated[int, typer.Option(help="members")] = 8,
    num_inference_steps: Annotated[int, typer.Option(help="of a pipeline")] = 20,
    max_windows: Annotated[int | None, typer.Option(help="a quick look at so many windows")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for scores.json and figures")] = None,
    new_protocol: Annotated[
        Path | None,
        typer.Option(help="write a protocol for your own data, to fill in"),
    ] = None,
):
    """Score a model under a protocol, beside forecasts without a neural network."""
    from .evaluation import run_protocol
    from .evaluation.own_protocol import write_template
    from .sharing.words import shown_command

    if new_protocol is not None:
        write_template(new_protocol)
        typer.echo(f"{new_protocol}: written")
        return
    command = shown_command(["earthformer-hf", *sys.argv[1:]])
    settings = (ensemble_size, num_inference_steps, max_windows)
    run_protocol(model, protocol, data_dir, *settings, output, command, show=typer.echo)


@app.command("compare")
@fails_in_one_line
def compare_command(files: Annotated[list[Path], typer.Argument(help="scores.json files of one protocol")]):
    """Put score files side by side; those of different protocols or of other data are refused."""
    from .evaluation import compare

    typer.echo(compare(files))


# -- hub --------------------------------------------------------------------------------------------------------------

ModelSource = Annotated[str, typer.Argument(metavar="SOURCE", help="a model folder, or a hub id")]
Card = Annotated[Path | None, typer.Option(help="model card, a Markdown file; that of SOURCE if omitted")]
Token = Annotated[str | None, typer.Option(help="of the hub; that of `hf auth login` if omitted")]
Private = Annotated[bool | None, typer.Option(help="whether a repository that is created is private")]
RepoId = Annotated[str, typer.Argument(help="name or namespace/name")]


def card_of(folder: Path) -> Path | None:
    card = folder / "README.md"
    return card if card.is_file() else None


def say_what_is_left_behind(folder: Path):
    """List what of a folder is not published; a link out of it ends the command."""
    from . import sharing

    for name in sharing.model_files(folder)[1]:
        typer.echo(f"left behind: {name}", err=True)


@hub_app.command("export")
@fails_in_one_line
def export_command(
    source: ModelSource,
    folder: Annotated[Path, typer.Argument(help="where to write")],
    card: Card = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the model that FOLDER holds")] = False,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    token: Token = None,
):
    """Write a folder that loads with this package, and without it by trust_remote_code."""
    from . import sharing

    source_folder, model, extractor = sharing.load(source, revision, token)
    say_what_is_left_behind(source_folder)
    sharing.export(model, folder, extractor, card or card_of(source_folder), overwrite)
    typer.echo(f"{folder}: written")


@hub_app.command("push")
@fails_in_one_line
def push_command(
    source: ModelSource,
    repo_id: RepoId,
    card: Card = None,
    branch: Annotated[str | None, typer.Option(help="branch to push to, created if need be")] = None,
    tag: Annotated[str | None, typer.Option(help="name for the resulting commit")] = None,
    private: Private = None,
    token: Token = None,
):
    """Push a model or pipeline, the card first; of a folder without weights, card and configuration. Nothing else."""
    from . import sharing

    options: dict[str, Any] = {"private": private, "token": token, "revision": branch, "tag": tag}
    if Path(source).is_dir() and not sharing.has_weights(Path(source)):
        say_what_is_left_behind(Path(source))
        commit = sharing.upload(Path(source), repo_id, "Upload the configuration", **options)
    else:
        folder, model, extractor = sharing.load(source, token=token)
        say_what_is_left_behind(folder)
        commit = sharing.push(model, repo_id, extractor, card or card_of(folder), **options)
    typer.echo(str(commit))


@hub_app.command("check")
@fails_in_one_line
def check_command(
    folders: Annotated[list[Path], typer.Argument(help="model folders, or a folder of them")],
):
    """Check cards and configurations: metadata, shapes, and that every score has a source."""
    from . import sharing

    models: list[Path] = []
    for folder in folders:
        alone = (folder / "README.md").is_file() or not folder.is_dir()
        models += [folder] if alone else sorted(path for path in folder.iterdir() if path.is_dir())
    failed = 0
    for model in models:
        problems = sharing.check(model)
        failed += bool(problems)
        typer.echo(f"{model}: {'fine' if not problems else ''}".rstrip())
        for problem in problems:
            typer.echo(f"  {problem}")
    if failed or not models:
        fail(f"{failed} of {len(models)} folders have problems" if models else "no folders")


# -- data -------------------------------------------------------------------------------------------------------------

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
    from .data.events import load_dataset, make_builder
    from .data.hosted import prepare

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
    from .data.hosted import push

    typer.echo(str(push(folder, repo_id, private, token)))


def measured(event: dict[str, Any], units: str) -> str:
    """Units, size, grid spacing and time step of an event, as it states them; `units` are the source's."""
    from .data.measures import spacing_of, step_of

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

    from .data.events import is_source, load_dataset, make_builder
    from .data.hosted import event_in_memory, missing_values
    from .feature_extraction_earthformer import EarthformerFeatureExtractor

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

    from .data.events import as_event, check_origin, is_source, load_dataset, make_builder
    from .evaluation.reports import write_figure
    from .feature_extraction_earthformer import EarthformerFeatureExtractor
    from .plotting import plot_events
    from .sharing.files import check_writable

    check_writable(output.parent)
    chosen: Any
    if is_source(name):
        options = source_options(option)
        facts = make_builder(name, data_dir, **options).facts
        extractor = EarthformerFeatureExtractor(**facts.feature_extractor)
        label = f"{facts.variable}, {facts.units}"
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
        times[event["id"]] = [str(time).replace("T", " ") for time in event["time"][columns]]
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

    from .data.guards import extract

    typer.echo(f"{extract(archive, folder, convert_file_size_to_int(limit))}: written")


@data_app.command("downsample")
@fails_in_one_line
def downsample_command(
    sevir_dir: Annotated[Path, typer.Argument(help="folder of SEVIR's CATALOG.csv and data")],
    output_dir: Annotated[Path, typer.Argument(help="folder of SEVIR-LR; finished files in it are kept")],
):
    """Make SEVIR-LR from SEVIR: every second frame, and the maximum of 3 x 3 pixels."""
    from .data.sevir import downsample

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
    from .data.sst_anomalies import sst_anomalies

    years = base.split("-")
    if len(years) != 2 or not all(year.isdigit() for year in years) or years[0] > years[1]:
        fail(f"--base must be two years such as 1981-2010, got {base!r}")
    observed = sst_anomalies(source, output, (int(years[0]), int(years[1])))
    typer.echo(f"{output}: written, {observed} nodes of sea")


def main():
    """The program. Asked to terminate, it removes its drafts and temporary files first, as after an error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if DEBUG in sys.argv:  # an option of the program, which its parser wants before the command
        sys.argv.remove(DEBUG)
        sys.argv.insert(1, DEBUG)
    app()


__all__ = ["app", "main"]


if __name__ == "__main__":
    main()
