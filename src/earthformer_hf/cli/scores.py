"""Commands that score models."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .frame import app, fails_in_one_line


@app.command("evaluate")
@fails_in_one_line
def evaluate_command(
    model: Annotated[
        str | None, typer.Option(help="a model folder, a hub id, or a .zarr of `archive`; baselines only if omitted")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="a name, or a .yaml file; the one that the model names if omitted")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="EARTHFORMER_HF_DATA, or ../shared/data if omitted")] = None,
    ensemble_size: Annotated[int, typer.Option(help="members")] = 8,
    num_inference_steps: Annotated[int, typer.Option(help="of a pipeline")] = 10,
    max_windows: Annotated[int | None, typer.Option(help="a quick look at so many windows")] = None,
    output: Annotated[Path | None, typer.Option(help="folder for scores.json and figures")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="tell the scores in the card of the model's folder too")
    ] = False,
    further_baseline: Annotated[
        list[str] | None,
        typer.Option(help="a baseline to score beside the protocol's, such as advection; may be repeated"),
    ] = None,
    new_protocol: Annotated[
        Path | None,
        typer.Option(help="write a protocol for your own data, to fill in"),
    ] = None,
):
    """Score a model under a protocol, beside forecasts without a neural network."""
    from ..evaluation import run_protocol
    from ..evaluation.own_protocol import write_template
    from ..sharing.words import shown_command

    if new_protocol is not None:
        write_template(new_protocol)
        typer.echo(f"{new_protocol}: written")
        return
    command = shown_command(["earthformer-hf", *sys.argv[1:]])
    settings = (ensemble_size, num_inference_steps, max_windows)
    run_protocol(
        model, protocol, data_dir, *settings, output, command, show=typer.echo, card=card,
        further_baselines=further_baseline or (),
    )  # fmt: skip


@app.command("compare")
@fails_in_one_line
def compare_command(files: Annotated[list[Path], typer.Argument(help="scores.json files of one protocol")]):
    """Put score files side by side; those of different protocols or of other data are refused."""
    from ..evaluation import compare

    typer.echo(compare(files))


__all__ = ["compare_command", "evaluate_command"]
