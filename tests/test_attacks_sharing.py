"""What a hostile or broken folder, card or score file may do: nothing but an error of one line that names it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hub_client import CARD
from local_hub import LocalHub
from safetensors.torch import load_file, save_file
from tiny import ROOT, tiny_config, tiny_model, tiny_pipeline
from typer.testing import CliRunner

from earthformer_hf import (
    EarthformerConfig,
    EarthformerFeatureExtractor,
    EarthformerForPrediction,
    EarthformerUNetModel,
    sharing,
)
from earthformer_hf.cli import app
from earthformer_hf.errors import described
from earthformer_hf.evaluation import PROTOCOLS, compare, reports
from earthformer_hf.evaluation.protocols import hash_of
from earthformer_hf.sharing import cards, words
from earthformer_hf.sharing.card_text import MAX_CARD, card_metadata, sections, shown_pictures, tables
from earthformer_hf.sharing.files import check_writable, write_file


GOOD = CARD.replace("tags:", "pipeline_tag: time-series-forecasting\ntags:")
SECRET = "the secret of this machine"


@pytest.fixture
def model(tmp_path):
    sharing.export(tiny_model(), tmp_path / "model", EarthformerFeatureExtractor())
    (tmp_path / "model/README.md").write_text(GOOD)
    return tmp_path / "model"


@pytest.fixture
def pipeline(tmp_path):
    return sharing.export(tiny_pipeline(), tmp_path / "pipeline")


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run(*arguments) -> str:
    """The one line with which the command ends."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1 and type(result.exception) is SystemExit, result.output
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.output
    return line


# -- checks refuse what loading refuses -------------------------------------------------------------------------------


