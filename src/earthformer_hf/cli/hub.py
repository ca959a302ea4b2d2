"""Commands that write, push and check model folders."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .frame import Private, RepoId, Token, fail, fails_in_one_line, hub_app


ModelSource = Annotated[str, typer.Argument(metavar="SOURCE", help="a model folder, or a hub id")]
Card = Annotated[Path | None, typer.Option(help="model card, a Markdown file; that of SOURCE if omitted")]


def card_of(folder: Path) -> Path | None:
    card = folder / "README.md"
    return card if card.is_file() else None


def say_what_is_left_behind(folder: Path):
    """List what of a folder is not published; a link out of it ends the command."""
    from .. import sharing

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
    from .. import sharing

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
    from .. import sharing

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
    from .. import sharing

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


__all__ = ["check_command", "export_command", "push_command"]
