"""The command `earthformer-hf`; it needs the extra `cli`."""

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


@app.callback()
def group():
    """Keeps `hub` a group of commands."""


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
    from . import hub

    try:
        place, model, extractor = hub.load(source, revision, token)
        hub.export(model, folder, extractor, card_of(place, card), overwrite)
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
    from . import hub

    options: dict[str, Any] = {"private": private, "token": token, "revision": branch, "tag": tag}
    try:
        if Path(source).is_dir() and not hub.has_weights(Path(source)):
            commit = hub.upload(Path(source), repo_id, "Upload the configuration", **options)
        else:
            place, model, extractor = hub.load(source, token=token)
            commit = hub.push(model, repo_id, extractor, card_of(place, card), **options)
    except ERRORS as reason:
        fail(reason)
    typer.echo(str(commit))


@hub_app.command("check")
def check_command(
    folders: Annotated[list[Path], typer.Argument(help="model folders, or a folder of them")],
):
    """Check cards and configurations: metadata, shapes, and that every score has a source."""
    from . import hub

    places = []
    for folder in folders:
        alone = (folder / "README.md").is_file() or not folder.is_dir()
        places += [folder] if alone else sorted(place for place in folder.iterdir() if place.is_dir())
    failed = 0
    for place in places:
        problems = hub.check(place)
        failed += bool(problems)
        typer.echo(f"{place}: {'fine' if not problems else ''}".rstrip())
        for problem in problems:
            typer.echo(f"  {problem}")
    if failed or not places:
        fail(f"{failed} of {len(places)} folders have problems" if places else "no folders")


def main():
    app()


if __name__ == "__main__":
    main()
