"""Checkpoints of a stranger run nothing, damaged ones are named, and a run that leaves no model says so."""

import json
import os
import pickle
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_runs import arguments, assert_equal_runs, run_forked, spoil
from training_run import Options, tiny_run

from earthformer_hf.training import DataArguments, LatentArguments, TrainingArguments


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def sign(folder):
    """Make the manifest fit the files, as an attacker can."""
    from earthformer_hf.training.checkpoint import _digest

    digests = {path.name: _digest(path) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(digests))


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", ".metadata", "x.pt"]
)
def test_resuming_runs_no_code_of_a_checkpoint(tmp_path, data, name):
    assert run_forked(tmp_path / "run", data, stop_at=3, eval_every=100) == [""]
    last, trap = tmp_path / "run/checkpoints/last", tmp_path / "trap"
    if name.endswith(".pkl") or name == ".metadata":
        (last / name).write_bytes(pickle.dumps(Malicious(trap)))
    else:
        torch.save({"a": Malicious(trap)}, last / name)
    sign(last)
    (end,) = run_forked(tmp_path / "run", data, eval_every=100)
    assert not trap.exists()
    known = name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")
    if not known:
        assert end == f"SystemExit: {last} holds {name!r}, which no checkpoint holds; it is not read."


def files_of_a_checkpoint():
    return ["model.safetensors", "average.safetensors", "optimizer.bin", "scheduler.bin", "progress.json"]


@pytest.mark.parametrize("name", [*files_of_a_checkpoint(), "random_states_0.pkl"])
def test_a_damaged_file_of_a_checkpoint_is_named(tmp_path, data, name):
    assert run_forked(tmp_path / "run", data, stop_at=3, eval_every=100) == [""]
    path = tmp_path / "run/checkpoints/last" / name
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (bytes(flipped), good[:-1], None, b""):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        (end,) = run_forked(tmp_path / "run", data, eval_every=100)
        words = "missing" if damaged is None else "not as it was written"
        assert end == f"SystemExit: {path.parent} is damaged: {name} is {words}."
        path.write_bytes(good)
    assert run_forked(tmp_path / "run", data, stop_at=4, eval_every=100) == [""]


def without_states(folder):
    torch.save({"random_state": 1}, folder / "random_states_0.pkl")


def of_a_stranger(folder):
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps(Malicious(folder / "trap")))


def without_average(folder):
    save_file({"step": torch.tensor(3)}, folder / "average.safetensors")


def without_a_step(folder):
    path = folder / "progress.json"
    progress = json.loads(path.read_text())
    del progress["step"]
    path.write_text(json.dumps(progress))


def as_a_link(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def test_a_checkpoint_that_cannot_be_resumed_from_is_refused(tmp_path, data):
    """Files that fit their manifest, and that libraries would pass over in silence."""
    assert run_forked(tmp_path / "run", data, stop_at=3, eval_every=100) == [""]
    crafted = {
        without_states: "cannot be resumed from: 'torch_manual_seed'",
        of_a_stranger: "cannot be resumed from: Weights only load failed",
        without_average: "cannot be resumed from: average.safetensors holds other tensors than the model",
        without_a_step: "is damaged: progress.json is not that of a run",
        as_a_link: "is a link",
    }
    for change, words in crafted.items():
        run = tmp_path / change.__name__
        shutil.copytree(tmp_path / "run", run)
        change(run / "checkpoints/last")
        sign(run / "checkpoints/last")
        (end,) = run_forked(run, data, eval_every=100)
        assert end.startswith(f"SystemExit: {run}/checkpoints/last {words}") and end.count("\n") == 0
        assert not (run / "checkpoints/last/trap").exists()


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "[" * 10**5, '{"progress.json": 1}', "\x00"])
def test_a_damaged_manifest_is_named(tmp_path, data, text):
    assert run_forked(tmp_path / "run", data, stop_at=3, eval_every=100) == [""]
    path = tmp_path / "run/checkpoints/last/manifest.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    (end,) = run_forked(tmp_path / "run", data, eval_every=100)
    assert end.startswith(f"SystemExit: {path.parent} is ") and end.count("\n") == 0
    assert text is not None or "manifest.json is missing" in end


