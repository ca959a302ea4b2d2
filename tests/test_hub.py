"""Folders and hub repositories: complete or absent, the same bytes each time, loadable with this package and without.

The round trips run in two client processes (`hub_client.py`) against a hub in memory (`local_hub.py`).
"""

import ast
import ctypes
import errno
import importlib
import inspect
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, DiffusionPipeline
from hub_client import CARD, GROUPS
from local_hub import LocalHub
from tiny import ROOT, tiny_model, tiny_pipeline
from transformers import FeatureExtractionMixin, PreTrainedModel
from typer.main import get_command
from typer.testing import CliRunner

from earthformer_hf import (
    EarthformerConfig,
    EarthformerFeatureExtractor,
    EarthformerForPrediction,
    EarthformerModel,
    PreDiffPipeline,
    __version__,
    sharing,
)
from earthformer_hf.cli import app
from earthformer_hf.sharing.export import CONFIGURATION_ENTRIES, PACKAGE, self_contained
from earthformer_hf.sharing.loading import networks_of


# -- round trips ------------------------------------------------------------------------------------------------------


def client(local_hub: LocalHub, work: Path, group: str) -> dict[str, str]:
    environment = local_hub.environment(work / f"home-{group}")
    script = Path(__file__).with_name("hub_client.py")
    result = subprocess.run(
        [sys.executable, script, group, work], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stderr
    return json.loads((work / f"{group}.json").read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub() as local_hub:
        yield local_hub, tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def results(hub):
    return client(*hub, "with_package") | client(*hub, "without_package")


@pytest.fixture(scope="module")
def more_results(hub):
    return client(*hub, "more")


def checks(*groups: str):
    return pytest.mark.parametrize("check", [function.__name__ for group in groups for function in GROUPS[group]])


@checks("with_package", "without_package")
def test_round_trip(results, check):
    assert results[check] == "passed", results[check]


@pytest.mark.slow
@checks("more")
def test_round_trip_of_variants(more_results, check):
    assert more_results[check] == "passed", more_results[check]


# -- writing folders --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tiny_objects() -> dict:
    pipeline = tiny_pipeline(alignment=True, forecaster=True)
    pipeline.register_modules(feature_extractor=EarthformerFeatureExtractor(scale=0.5))
    return {"model": tiny_model(), "pipeline": pipeline, "extractor": EarthformerFeatureExtractor(scale=0.5)}


@pytest.mark.parametrize("name", ["model", "pipeline", "extractor"])
def test_the_same_model_gives_the_same_bytes(name, tmp_path):
    shared = tiny_objects()[name]
    first = contents(sharing.export(shared, tmp_path / "a"))
    assert not any(path.startswith(".") for path in first) and "README.md" in first
    sharing.export(shared, tmp_path / "a")  # which holds exactly this already
    loaded = type(shared).from_pretrained(tmp_path / "a")
    assert contents(sharing.export(loaded, tmp_path / "elsewhere" / "b")) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "elsewhere"]


def test_a_model_without_a_head_and_a_pipeline_without_options(tmp_path):
    headless = tiny_model().model
    assert type(headless) is EarthformerModel
    sharing.export(headless, tmp_path / "model")
    assert type(sharing.load(tmp_path / "model")[1]) is EarthformerModel
    sharing.export(tiny_pipeline(), tmp_path / "pipeline")
    loaded = sharing.load(tmp_path / "pipeline")[1]
    assert loaded.alignment is None and loaded.feature_extractor is None


def test_half_precision_stays(tmp_path):
    sharing.export(tiny_pipeline(alignment=True).to(torch.float16), tmp_path / "a")
    _, loaded, _ = sharing.load(tmp_path / "a")
    assert {network.dtype for network in (loaded.vae, loaded.unet, loaded.alignment)} == {torch.float16}
    sharing.export(loaded, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_nothing_else_is_overwritten_unasked(tmp_path):
    model = tiny_model()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("all my work")
    for overwrite in (False, True):  # not a model: never
        with pytest.raises(ValueError, match="something else|replaced as a whole only"):
            sharing.export(model, folder, overwrite=overwrite)
    assert contents(folder) == {"thesis.txt": b"all my work"}

    sharing.export(model, tmp_path / "model")
    before = contents(tmp_path / "model")
    other = tiny_model(num_global_vectors=0)
    with pytest.raises(ValueError, match="overwrite=True"):
        sharing.export(other, tmp_path / "model")
    assert contents(tmp_path / "model") == before
    sharing.export(other, tmp_path / "model", overwrite=True)
    assert EarthformerConfig.from_pretrained(tmp_path / "model").num_global_vectors == 0
    (tmp_path / "model" / ".git").mkdir()
    with pytest.raises(ValueError, match="git checkout"):
        sharing.export(model, tmp_path / "model", overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        sharing.export(model, folder / "thesis.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model"]


def spoil(path: Path, content: str):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("thesis.txt", "all my work", "thesis.txt is no file of an export"),
        ("README.md.orig", "the card before", "README.md.orig is no file"),
        ("data/README.md", "of my data", "data/README.md is no file"),
        ("unet/notes.txt", "mine", "unet/notes.txt is no file"),
        ("training.py", "my code", "training.py is no file"),
        ("config.json", "{}", "config.json is of something else"),
        ("config.json", '{"model_type": "bert"}', "config.json is of something else"),
        ("config.json", "mine", "config.json is of something else"),
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline"}', "model_index.json is of something else"),
        ("preprocessor_config.json", "[1]", "preprocessor_config.json is of something else"),
    ],
)
def test_what_is_no_export_is_never_overwritten(file, content, message, tmp_path):
    sharing.export(tiny_model(), tmp_path / "model")
    spoil(tmp_path / "model" / file, content)
    before = contents(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        sharing.export(tiny_model(num_global_vectors=0), tmp_path / "model", overwrite=True)
    assert contents(tmp_path / "model") == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_whatever_is_exported_can_be_overwritten(tmp_path):
    spoil(tmp_path / "card/README.md", GOOD + "![a map](map.png)")
    spoil(tmp_path / "card/map.png", "picture")
    spoil(tmp_path / "card/scores.json", "{}")
    card = tmp_path / "card/README.md"
    for shared in [*tiny_objects().values(), tiny_model()]:  # shards and pictures too; one kind after the other
        sharing.export(shared, tmp_path / "out", card=card, overwrite=True, max_shard_size="20KB")
    model = tiny_model()
    sharing.export(model, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(sharing.export(model, tmp_path / "new"))


def test_the_working_directory_and_links(tmp_path, monkeypatch):
    model, other = tiny_model(), tiny_model(num_global_vectors=0)
    expected = contents(sharing.export(model, tmp_path / "model"))
    for name in ("here", "target"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    sharing.export(model, ".")
    assert contents(Path(".")) == contents(tmp_path / "here") == expected
    with pytest.raises(ValueError, match="the working directory is in it"):
        sharing.export(other, ".", overwrite=True)
    assert contents(Path(".")) == expected

    (tmp_path / "link").symlink_to(tmp_path / "target")
    for _ in range(2):  # to a folder that is empty, later to none
        sharing.export(other, tmp_path / "link")
        sharing.export(model, tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink() and contents(tmp_path / "target") == expected
        shutil.rmtree(tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "model"]


def test_a_folder_on_another_disk(tmp_path, monkeypatch):
    """Nothing can be moved between a mount point and its parent, nor between a link and what it leads to."""
    model, other = tiny_model(), tiny_model(num_global_vectors=0)
    expected = [contents(sharing.export(network, tmp_path / name)) for name, network in (("a", model), ("b", other))]
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    rename = os.rename

    def rename_within_one_disk(source, target, **options):
        disks = {Path(path).is_relative_to(mounted) for path in (source, target)}
        if len(disks) == 2 or Path(source) == mounted:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target, **options)

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as elsewhere:
        (tmp_path / "link").symlink_to(elsewhere)
        monkeypatch.setattr(os, "rename", rename_within_one_disk)
        for folder in (mounted, tmp_path / "link"):
            sharing.export(model, folder)
            assert contents(folder) == expected[0]
            sharing.export(other, folder, overwrite=True)
            assert contents(folder) == expected[1]


def test_a_failure_while_files_are_replaced_undoes_it(tmp_path, monkeypatch):
    before = contents(sharing.export(tiny_model(), tmp_path / "out"))
    rename, left = os.rename, 0

    def rename_until_it_fails(source, target, **options):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", rename_until_it_fails)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())  # a system that cannot swap two folders
    for left in (1, len(before), 2 * len(before)):  # noqa: B007 # the first file out, the last; the last one in
        with pytest.raises(OSError, match="Input/output"):
            sharing.export(tiny_model(num_global_vectors=0), tmp_path / "out", overwrite=True)
        assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["model", "pipeline"])
def test_a_plain_card_passes_and_what_it_shows_runs_no_code(name, tmp_path):
    folder = sharing.export(tiny_objects()[name], tmp_path / "out")
    assert sharing.check(folder) == []
    for path in folder.rglob("*.py"):
        path.write_text("raise RuntimeError('it was run')\n")
    card = (folder / "README.md").read_text()
    size = {"model": (20, 28), "pipeline": (12, 16)}[name]
    names = {"folder": folder, "past_values": torch.zeros(1, 3, *size, 1)}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert type(names[name]) is {"model": EarthformerForPrediction, "pipeline": PreDiffPipeline}[name]
    shapes = {"model": (1, 4, 20, 28, 1), "pipeline": (1, 8, 2, 12, 16, 1)}
    assert names["predictions"].shape == shapes[name]
    assert {"model": "(B, 4, 20, 28, 1)", "pipeline": "(B, E, 2, 12, 16, 1)"}[name] in card


@pytest.mark.parametrize("name", ["model", "pipeline"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_no_half_folder(name, existing, tmp_path):
    shared = tiny_objects()[name]
    before = contents(sharing.export(shared, tmp_path / "out")) if existing else None
    with torch.no_grad():
        network = shared if name == "model" else shared.unet
        next(network.parameters()).add_(1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))  # no file grows beyond: writing fails half-way
    try:
        with pytest.raises(OSError):
            sharing.export(shared, tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
    if existing:
        assert contents(tmp_path / "out") == before
    assert sharing.load(sharing.export(shared, tmp_path / "out", overwrite=True))[1] is not None


def test_what_cannot_be_exported_is_refused(tmp_path):
    model, extractor = tiny_model(), EarthformerFeatureExtractor()
    foreign = tiny_pipeline()
    foreign.unet = torch.nn.Linear(1, 1)
    for shared, beside, message in (
        (torch.nn.Linear(1, 1), None, "torch.nn"),
        (foreign, None, "unet must be a EarthformerUNetModel"),
        (model, model, "`feature_extractor` must be"),
        (tiny_pipeline(), extractor, "brings its own"),
        (extractor, extractor, "is one itself"),
    ):
        with pytest.raises(ValueError, match=message):
            sharing.export(shared, tmp_path / "out", beside)
    with pytest.raises(ValueError, match="`card` must be a Markdown file"):
        sharing.export(model, tmp_path / "out", card=tmp_path / "missing.md")
    with pytest.raises(ValueError, match="no weights"):
        sharing.load(ROOT / "model_cards/earthformer-sevir")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ours", "library"),
    [
        (EarthformerForPrediction, PreTrainedModel),
        (EarthformerFeatureExtractor, FeatureExtractionMixin),
        (PreDiffPipeline, DiffusionPipeline),
    ],
)
def test_push_to_hub_takes_what_the_library_takes(ours, library):
    assert "push_to_hub" in {name for base in ours.__mro__[: ours.__mro__.index(library)] for name in vars(base)}
    expected = inspect.signature(library.push_to_hub).parameters.values()
    found = inspect.signature(ours.push_to_hub).parameters
    for parameter in expected:
        assert (found[parameter.name].kind, found[parameter.name].default) == (parameter.kind, parameter.default)


def names_at_top(source: str) -> set[str]:
    """Functions, classes and variables of a module, without its imports."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names - {"__all__", "logger"}


@pytest.mark.parametrize(
    ("module", "siblings"),
    [
        ("unet_earthformer", ["cuboid", "folding", "winograd"]),
        (
            "modeling_earthformer",
            [
                "cuboid",
                "folding",
                "advection",
                "calibration",
                "linear_forecast",
                "configuration_earthformer",
                "loading_earthformer",
                "stem_earthformer",
            ],
        ),
    ],
)
def test_a_self_contained_module_mixes_up_no_names(module, siblings):
    source = self_contained(module)
    parts = [names_at_top((PACKAGE / f"{part}.py").read_text()) for part in (module, *siblings)]
    assert len(set.union(*parts)) == sum(map(len, parts))  # none in two of them
    assert names_at_top(source) == set.union(*parts)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in imports)


# -- checking folders -------------------------------------------------------------------------------------------------


GOOD = CARD.replace("tags:", "pipeline_tag: time-series-forecasting\ntags:")
INDEX = """model-index:
- name: ours
  results:
  - task: {type: time-series-forecasting}
    dataset: {name: rain, type: rain}
    metrics: [{type: mse, value: 0.25}]
    source: {name: examples/evaluate.py, url: "https://example.org"}
"""


@pytest.fixture
def folder(tmp_path):
    sharing.export(tiny_model(), tmp_path / "model", EarthformerFeatureExtractor())
    (tmp_path / "model/README.md").write_text(GOOD)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("license: apache-2.0\n", "", "`license`"),
        ("library_name: transformers", "library_name: diffusers", "`library_name` must be 'transformers'"),
        ("pipeline_tag: time-series-forecasting\n", "", "`pipeline_tag`"),
        ("tags: [earthformer]", "tags: earthformer", "`tags` must be a list"),
        ("tags: [earthformer]", "tags: [radar]", "earthformer or prediff"),
        ("license:", "datasets: sevir\nlicense:", "`datasets` must be a list"),
        ("license: apache-2.0", "license: [", "no YAML"),
        ("---\nlicense", "license", "does not begin with metadata"),
        ("Written by hand.", "![a map](../map.png)", "it shows '../map.png'"),
        ("Written by hand.", "| model | CSI-M |\n|---|---|\n| this | 0.44 |", "a score without a source"),
        ("Written by hand.", "| MSE | source |\n|---|---|\n| 0.1 | |", "a score without a source: 0.1"),
        ("Written by hand.", "| MSE | source |\n|---|---|\n| 0.1 | - |", "a score without a source: 0.1"),
        ("Written by hand.", "model | CSI\n---|---\nthis | 0.44", "a score without a source"),
        ("Written by hand.", "| | 10 min |\n|---|---|\n| `pod_74` | 0.44 |", "a score without a source"),
        ("tags: [earthformer]", "tags: 5", "`tags` must be a list"),
        ("# Ours", "# Our scores\n\n| a | b |\n|---|---|\n| x | 1 |", "a score without a source"),
        ("license:", INDEX + "license:", "mse 0.25 is not in scores.json"),
        ("license:", INDEX[: INDEX.index("    source")] + "license:", "mse 0.25 has no source"),
    ],
)
def test_a_card_that_claims_too_much_or_says_too_little(folder, old, new, problem):
    assert sharing.check(folder) == []
    (folder / "README.md").write_text(GOOD.replace(old, new, 1))
    assert any(problem in found for found in sharing.check(folder)), sharing.check(folder)


METRICS = "POD FAR CSI-M CSI219 csi_74 CSIM HSS ETS FSS bias CRPS CRPSS FID corr. Pearson RMSE".split()


@pytest.mark.parametrize("metric", METRICS)
def test_a_score_of_any_name_needs_a_source(folder, metric):
    (folder / "README.md").write_text(f"{GOOD}\n| model | {metric} |\n|---|---|\n| this | 0.44 |\n")
    assert any("a score without a source" in problem for problem in sharing.check(folder))


def test_a_table_of_tensors_holds_no_scores(folder):
    (folder / "README.md").write_text(f"{GOOD}\n| there | here |\n|---|---|\n| `z_proj.bias` | `start_proj.bias` |\n")
    assert sharing.check(folder) == []


def edit_config(folder, **changes):
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | changes))


def broken_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:5000])


def broken_scores(folder):
    (folder / "README.md").write_text(GOOD.replace("license:", INDEX + "license:"))
    (folder / "scores.json").write_text("{oops")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (broken_weights, "model.safetensors cannot be read"),
        (broken_scores, "scores.json is no JSON"),
        (lambda folder: (folder / "README.md").write_bytes(b"---\nlicense: \xe9\n---\n"), "it is no UTF-8"),
        (lambda folder: (folder / "config.json").write_text("[]"), "configuration"),
        (lambda folder: edit_config(folder, context_length="x"), "context_length"),
        (lambda folder: edit_config(folder, num_global_vectors=3), "the weights do not fit the configuration"),
    ],
)
def test_broken_files_are_named(folder, spoil, problem):
    spoil(folder)
    assert any(problem in found for found in sharing.check(folder)), sharing.check(folder)
    result = CliRunner().invoke(app, ["hub", "check", str(folder)])
    assert type(result.exception) is SystemExit and problem in result.output
    if spoil is not broken_scores:
        result = CliRunner().invoke(app, ["hub", "export", str(folder), str(folder.parent / "out")])
        assert type(result.exception) is SystemExit and result.output.strip().splitlines()[-1].startswith("error: ")
        assert not (folder.parent / "out").exists()


def test_scores_with_a_source_pass(folder):
    table = "| model | CSI-M |\n|---|---|\n| this | 0.44 |\n"
    measured = f"## Scores\n\n```\npython examples/evaluate.py --model this\n```\n\n{table}"
    sourced = "| MSE | source |\n|---|---|\n| 0.1 | the authors |\n"
    (folder / "scores.json").write_text(json.dumps({"scores": {"model": {"mse": 0.25}}}))
    (folder / "README.md").write_text(GOOD.replace("license:", INDEX + "license:") + measured + "## More\n" + sourced)
    assert sharing.check(folder) == []


def test_pictures_and_scores_travel_with_the_card(tmp_path):
    card = tmp_path / "card/README.md"
    card.parent.mkdir()
    card.write_text(GOOD + "![a map](map.png) ![elsewhere](https://example.org/x.png)")
    with pytest.raises(ValueError, match="map.png"):
        sharing.export(tiny_model(), tmp_path / "model", card=card)
    assert not (tmp_path / "model").exists()
    for name in ("config.json", "modeling_earthformer.py", "README.md"):  # no picture replaces what a model is made of
        shows = tmp_path / "other/README.md"
        shows.parent.mkdir(exist_ok=True)
        shows.write_text(f"{GOOD}![a map]({name})")
        (shows.parent / name).touch()
        with pytest.raises(ValueError, match=f"{name}', which is a file of the model"):
            sharing.export(tiny_model(), tmp_path / "model", card=shows)
    (card.parent / "map.png").write_bytes(b"picture")
    (card.parent / "scores.json").write_text("{}")
    sharing.export(tiny_model(), tmp_path / "model", card=card)
    assert (tmp_path / "model/map.png").read_bytes() == b"picture" and (tmp_path / "model/scores.json").exists()
    assert sharing.check(tmp_path / "model") == []


def test_a_configuration_and_weights_that_do_not_work(folder):
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"num_attention_heads": 5}))
    assert any("multiples of num_attention_heads=5" in problem for problem in sharing.check(folder))
    (folder / "config.json").write_text(json.dumps(stored | {"num_global_vectors": 3}))
    assert any("weights do not fit" in problem for problem in sharing.check(folder))
    (folder / "config.json").unlink()
    assert any("neither config.json nor model_index.json" in problem for problem in sharing.check(folder))


def test_without_weights_the_card_tells_how_to_get_them(folder):
    (folder / "model.safetensors").unlink()
    assert any("conversion command" in problem for problem in sharing.check(folder))


def test_the_command_checks_a_folder_of_folders(folder):
    result = CliRunner().invoke(app, ["hub", "check", str(folder.parent)])
    assert result.exit_code == 0 and "fine" in result.output
    shutil.copytree(folder, folder.parent / "second")
    (folder.parent / "second/README.md").unlink()
    result = CliRunner().invoke(app, ["hub", "check", str(folder.parent)])
    assert result.exit_code == 1 and "README.md: missing" in result.output and "1 of 2" in result.output
    result = CliRunner().invoke(app, ["hub", "export", str(folder), str(folder.parent / "second")])
    assert result.exit_code == 1 and "something else" in result.output


def test_the_command_tells_its_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"earthformer_hf {__version__}\n"


def test_every_argument_and_option_has_help():
    commands = {"": get_command(app)}
    while groups := {name: group for name, group in commands.items() if hasattr(group, "commands")}:
        for name, group in groups.items():
            commands |= {f"{name} {key}".strip(): command for key, command in group.commands.items()}
            del commands[name]
    assert {"evaluate", "hub push", "data info"} <= commands.keys()
    silent = [(name, p.name) for name, command in commands.items() for p in command.params if not p.help]
    assert silent == [] and all(command.help for command in commands.values())


def test_without_typer_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("earthformer_hf.cli")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"earthformer-hf\[cli\]"):
        importlib.import_module("earthformer_hf.cli")


# -- the cards in this repository -------------------------------------------------------------------------------------

CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))
WITH_CONFIGURATION = [card for card in CARDS if any((card / name).is_file() for name in CONFIGURATION_ENTRIES)]


@pytest.mark.parametrize("card", WITH_CONFIGURATION, ids=lambda card: card.name)
def test_our_cards_pass(card):
    assert sharing.check(card) == []


@pytest.mark.parametrize("name", ["sevir", "icar_enso", "earthnet2021"])
def test_the_released_settings_are_the_recipes(name):
    folder = ROOT / "model_cards" / f"earthformer-{name.replace('_', '-')}"
    stored = EarthformerConfig.from_pretrained(folder)
    recipe = yaml.safe_load((ROOT / f"examples/configs/earthformer_{name}.yaml").read_text())
    assert {key: getattr(stored, key) for key in recipe["model"]} == recipe["model"]
    extractor = EarthformerFeatureExtractor.from_pretrained(folder)
    assert extractor.to_dict() == EarthformerFeatureExtractor(**recipe["feature_extractor"]).to_dict()
    with torch.device("meta"):
        parameters = EarthformerForPrediction(stored).num_parameters()
    assert f"{parameters:,} parameters" in " ".join((folder / "README.md").read_text().split())


def test_the_released_pipeline_is_the_recipe():
    folder = ROOT / "model_cards/prediff-sevir-lr"
    recipe = yaml.safe_load((ROOT / "examples/configs/prediff_sevir_lr.yaml").read_text())
    networks = {path.name: network for path, network in networks_of(folder).items()}
    for part, name in (("vae", "vae"), ("unet", "unet"), ("alignment_network", "alignment")):
        config = networks[name].config
        assert {key: getattr(config, key) for key in recipe[part]} == recipe[part], part
        parameters = sum(parameter.numel() for parameter in networks[name].parameters())
        assert f"{parameters:,}" in (folder / "README.md").read_text()
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert recipe["scheduler"].pop("class") == "DDPMScheduler"
    assert {key: scheduler.config[key] for key in recipe["scheduler"]} == recipe["scheduler"]
    assert networks["vae"].config.latent_channels == networks["unet"].config.in_channels
    # the index is that of an exported pipeline
    index = DiffusionPipeline.load_config(folder)
    assert index["unet"] == ["unet_earthformer", "EarthformerUNetModel"]


def test_extractors_map_the_archives_ranges_to_0_and_1():
    for name, low, high in (
        ("earthformer-sevir", 0, 255),
        ("prediff-sevir-lr/feature_extractor", 0, 255),
        ("earthformer-icar-enso", -16.549121856689453, 10.198975563049316),
    ):
        extractor = EarthformerFeatureExtractor.from_pretrained(ROOT / "model_cards" / name)
        values, _ = extractor.encode([low, high])
        assert values.tolist() == pytest.approx([0, 1], abs=1e-6)
