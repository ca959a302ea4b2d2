"""Runs that are killed, starved, fed with nonsense, or spread over processes end like one that was left alone."""

import json
import resource
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import ROOT
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_run import Items, Options, in_children, tiny_run

from earthformer_hf import EarthformerForPrediction, sharing
from earthformer_hf.sharing.cards import write_card
from earthformer_hf.training import Run, TrainingArguments, mean_over, validation_generator
from earthformer_hf.training.distributed import load_gathered
from earthformer_hf.training.seeds import derive_seed


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def arguments(folder, **changes) -> TrainingArguments:
    options = {
        "max_steps": 12, "batch_size": 2, "warmup_steps": 2, "eval_every": 6, "save_every": 3, "ema_decay": 0.9,
        "learning_rate": 5e-3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **(options | changes))


def run_forked(folder, data, ranks=1, options=None, **changes) -> list[str]:
    options = Options(str(data), **(options or {}))
    return in_children(lambda: tiny_run(arguments(folder, **changes), options), ranks)


def weights(folder, file="checkpoints/last/model.safetensors"):
    return load_file(folder / file)


def assert_equal_runs(one, other):
    """The same last and best weights, bit for bit, and the same progress."""
    for file in ("checkpoints/last/model.safetensors", "model.safetensors"):
        first, second = weights(one, file), weights(other, file)
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    first, second = ((folder / "checkpoints/last/progress.json").read_text() for folder in (one, other))
    assert first == second


def assert_close(one, other, atol):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol)


# Faults


def test_a_kill_in_the_middle_of_a_step_changes_nothing(tmp_path, data):
    assert run_forked(tmp_path / "whole", data) == [""]
    assert run_forked(tmp_path / "killed", data, options={"kill_step": 8}) == ["killed"]
    assert json.loads((tmp_path / "killed/checkpoints/last/progress.json").read_text())["step"] == 6
    assert run_forked(tmp_path / "killed", data) == [""]
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_at_any_moment_of_a_checkpoint_changes_nothing(tmp_path, data, ranks):
    assert run_forked(tmp_path / "whole", data, ranks) == [""] * ranks
    event, ends = 0, ["killed"]
    while "killed" in ends:  # at every access to the folder of checkpoints, while the first two are written
        event += 1
        folder = tmp_path / f"killed-{event}"
        ends = run_forked(folder, data, ranks, {"kill_event": event}, stop_at=4)
        assert run_forked(folder, data, ranks) == [""] * ranks
        assert_equal_runs(tmp_path / "whole", folder)
    assert event > 10


@pytest.mark.slow
def test_a_kill_of_one_of_two_processes_changes_nothing(tmp_path, data):
    assert run_forked(tmp_path / "whole", data, 2) == ["", ""]
    assert run_forked(tmp_path / "killed", data, 2, {"kill_step": 8})[1] == "killed"
    assert run_forked(tmp_path / "killed", data, 2) == ["", ""]
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


def spoil(data, number):
    """Not-a-number in an item; the items of step n of two samples are 2 n and 2 n + 1."""
    path = data / f"{number:02d}.npy"
    good = np.load(path)
    np.save(path, np.where(good > 0.9, np.nan, good))


def test_a_loss_that_is_not_finite_stops_with_its_items(tmp_path, data):
    spoil(data, 9)
    with pytest.raises(
        SystemExit, match=r"step 4: the loss is not finite; items of the training order: 8 to 9; the l"
    ):
        tiny_run(arguments(tmp_path / "run"), Options(str(data)))
    assert json.loads((tmp_path / "run/checkpoints/last/progress.json").read_text())["step"] == 3


@pytest.mark.slow
def test_all_processes_agree_on_a_loss_that_is_not_finite(tmp_path, data):
    spoil(data, 9)  # of 8 per step, in micro-batches of 2 on 2 processes: 8 9 | 10 11, then 12 13 | 14 15
    ends = run_forked(tmp_path / "run", data, 2, total_batch_size=8)
    assert "step 1: the loss is not finite; items of the training order: 8 to 9;" in "".join(ends)
    assert run_forked(tmp_path / "skip", data, 2, total_batch_size=8, on_nan="skip", eval_every=100) == ["", ""]
    assert json.loads((tmp_path / "skip/checkpoints/last/progress.json").read_text())["skipped"] == 6
    for value in weights(tmp_path / "skip").values():
        assert value.isfinite().all()