def test_no_code_of_a_folder_runs_and_nobody_asks(model, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    for name, auto in (("preprocessor_config.json", "AutoFeatureExtractor"), ("config.json", "AutoModel")):
        edit(model / name, auto_map={auto: "evil.Evil"}, feature_extractor_type="Evil")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run a stranger's code"))
    sharing.check(model)
    sharing.load(model)
    assert not ran.exists()


def nan_weights(path: Path):
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def only_pickles(folder: Path):
    for path in folder.rglob("*.safetensors"):
        torch.save({}, path.with_suffix(".bin"))
        path.unlink()


PIPELINES = {
    "no scheduler": (lambda f: edit(f / "model_index.json", scheduler=["os", "system"]), "no scheduler of diffusers"),
    "steps": (lambda f: edit(f / "scheduler/scheduler_config.json", num_train_timesteps=-5), "num_train_timesteps"),
    "many steps": (lambda f: edit(f / "scheduler/scheduler_config.json", num_train_timesteps=10**12), "num_train_tim"),
    "NaN scaling": (lambda f: edit(f / "vae/config.json", scaling_factor=float("nan")), "`scaling_factor`"),
    "text as scaling": (lambda f: edit(f / "vae/config.json", scaling_factor="1"), "`scaling_factor`"),
    "list as shift": (lambda f: edit(f / "vae/config.json", shift_factor=[1]), "`shift_factor`"),
    "order": (lambda f: edit(f / "scheduler/scheduler_config.json", solver_order=10**10), "`solver_order` must be"),
    "no scaling": (lambda f: edit(f / "vae/config.json", scaling_factor=0), "`scaling_factor`"),
    "NaN weights": (lambda f: nan_weights(f / "unet/diffusion_pytorch_model.safetensors"), "must be finite"),
    "pickle": (lambda f: only_pickles(f / "vae"), "must be safetensors"),
    "layers": (
        lambda f: edit(f / "vae/config.json", layers_per_block=10**7),
        "`layers_per_block` must be at most 100",
    ),
    "levels": (lambda f: edit(f / "vae/config.json", block_out_channels=[8] * 10**5), "`block_out_channels`"),
    "attention": (lambda f: edit(f / "unet/config.json", layers_per_block=10**7), "layers"),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_that_does_not_load_does_not_pass(pipeline, name):
    assert sharing.check(pipeline) == []
    spoil, message = PIPELINES[name]
    spoil(pipeline)
    with pytest.raises(ValueError, match=message):
        sharing.load(pipeline)
    assert any(message in problem for problem in sharing.check(pipeline)), sharing.check(pipeline)


def shards_elsewhere(folder: Path, name: str):
    """Weights in one shard, and an index that names another file."""
    weights = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder.parent / "outside.safetensors").write_bytes(weights.read_bytes())
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def an_adapter(folder: Path):
    """Which names the model that is loaded."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))


MODELS = {
    "shards above": (lambda f: shards_elsewhere(f, "../outside.safetensors"), "`weight_map` must name files"),
    "shards elsewhere": (lambda f: shards_elsewhere(f, str(f.parent / "outside.safetensors")), "`weight_map` must"),
    "adapter": (an_adapter, "adapters are not loaded"),
    "kernels": (lambda f: edit(f / "config.json", _attn_implementation="x/y"), "names code of a repository"),
    "labels": (lambda f: edit(f / "config.json", num_labels=10**6), "`num_labels` must be"),
    "NaN weights": (lambda f: nan_weights(f / "model.safetensors"), "must be finite"),
    "NaN scaling": (lambda f: edit(f / "preprocessor_config.json", scale=float("nan")), "`scale`"),
    "text": (lambda f: edit(f / "config.json", context_length="13"), "config.json"),
    "NaN": (lambda f: edit(f / "config.json", dropout=float("nan")), "`dropout`"),
    "no JSON": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 3000), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "model.safetensors"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_does_not_load_does_not_pass(model, tmp_path, name):
    assert sharing.check(model) == []
    spoil, message = MODELS[name]
    spoil(model)
    with pytest.raises(ValueError, match=message):
        sharing.load(model)
    assert any(message in problem for problem in sharing.check(model)), sharing.check(model)
    assert message in run("hub", "export", model, tmp_path / "out") and not (tmp_path / "out").exists()


def test_only_a_pickle_is_no_model_without_weights(model):
    only_pickles(model)
    (model / "README.md").write_text(GOOD + "python conversion/convert_earthformer.py\n")
    assert any("must be safetensors, got ['model.bin']" in problem for problem in sharing.check(model))


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"encoder_depths": [10**7, 1]}, "1,000 layers"),
        ({"decoder_depths": [1, 10**7]}, "1,000 layers"),
        ({"self_attention_pattern": [{"size": [1, 1, 1]}] * 100_000}, "at most 1,000 entries, got 100,000"),
        ({"self_attention_pattern": [[{"size": [1, 1, 1]}] * 100_000] * 2}, "at most 1,000 entries, got 100,000"),
        ({"hidden_sizes": [16] * 1000, "encoder_depths": [1] * 1000}, "at most 16 entries"),
        ({"stem_num_convs": 10**7}, "at most 100"),
        ({"context_length": 10**9}, "at most 100,000"),
        ({"image_size": [10**9, 8]}, "at most 100,000"),
        ({"num_global_vectors": 10**9}, "at most 100,000"),
        ({"self_attention_pattern": "full", "image_size": [50_000, 50_000]}, "position biases"),
    ],
)
def test_a_configuration_beyond_the_limits_is_refused_at_once(changes, limit):
    before = time.monotonic()
    with pytest.raises(ValueError, match=limit):
        tiny_config(**changes)
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"layers_per_block": 10**7}, "1,000 layers"),
        ({"block_out_channels": (4,) * 1000}, "at most 16 entries"),
        ({"prediction_length": 10**9}, "at most 100,000"),
    ],
)
def test_a_denoiser_beyond_the_limits_is_refused_at_once(changes, limit):
    before = time.monotonic()
    with pytest.raises(ValueError, match=limit), torch.device("meta"):
        EarthformerUNetModel(**({"sample_size": (6, 8), "in_channels": 4, "block_out_channels": (16, 32)} | changes))
    assert time.monotonic() - before < 5


def test_what_was_released_is_within_the_limits():
    for path in (ROOT / "model_cards").glob("earthformer-*"):
        EarthformerConfig.from_pretrained(path)
    for path in (ROOT / "model_cards").glob("prediff-*"):
        with torch.device("meta"):
            EarthformerUNetModel.from_config(EarthformerUNetModel.load_config(path / "unet"))
            AutoencoderKL.from_config(AutoencoderKL.load_config(path / "vae"))


# -- cards ------------------------------------------------------------------------------------------------------------


def laughs() -> str:
    """30 levels of ten aliases each: 10^30 entries once they are written out."""
    lines = ["tags: &a0 [earthformer]"] + [f"x{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    return "---\n" + "\n".join(lines) + "\nlicense: *a29\n---\n"


CARDS = {
    "aliases": laughs(),
    "merges": "---\na: &a {x: 1}\nb: &b {<<: [*a, *a]}\n---\n",
    "deep": "---\nlicense: " + "[" * 20_000 + "\n---\n",
    "digits": "---\nlicense: " + "9" * 50_000 + "\n---\n",
    "long header": "---\nlicense: " + "x" * 200_000 + "\n---\n",
    "too long": GOOD + "x" * MAX_CARD,
    "fences": GOOD + "```\npython x\n" * 20_000,
    "open fences": GOOD + "```\n" + "python x\n" * 20_000,
    "pipes": GOOD + "|" * 500_000 + "\n",
    "dashes": GOOD + "a | b\n" + "-" * 400_000 + "x|\n",
    "pictures": GOOD + "![" * 250_000,
    "half pictures": GOOD + "![a](" * 150_000,
    "headings": GOOD + "# a\n" * 100_000,
    "line breaks": GOOD.replace("license", "\n" * 50_000 + "license") + "\n" * 500_000,
}


@pytest.mark.parametrize("name", CARDS)
def test_any_card_is_read_at_once(model, name):
    (model / "README.md").write_text(CARDS[name])
    before = time.process_time()
    problems = sharing.check(model)
    assert time.process_time() - before < 6 and sum(map(len, problems)) < 10_000
    if name not in (
        "fences",
        "open fences",
        "pipes",
        "dashes",
        "pictures",
        "half pictures",
        "headings",
        "line breaks",
    ):
        assert any(problem.startswith("README.md: ") for problem in problems)


def test_tags_are_added_to_no_card_that_cannot_be_read():
    with pytest.raises(ValueError, match="alias"):
        cards.with_tags(laughs(), ["x"])
    data, body = card_metadata(cards.with_tags(GOOD, ["radar", "earthformer"]))
    assert data["tags"] == ["earthformer", "radar"] and body == card_metadata(GOOD)[1]


def test_tables_code_and_pictures_are_found():
    table = "words | words\na | b\n--|--\n1 | 2\n\n| c |\n|---|\n"
    text = "![a](a.png)\n## One\n```\npython x\n# no heading\n````\n" + table
    (_, _, none), (title, lines, code) = sections(text)
    assert (title, code, none) == ("One", ["python x", "# no heading"], [])
    assert list(tables(lines)) == [
        ["a | b", "--|--", "1 | 2"], ["| c |", "|---|"],
    ]  # fmt: skip
    assert shown_pictures(text) == ["a.png"]


NAMES = ["a\n# Injected", "a\n```\n# Injected", "[x](http://e)", "<script>", "`x`", "a|b", "![x](y)"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_injects_nothing_into_a_card(name, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    scores = {"protocol": {"name": name}, "windows": 1, "command": f"python x\n```\n# Injected {name}"}
    (folder / "scores.json").write_text(json.dumps(scores | {"scores": {name: {"summary": {"mse": 1.0}}}}))
    facts = {"steps": 1, "batch_size": 1, "num_processes": 1, "skipped_steps": 0, "best_step": 1, "best_loss": 0.1}
    cards.write_card(folder, {"data": {"note": name}}, "noise", **facts)
    extractor = EarthformerFeatureExtractor(variable=name, units=name)
    written = [(folder / "README.md").read_text(), cards.plain_card(tiny_model(), extractor)]
    written.append(cards.converted_card(name, tiny_model(), extractor, {}))
    for text in written:
        titles = [title for title, _, _ in sections(card_metadata(text)[1])]
        assert not any(title.startswith("Injected") for title in titles)
        prose = "\n".join(line for _, lines, _ in sections(text) for line in lines)
        prose = re.sub(r"(?<!\\)`[^`\n]*`", "code", prose)
        assert not re.search(r"(?<!\\)\](?=\(http://e)|(?<!\\)<script|(?<!\\)\]\(y\)", prose)


# -- what is published ------------------------------------------------------------------------------------------------


def spy(folder: Path):
    """What must stay behind, in a folder of a model."""
    for name in (".env", "notes.txt", "checkpoints/last/state.json", "unet_notes/config.json", ".git/config"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_export_holds_nothing_but_the_model(model, tmp_path):
    spy(model)
    result = CliRunner().invoke(app, ["hub", "export", str(model), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    for name in (".env", ".git/", "checkpoints/", "notes.txt"):
        assert f"left behind: {name}\n" in result.output
    assert SECRET.encode() not in everything(tmp_path / "out")
    assert result.output.index("left behind") < result.output.index("written")


@pytest.mark.parametrize("name", ["README.md", "map.png", "scores.json", "config.json", "preprocessor_config.json"])
def test_the_contents_of_a_link_out_of_the_folder_stay(model, tmp_path, name):
    (model / "README.md").write_text(GOOD + "![a map](map.png)\n")
    (model / "map.png").write_bytes(b"a map")
    (model / "scores.json").write_text("{}")
    (model / name).rename(tmp_path / "outside")
    (model / name).symlink_to(tmp_path / "outside")
    line = run("hub", "export", model, tmp_path / "out")
    assert "is a link to" in line and name in line and not (tmp_path / "out").exists()
    assert any("is a link to" in problem for problem in sharing.check(model))
    (model / name).unlink()
    (tmp_path / "outside").rename(model / f"inside-{name}")
    (model / name).symlink_to(model / f"inside-{name}")  # a link within the folder is none of this
    assert CliRunner().invoke(app, ["hub", "export", str(model), str(tmp_path / "out")]).exit_code == 0


def test_a_card_shows_no_secret_as_a_picture(model, tmp_path):
    for name in (".env", "id_rsa", ".hidden.png"):
        (model / name).write_text(SECRET)
        (model / "README.md").write_text(f"{GOOD}![x]({name})\n")
        with pytest.raises(ValueError, match="must be a picture"):
            sharing.export(tiny_model(), tmp_path / "out", card=model / "README.md")


def test_a_push_holds_nothing_but_the_model(model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "README.md").write_text(GOOD + "python conversion/convert_earthformer.py\n")
    edit(model / "config.json", _name_or_path="/home/me/secret/model")
    (model / "scores.json").write_text(json.dumps({"command": "evaluate --output /home/me/secret/out"}))
    spy(model)
    with LocalHub() as hub:
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, "-m", "earthformer_hf.cli", "hub", "push", str(model), "someone/x"]
        pushed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert pushed.returncode == 0, pushed.stderr
        (repository,) = hub.repositories.values()
        files = repository.branches["main"].files
        assert set(files) - {".gitattributes"} == {
            "README.md", "config.json", "preprocessor_config.json", "scores.json",
            *(path.name for path in model.glob("*.py")),
        }  # fmt: skip
        assert not any(SECRET.encode() in content or b"/home/me" in content for content in files.values())
        assert all(f"left behind: {name}" in pushed.stderr for name in (".env", "notes.txt", "checkpoints/"))
    (tmp_path / "outside").write_text("{}")
    (model / "scores.json").unlink()
    (model / "scores.json").symlink_to(tmp_path / "outside")
    assert "is a link to" in run("hub", "push", model, "someone/x")


def test_a_push_vouches_for_no_code_of_a_stranger(model):
    """Of a folder with weights, the code is written anew."""
    (model / "model.safetensors").unlink()
    (model / "README.md").write_text(GOOD + "python conversion/convert_earthformer.py\n")
    with (model / "modeling_earthformer.py").open("a") as file:
        file.write("import os\n")
    line = run("hub", "push", model, "someone/x")
    assert f"{model / 'modeling_earthformer.py'} is not the code of this package" in line


# -- local paths ------------------------------------------------------------------------------------------------------


def test_paths_are_from_the_working_directory_or_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside, outside = str(tmp_path / "runs/a"), "/home/me/secret place/data"
    arguments = ["x", "--output", inside, f"--data_dir={outside}", "-o", f"folder={outside}", "a\n# b"]
    command = words.shown_command(arguments)
    assert command == "x --output runs/a --data_dir=data -o folder=data 'a # b'"
    recipe = words.without_local_paths({"data": {"data_dir": outside, "list": [inside, 5]}, "units": "mm/h"})
    assert recipe == {"data": {"data_dir": "data", "list": ["runs/a", 5]}, "units": "mm/h"}
    text = "read /home/me/x/y.nc and https://example.org/a/b, ../c/d, ~/e/f, 1 / 255 and kg/m/s; file:///home/me/z"
    assert words.without_local_paths(text) == (
        "read y.nc and https://example.org/a/b, ../c/d, ~/e/f, 1 / 255 and kg/m/s; z"
    )


def test_a_score_file_names_no_folder_of_this_machine():
    protocol = PROTOCOLS["icar-enso"]
    document = reports.score_file(
        {"data": {}}, protocol, command="c", model="/home/me/m", left_out={"x": "/home/me/y"}
    )
    assert document["protocol_hash"] == protocol.hash == hash_of(document["protocol"])
    local = type(protocol)(**{**vars(protocol), "dataset": "/home/me/data", "options": {"folder": "/home/me/more"}})
    document = reports.score_file({"data": {}}, local, model="/home/me/m")
    assert "/home" not in json.dumps(document) and document["protocol"]["dataset"] == "data"
    assert document["protocol_hash"] == hash_of(document["protocol"])


def test_a_training_card_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/me/train.py", "--recipe", "/home/me/r.yaml", "--data_dir=/home/me/data"])
    facts = {"steps": 1, "batch_size": 1, "num_processes": 1, "skipped_steps": 0, "best_step": 1, "best_loss": 0.1}
    cards.write_card(tmp_path, {"data": {"data_dir": "/home/me/data"}}, "Files of /home/me/data.", **facts)
    text = (tmp_path / "README.md").read_text()
    assert "/home" not in text and "/opt" not in text and "python train.py --recipe r.yaml --data_dir=data" in text


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_file(tmp_path):
    write_file(tmp_path / "scores.json", "old")
    with pytest.raises(OSError):
        subprocess_limit(lambda: write_file(tmp_path / "scores.json", b"x" * 100_000))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
    assert (tmp_path / "scores.json").read_text() == "old"


def subprocess_limit(write):
    import resource

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_folder_that_cannot_be_written_is_named_before_the_forecasts(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/out cannot be written"):
        check_writable(tmp_path / "file/out")
    module = sys.modules["earthformer_hf.evaluation.evaluate"]
    monkeypatch.setattr(module, "evaluate", lambda *_: pytest.fail("forecasts were made"))
    line = run("evaluate", "--protocol", "nbody-mnist-drawn", "--max-windows", 1, "--output", tmp_path / "file/out")
    assert "file/out cannot be written" in line or "digits" in line or "mnist" in line


@pytest.mark.parametrize("late", [False, True])
def test_an_export_killed_late_leaves_one_whole_folder_and_no_copy(model, tmp_path, late):
    """Killed with a whole draft beside the old folder, and with the old folder in the draft's place."""
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    exporting, (reader, writer) = sys.modules["earthformer_hf.sharing.export"], os.pipe()
    child = os.fork()
    if child == 0:
        publish = exporting.publish

        def slow(*arguments):
            if late:
                publish(*arguments)
            os.write(writer, b"ready")
            time.sleep(60)

        exporting.publish = slow
        try:
            sharing.export(tiny_model(num_global_vectors=0), model, overwrite=True)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 5) == b"ready" and len(list(tmp_path.iterdir())) == 2
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while len(list(tmp_path.iterdir())) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    after = {path.name: path.read_bytes() for path in model.iterdir()}
    assert (after == before) is not late
    sharing.load(model)