def test_the_average_is_as_it_was(tmp_path, data):
    """Resuming from the tensors gives the numbers of a run that never stopped."""
    assert run_forked(tmp_path / "whole", data) == [""]
    for stop in (3, 6, 12):
        assert run_forked(tmp_path / "parts", data, stop_at=stop) == [""]
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    files = (folder / "checkpoints/last/average.safetensors" for folder in (tmp_path / "whole", tmp_path / "parts"))
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and int(one["step"]) == 12
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, changes",
    [
        (TrainingArguments, {"batch_size": 0}),
        (TrainingArguments, {"total_batch_size": 0}),
        (TrainingArguments, {"patience": 0}),
        (TrainingArguments, {"stop_at": 0}),
        (TrainingArguments, {"learning_rate": -1e-3}),
        (TrainingArguments, {"learning_rate": float("nan")}),
        (TrainingArguments, {"learning_rate": float("inf")}),
        (TrainingArguments, {"warmup_steps": -1}),
        (TrainingArguments, {"ema_decay": 1.5}),
        (TrainingArguments, {"min_lr_rate": -0.1}),
        (TrainingArguments, {"max_grad_norm": 0.0}),
        (TrainingArguments, {"betas": [0.9]}),
        (TrainingArguments, {"betas": [0.9, 1.0]}),
        (LatentArguments, {"encoded_windows": 0}),
        (DataArguments, {"gain": 0.0}),
        (DataArguments, {"frame_stride": 0}),
        (DataArguments, {"eval_stride": 0}),
        (DataArguments, {"teacher_weight": 2.0}),
        (DataArguments, {"tile": [0, 3]}),
        (DataArguments, {"tile": [3]}),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_name(kind, changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must be "):
        kind(**changes)


# -- runs that leave no model ---------------------------------------------------------------------------------------


def test_lost_weights_are_told_from_bad_data(tmp_path, data):
    for on_nan in ("stop", "skip"):
        folder = tmp_path / on_nan
        assert run_forked(folder, data, stop_at=3, eval_every=100, ema_decay=None) == [""]
        path = folder / "checkpoints/last/model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("weight"))
        save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path, {"format": "pt"})
        sign(path.parent)
        (end,) = run_forked(folder, data, eval_every=100, ema_decay=None, on_nan=on_nan)
        assert "step 3: the weights are not finite" in end and "items" not in end
    spoil(data, 7)
    (end,) = run_forked(tmp_path / "data", data, eval_every=100)
    assert "step 3: the loss is not finite; items of the training order: 6 to 7" in end


def test_a_run_without_a_model_fails(tmp_path, data):
    spoil(data, 7)
    (end,) = run_forked(tmp_path / "stop", data, stop_at=3, eval_every=3)
    assert end == "SystemExit: step 3: the validation score is nan; there is no checkpoint yet."
    (end,) = run_forked(tmp_path / "skip", data, on_nan="skip")
    assert end == "SystemExit: no evaluation of 12 steps gave a finite score: there is no model."
    assert not (tmp_path / "skip/model.safetensors").exists()


def test_two_runs_in_one_folder_are_refused_and_a_kill_frees_it(tmp_path, data):
    folder = tmp_path / "run"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        try:
            tiny_run(arguments(folder, eval_every=3), Options(str(data)), figure_of=partial(_wait, folder))
        finally:
            os._exit(1)
    while not (folder / "waiting").exists():
        time.sleep(0.05)
    (end,) = run_forked(folder, data)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert end == f"SystemExit: another run writes into {folder}; choose another `output_dir`."
    assert run_forked(folder, data) == [""]
    assert json.loads((folder / "checkpoints/last/progress.json").read_text())["step"] == 12


def _wait(folder, model):
    (folder / "waiting").touch()
    time.sleep(60)


def test_two_processes_of_one_run_share_its_folder(tmp_path, data):
    assert run_forked(tmp_path / "run", data, 2, stop_at=2, eval_every=100) == ["", ""]