def test_a_stream_says_whose_items_are_not_finite(tmp_path, data):
    spoil(data, 9)  # the fifth item of the second process, which takes every other file
    ends = run_forked(tmp_path / "run", data, 2, {"stream": True})
    assert "step 2: the loss is not finite; items of the training order: 4 to 5 of process 1's share;" in "".join(ends)


def test_a_skipped_step_moves_nothing_and_is_counted(tmp_path, data):
    tiny_run(arguments(tmp_path / "three", stop_at=3, eval_every=100), Options(str(data)))
    AcceleratorState._reset_state(reset_partial_state=True)
    spoil(data, 7)
    tiny_run(arguments(tmp_path / "four", stop_at=4, eval_every=100, on_nan="skip"), Options(str(data)))
    one, other = weights(tmp_path / "three"), weights(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    progress = json.loads((tmp_path / "four/checkpoints/last/progress.json").read_text())
    assert progress["step"] == 4 and progress["skipped"] == 1


def test_a_figure_that_cannot_be_written_leaves_the_last_checkpoint(tmp_path, data):
    from matplotlib.figure import Figure

    (tmp_path / "run/figures/step_000006.png").mkdir(parents=True)
    with pytest.raises(SystemExit, match="step_000006.png cannot be written.*the last checkpoint is"):
        tiny_run(arguments(tmp_path / "run"), Options(str(data)), figure_of=lambda model: Figure())
    assert json.loads((tmp_path / "run/checkpoints/last/progress.json").read_text())["step"] == 3


def test_a_score_of_fewer_items_than_processes_is_refused():
    with pytest.raises(ValueError, match="at least one item for each of 1 processes, got 0"):
        mean_over([], 2, lambda batch: None, Accelerator(cpu=True))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, data):
    assert run_forked(tmp_path / "whole", data) == [""]
    assert run_forked(tmp_path / "full", data, stop_at=3) == [""]

    def with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        tiny_run(arguments(tmp_path / "full", eval_every=100), Options(str(data)))

    (end,) = in_children(with_little_room)
    assert "step 6:" in end and "cannot be written" in end and "the last checkpoint is" in end
    assert end.count("\n") == 0
    assert run_forked(tmp_path / "full", data) == [""]
    assert_equal_runs(tmp_path / "whole", tmp_path / "full")


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", ["vanished", "cut"])
def test_data_that_cannot_be_read_stops_in_one_line(tmp_path, data, fault, workers):
    assert run_forked(tmp_path / "run", data, stop_at=3, eval_every=100) == [""]
    path = data / "09.npy"
    if fault == "vanished":
        path.rename(data / "09.gone")
        (data / "09.npy").symlink_to(data / "nowhere")
    else:
        path.write_bytes(path.read_bytes()[:500])
    (end,) = run_forked(tmp_path / "run", data, eval_every=100, num_workers=workers)
    assert "the data cannot be read: " in end and "the last checkpoint is" in end and "\n" not in end
    assert fault == "cut" or "09.npy" in end
    assert json.loads((tmp_path / "run/checkpoints/last/progress.json").read_text())["step"] == 3


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, data):
    assert run_forked(tmp_path, data, stop_at=3) == [""]
    for name, value in {"seed": 1, "weight_decay": 0.5, "ema_decay": None, "betas": [0.5, 0.9]}.items():
        (end,) = run_forked(tmp_path, data, **{name: value})
        assert (
            end == f"SystemExit: {tmp_path}/checkpoints/last was started with {name} {getattr(arguments(''), name)}, "
            f"not with {value}. Choose another `output_dir`."
        )


def test_steps_seeds_and_processes_draw_different_noise(tmp_path, data):
    def record(seed):
        run = Run(arguments(tmp_path / "run", seed=seed, stop_at=2))
        run.prepare(torch.nn.Linear(1, 1))
        for micro_batches in run.steps(Items(data)):
            next(micro_batches)
            torch.save(torch.rand(4), tmp_path / f"{seed}-{run.step}-{run.accelerator.process_index}.pt")
            run.progress["step"] += 1

    for seed in (0, 1):
        assert in_children(partial(record, seed), 2) == ["", ""]
    drawn = {path.stem: tuple(torch.load(path).tolist()) for path in tmp_path.glob("*.pt")}
    for seed in (0, 1):  # as a script draws its weights
        drawn[f"weights of {seed}"] = tuple(torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist())
    for rank in (0, 1):
        drawn[f"validation {rank}"] = tuple(torch.rand(4, generator=validation_generator(rank)).tolist())
    assert len(drawn) == len(set(drawn.values())) == 12