def test_there_is_no_moment_without_the_folder(model):
    """Another process looks at the folder all the time while it is replaced again and again."""
    watch = (
        "import json, sys\n"
        "print('ready', flush=True)\n"
        "import select\n"
        "while not select.select([sys.stdin], [], [], 0)[0]:\n"
        "    json.load(open(sys.argv[1] + '/config.json'))\n"
    )
    command = [sys.executable, "-c", watch, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout.readline() == "ready\n"
        for vectors in (0, 2, 0):
            sharing.export(tiny_model(num_global_vectors=vectors), model, overwrite=True)
        watcher.communicate("\n", timeout=20)
    assert watcher.returncode == 0


# -- errors and score files -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "earthformer_hf.cli", "hub", "export", "someone/x", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and line.startswith("error: ") and "127.0.0.1" in line, result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_of_the_client_names_its_host():
    from huggingface_hub.errors import HfHubHTTPError

    client = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
    request = client.Request("GET", "https://hub.example.org/x")
    assert described(client.ConnectError("refused", request=request)) == "hub.example.org: refused"
    assert described(client.InvalidURL("no port")) == "no port"


SHIPPED = sorted((ROOT / "model_cards").glob("*/scores.json"))


def test_the_hashes_of_shipped_scores_stay():
    found = {path.parent.name: json.loads(path.read_text()) for path in SHIPPED}
    hashes = {name: document["protocol_hash"][:8] for name, document in found.items()}
    assert hashes == {
        "earthformer-radar-small": "e7392f08", "earthformer-radar-tiny": "6505d4d0",
        "earthformer-sst-small": "c835b87d", "prediff-radar-small": "9e4fca7d",
    }  # fmt: skip
    for document in found.values():
        assert hash_of(document["protocol"]) == document["protocol_hash"]


def test_a_changed_protocol_is_found_out(tmp_path):
    document = json.loads(SHIPPED[0].read_text())
    document["protocol"]["thresholds"] = [1]
    (tmp_path / "scores.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="`protocol_hash` is not that of its `protocol`"):
        compare([SHIPPED[0], tmp_path / "scores.json"])
    document["protocol_hash"] = hash_of(document["protocol"])
    (tmp_path / "scores.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="differ in thresholds"):
        compare([SHIPPED[0], tmp_path / "scores.json"])


def without(*names):
    return {name: value for name, value in json.loads(SHIPPED[0].read_text()).items() if name not in names}


MALFORMED = {
    "list": [],
    "number": 5,
    "protocol": without("protocol") | {"protocol": "x"},
    "scores": without("scores") | {"scores": []},
    "no system": without("scores") | {"scores": {}},
    "summary": without("scores") | {"scores": {"model": {"summary": [1]}}},
    "no summary": without("scores") | {"scores": {"model": {}}},
    "text": without("scores") | {"scores": {"model": {"summary": {"mse": "0.1"}}}},
    "windows": without("windows") | {"windows": "165"},
    "draws": without() | {"draws": {"model": {"mse": 5}}},
    "foreign draws": without() | {"draws": {}},
    "thresholds": without() | {"headline_thresholds": {"model": 5}},
    "scored": without() | {"scored": {"digest": 5, "events": {}}, "data": {}},
    "events": without() | {"scored": {"digest": "x", "events": {"a": [1]}}, "data": {}},
}


@pytest.mark.parametrize("name", [*MALFORMED, "deep", "NaN", "bytes", "missing", "folder"])
def test_a_malformed_score_file_is_named(tmp_path, name):
    path = tmp_path / "scores.json"
    if name == "folder":
        path.mkdir()
    elif name != "missing":
        odd = {"deep": b"[" * 200_000, "NaN": b'{"windows": NaN}', "bytes": bytes(range(256))}
        path.write_bytes(odd[name] if name in odd else json.dumps(MALFORMED[name]).encode())
    line = run("compare", path, path)
    assert f"{path} is not a score file" in line


def test_a_configuration_does_not_fetch_attention_from_a_repository(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_attn_implementation": "stranger/attention"}))
    with pytest.raises(ValueError, match="`attn_implementation` must be 'eager' or 'sdpa', got 'stranger/attention'"):
        EarthformerForPrediction.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`attn_implementation` must be"):
        tiny_model().set_attn_implementation("stranger/attention")