def test_derived_seeds_are_all_different():
    keys = [(seed, step, rank) for seed in range(10) for step in range(50) for rank in range(4)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


# Scale


def update_of(folder, data, **changes):
    """The weights after some steps without dropout."""
    ranks = changes.pop("ranks", 1)
    ends = run_forked(folder, data, ranks, {"dropout": 0.0}, stop_at=3, optimizer="adamw", **changes)
    assert ends == [""] * ranks
    return weights(folder)


@pytest.mark.slow
def test_the_update_is_the_same_however_a_step_is_divided(tmp_path, data):
    whole = update_of(tmp_path / "whole", data, batch_size=8)
    start = update_of(tmp_path / "start", data, batch_size=8, learning_rate=0.0)
    divided = {
        "micro-batches": update_of(tmp_path / "a", data, total_batch_size=8),
        "processes": update_of(tmp_path / "b", data, batch_size=4, ranks=2),
        "both": update_of(tmp_path / "c", data, total_batch_size=8, ranks=2),
    }
    for kind, other in divided.items():
        for name in whole:
            moved = (whole[name] - start[name]).norm()
            assert (whole[name] - other[name]).norm() <= 2e-3 * moved, (kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_goes_on_where_it_stopped(tmp_path, data, ranks):
    options = {"stream": True}
    assert run_forked(tmp_path / "whole", data, ranks, options) == [""] * ranks
    for stop in (5, 10, 12):  # 16 items: within the first pass, and within the second
        assert run_forked(tmp_path / "parts", data, ranks, options, stop_at=stop) == [""] * ranks
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    # The first pass is in the files' order (later ones are shuffled by `datasets`): the same as reading the files.
    assert run_forked(tmp_path / "first", data, ranks, options, stop_at=4) == [""] * ranks
    assert run_forked(tmp_path / "files", data, ranks, stop_at=4) == [""] * ranks
    if ranks == 1:  # of several processes each takes other items of a step than it would of files
        assert_close(tmp_path / "first", tmp_path / "files", 0)


def test_a_stream_is_not_continued_by_other_processes(tmp_path, data):
    assert run_forked(tmp_path, data, 1, {"stream": True}, stop_at=3, total_batch_size=4, eval_every=100) == [""]
    ends = run_forked(tmp_path, data, 2, {"stream": True}, total_batch_size=4, eval_every=100)
    assert "was written by 1 processes" in "".join(ends)


@pytest.mark.slow
def test_sharded_weights_learn_and_are_put_together(tmp_path, data):
    def sharded():
        from tiny import tiny_model

        init_process_group("gloo")
        torch.manual_seed(0)
        model = tiny_model()
        whole, blank = tiny_model(), tiny_model()
        whole.load_state_dict(model.state_dict())
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizers = [torch.optim.AdamW(one.parameters(), 1e-3) for one in (model, whole)]
        past, future = torch.rand(2, 3, 20, 28, 1), torch.rand(2, 4, 20, 28, 1)  # the same on both processes
        for one, optimizer in zip((model, whole), optimizers):
            for _ in range(2):
                one(past_values=past, future_values=future).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        load_gathered(blank, model)
        if torch.distributed.get_rank() == 0:
            for name, value in blank.state_dict().items():
                torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-3, atol=1e-5)
        destroy_process_group()

    assert in_children(sharded, 2) == ["", ""]


@pytest.mark.slow
def test_torchrun_starts_processes_that_know_each_other(tmp_path, data):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests/training_run.py"), "--output_dir", str(tmp_path / "run"), "--data", str(data)]
    command += ["--max_steps", "4", "--batch_size", "2", "--eval_every", "4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    progress = json.loads((tmp_path / "run/checkpoints/last/progress.json").read_text())
    assert progress["settings"]["samples_per_step"] == 4
    assert (result.stdout + result.stderr).count("step 4: validation ") == 1


# What a user may choose


def test_training_stops_early(tmp_path, data):
    run = tiny_run(arguments(tmp_path, learning_rate=0.0, eval_every=2, patience=2), Options(str(data)))
    assert run.step == 6 and run.progress["best_step"] == 2  # nothing moves: the first score is never beaten
    AcceleratorState._reset_state(reset_partial_state=True)
    again = tiny_run(arguments(tmp_path, learning_rate=0.0, eval_every=2, patience=2), Options(str(data)))
    assert again.step == 6


def test_without_averaging_the_best_weights_are_the_last(tmp_path, data):
    tiny_run(arguments(tmp_path, stop_at=6, ema_decay=None), Options(str(data)))
    last, best = weights(tmp_path), weights(tmp_path, "model.safetensors")
    for name in last:
        torch.testing.assert_close(last[name], best[name], rtol=0, atol=0)


def test_checkpointed_activations_change_nothing(tmp_path, data):
    for folder, choice in (("plain", False), ("checkpointed", True)):
        tiny_run(arguments(tmp_path / folder, stop_at=3, gradient_checkpointing=choice), Options(str(data)))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert_close(tmp_path / "plain", tmp_path / "checkpointed", 1e-5)


@pytest.mark.slow
def test_compiled_blocks_change_little(tmp_path, data):
    for folder, choice in (("plain", False), ("compiled", True)):
        tiny_run(arguments(tmp_path / folder, stop_at=2, torch_compile=choice), Options(str(data), dropout=0.0))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert_close(tmp_path / "plain", tmp_path / "compiled", 1e-3)


def test_half_precision_trains_full_precision_weights(tmp_path, data):
    tiny_run(arguments(tmp_path, stop_at=6, mixed_precision="bf16"), Options(str(data)))
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    before = json.loads((tmp_path / "checkpoints/last/progress.json").read_text())["best"]
    assert 0 < before < 1
    EarthformerForPrediction.from_pretrained(tmp_path)


def test_a_step_must_be_a_whole_number_of_micro_batches(tmp_path):
    with pytest.raises(ValueError, match="multiple of 2.*got 5"):
        Run(arguments(tmp_path, total_batch_size=5))


def test_a_run_is_tracked_and_drawn(tmp_path, data):
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def figure_of(model):
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot(next(model.parameters()).detach().flatten())
        return figure

    tiny_run(arguments(tmp_path, report_to="tensorboard"), Options(str(data)), figure_of=figure_of)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["step_000006.png", "step_000012.png"]
    record = EventAccumulator(str(tmp_path / "tracking"))
    record.Reload()
    assert [event.step for event in record.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in record.Scalars("validation")] == [6, 12]
    assert [event.step for event in record.Images("forecast")] == [6, 12]
    rates = [event.value for event in record.Scalars("learning_rate")]
    assert rates[0] == 0 and max(rates) == pytest.approx(5e-3)


@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
@pytest.mark.filterwarnings("ignore:.log_with=trackio")
def test_a_tracker_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`report_to` must name a package that is installed, got 'trackio'"):
        Run(arguments(tmp_path, report_to="trackio"))


def test_the_card_of_a_run_passes_the_check(tmp_path, data):
    run = tiny_run(arguments(tmp_path), Options(str(data)))
    facts = {"steps": run.step, "batch_size": run.samples_per_step, "num_processes": 1, "skipped_steps": 0}
    facts |= {"best_step": run.progress["best_step"], "best_loss": run.progress["best"]}
    write_card(tmp_path, {"training": {"max_steps": 12}}, "16 files of noise.", **facts)
    assert sharing.check(tmp_path) == []
    card = (tmp_path / "README.md").read_text()
    assert "No evaluation yet." in card and "training: {max_steps: 12}" in card and "Kept: step 12" in card
    summaries = {"model": {"mse": 0.125, "csi": None}, "persistence": {"mse": 0.5}}  # None: undefined
    scores = {system: {"summary": summary, "errors": {"pixels": [1]}} for system, summary in summaries.items()}
    (tmp_path / "scores.json").write_text(json.dumps({"protocol": {"name": "x"}, "windows": 9, "scores": scores}))
    write_card(tmp_path, {}, "16 files of noise.", **facts)
    assert sharing.check(tmp_path) == []
    table = "| model       | 0.125 | undefined |\n| persistence |   0.5 |           |"
    assert table in (tmp_path / "README.md").read_text()


def test_a_run_with_every_choice_resumes(tmp_path, data):
    run = partial(run_forked, data=data, total_batch_size=4, mixed_precision="bf16", optimizer="adamw", num_workers=1)
    assert run(tmp_path / "whole") == [""]
    for stop in (5, 12):
        assert run(tmp_path / "parts", stop_at=stop) == [""]
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
