"""One training loop for all recipes: Accelerate, averaged weights, and runs that resume where they stopped.

```
steps of a run   for micro_batches in run.steps(train_set):       batch_size items per process and micro-batch
one step             for batch in micro_batches: run.backward(loss)
                     run.update(losses)                           clip, step, average; not-a-number stops or skips
now and then         run.evaluate(...)  run.save()                best model in OUTPUT_DIR, state in checkpoints/last
```

An interrupted run goes on with the same command, and ends like one that was never interrupted: the order of the data
and the seeds of every step follow from the step's number alone; a stream keeps its place in the checkpoint.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from datasets.distributed import split_dataset_by_node
from diffusers import EMAModel, ModelMixin
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer


if TYPE_CHECKING:
    from matplotlib.figure import Figure
from .arguments import TrainingArguments, join_processes
from .optimization import optimizers_of


def train(
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, dict], torch.Tensor],
    train_set: Dataset | datasets.IterableDataset,
    score_of: Callable[[torch.nn.Module, Accelerator], float],
    save_best: Callable[[torch.nn.Module], None],
    arguments: TrainingArguments,
    figure_of: Callable[[torch.nn.Module], "Figure"] | None = None,
) -> "Run":
    """Train a model; the averaged weights with the lowest score so far are saved.

    Args:
        model: on the CPU, anew or loaded.
        loss_of: model and batch -> loss; dropout and noise are seeded by the step.
        train_set: item n is a function of n alone, for every n, see [`~earthformer_hf.data.windows.TrainingWindows`];
            or a stream of items, of which each process takes its share.
        score_of: model and accelerator -> score, lower is better, the same on every process.
        save_best: writes the (unwrapped) model into `arguments.output_dir`; called on the main process.
        arguments: see [`TrainingArguments`].
        figure_of: (unwrapped) model -> a figure of forecasts, drawn at each evaluation into OUTPUT_DIR/figures; called
            on the main process.

    Returns:
        The run, at its end.

    Raises:
        ValueError: arguments that do not go together.
        SystemExit: the loss is not finite, data cannot be read, a checkpoint cannot be written, or OUTPUT_DIR holds
            the checkpoint of a run with another course. The last checkpoint is intact.
    """
    run = Run(arguments)
    model = run.prepare(model)
    for micro_batches in run.steps(train_set):
        losses = []
        for batch in micro_batches:
            losses.append(loss_of(model, batch))
            run.backward(losses[-1])
        run.update(losses)
        run.evaluate(score_of, save_best, figure_of)
        run.save()
    run.accelerator.end_training()
    return run


class Run:
    """The state of one training run: accelerator, models, optimisers, averaged weights, progress and checkpoints.

    Args:
        arguments: see [`TrainingArguments`].

    Raises:
        ValueError: `total_batch_size` is no multiple of what all processes take at once, or what `report_to` names is
            not installed.
    """

    def __init__(self, arguments: TrainingArguments):
        at_once = arguments.batch_size * join_processes().num_processes
        self.samples = arguments.total_batch_size or at_once  # of a step
        self.micro_steps, rest = divmod(self.samples, at_once)
        if rest or not self.micro_steps:
            raise ValueError(
                f"`total_batch_size` must be a multiple of {at_once}, which is `batch_size` times the processes, "
                f"got {self.samples}."
            )
        self.arguments, self.folder = arguments, Path(arguments.output_dir)
        self.checkpoint = self.folder / "checkpoints" / "last"
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_steps=self.micro_steps,
            step_scheduler_with_optimizer=False,  # else a schedule takes one step per process
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=arguments.output_dir,
        )
        if arguments.report_to != "none" and not self.accelerator.log_with:  # Accelerate goes on without
            raise ValueError(f"`report_to` must name a package that is installed, got {arguments.report_to!r}.")
        self.models: list[torch.nn.Module] = []
        self.optimizers: list[Any] = []
        self.schedules: list[Any] = []
        self.ema: EMAModel | None = None
        self.whole: torch.nn.Module | None = None  # where the weights of a sharded model are put together
        self.stream: Any = None
        # What fixes the course of a run: a checkpoint of another course is not continued.
        names = (
            "seed", "max_steps", "optimizer", "learning_rate", "betas", "position_rate", "weight_decay",
            "warmup_steps", "min_lr_rate", "max_grad_norm", "ema_decay",
        )  # fmt: skip
        course = {name: getattr(arguments, name) for name in names} | {"samples_per_step": self.samples}
        self.progress: dict[str, Any] = {"step": 0, "best": math.inf, "best_step": 0, "skipped": 0, "course": course}

    @property
    def step(self) -> int:
        return self.progress["step"]

    @property
    def last(self) -> int:
        return min(self.arguments.max_steps, self.arguments.stop_at or self.arguments.max_steps)

    @property
    def done(self) -> bool:
        waited, patience = self.step - self.progress["best_step"], self.arguments.patience
        return self.step >= self.last or (patience is not None and waited >= patience * self.arguments.eval_every)

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Take a model in; the first one is averaged, evaluated and saved, others (a discriminator) only trained."""
        arguments, accelerator = self.arguments, self.accelerator
        if accelerator.is_fsdp2:
            if arguments.optimizer != "adamw" or arguments.ema_decay is not None:
                raise ValueError("Sharded weights need `optimizer: adamw` and `ema_decay: null`.")
            self.whole = copy.deepcopy(model)
        for module in model.modules():
            if arguments.gradient_checkpointing and isinstance(module, PreTrainedModel):
                module.activation_checkpointing_enable()
            elif arguments.gradient_checkpointing and isinstance(module, ModelMixin):
                module.enable_gradient_checkpointing()
            if arguments.torch_compile and isinstance(module, GradientCheckpointingLayer):
                module.compile()  # in place: the names of weights stay
        optimizers = optimizers_of(model, arguments)
        schedules = [
            get_scheduler(
                "cosine_with_min_lr",
                optimizer,
                arguments.warmup_steps,
                arguments.max_steps,
                scheduler_specific_kwargs={"min_lr_rate": arguments.min_lr_rate},
            )
            for optimizer in optimizers
        ]
        model, *both = accelerator.prepare(model, *optimizers, *schedules)
        self.optimizers += both[: len(optimizers)]
        self.schedules += both[len(optimizers) :]
        if not self.models and arguments.ema_decay is not None:
            # with this offset the decay of update n is min(ema_decay, (1 + n) / (10 + n)), as in PreDiff
            self.ema = EMAModel(model.parameters(), decay=arguments.ema_decay, update_after_step=-1)
            accelerator.register_for_checkpointing(self.ema)
        self.models.append(model.train())
        return model

    def steps(self, train_set: Dataset | datasets.IterableDataset) -> Iterator[Iterator[dict]]:
        """From the last checkpoint to the end: for each step its micro-batches, on the device."""
        self._resume()
        if self.arguments.report_to != "none":
            plain = {k: v for k, v in asdict(self.arguments).items() if isinstance(v, int | float | str)}
            self.accelerator.init_trackers("tracking", plain)
        batches = self._readable(self._batches(train_set))
        self.bar = tqdm(
            total=self.last * self.samples,
            initial=self.step * self.samples,
            unit=" samples",
            disable=not self.accelerator.is_main_process,
        )
        with self.bar:
            while not self.done:
                yield self._micro_batches(batches)

    def _resume(self):
        new = self.checkpoint.with_name("new")
        if self.accelerator.is_main_process and not self.checkpoint.exists() and (new / "progress.json").exists():
            os.replace(new, self.checkpoint)  # a kill came between the two renames of `save`
        self.accelerator.wait_for_everyone()
        course = self.progress["course"]
        if (self.checkpoint / "progress.json").exists():
            progress = json.loads((self.checkpoint / "progress.json").read_text())
            if progress["course"] != course:
                raise SystemExit(f"{self.checkpoint} was started with {progress['course']}, not with {course}.")
            self.accelerator.load_state(self.checkpoint)
            self.progress |= progress
        if self.ema is not None:
            self.ema.to(self.accelerator.device)

    def _batches(self, train_set: Dataset | datasets.IterableDataset) -> Iterator[dict]:
        workers = self.arguments.num_workers
        if not isinstance(train_set, datasets.IterableDataset):
            order = range(self.step * self.samples, self.last * self.samples)
            loader = DataLoader(train_set, self.arguments.batch_size, sampler=order, num_workers=workers)
            yield from self.accelerator.prepare(loader)
            return
        from torchdata.stateful_dataloader import StatefulDataLoader

        share = split_dataset_by_node(train_set, self.accelerator.process_index, self.accelerator.num_processes)
        loader = StatefulDataLoader(share, self.arguments.batch_size, num_workers=workers, drop_last=True)
        self.stream = {"epoch": 0, "loader": loader}
        resumed = self.checkpoint.exists()
        if resumed:
            self._find_place(share, loader)
        while True:
            empty = not resumed
            for batch in loader:
                empty = False
                yield send_to_device(batch, self.accelerator.device)
            if empty:
                raise ValueError(f"`train_set`: a process's share of the stream is less than a batch ({share}).")
            resumed = False
            self.stream["epoch"] += 1
            share.set_epoch(self.stream["epoch"])

    def _find_place(self, share: datasets.IterableDataset, loader: Any):
        files = len(list(self.checkpoint.glob("stream_*.pt")))
        if files != self.accelerator.num_processes:
            raise SystemExit(
                f"{self.checkpoint} was written by {files} processes that read a stream, now there are "
                f"{self.accelerator.num_processes}: each has its own share of it."
            )
        stored = torch.load(self.checkpoint / self._stream_file(), weights_only=True)
        self.stream["epoch"] = stored["epoch"]
        share.set_epoch(stored["epoch"])
        loader.load_state_dict(stored["loader"])

    def _stream_file(self) -> str:
        return f"stream_{self.accelerator.process_index}.pt"

    def _readable(self, batches: Iterator[dict]) -> Iterator[dict]:
        try:
            yield from batches
        except (OSError, EOFError, ValueError, SafetensorError) as reason:
            self._stop(f"the data cannot be read: {reason}", reason)

    def _micro_batches(self, batches: Iterator[dict]) -> Iterator[dict]:
        for number in range(self.micro_steps):
            batch = next(batches)
            if number == 0:  # of dropout and noise, other ones on every process
                ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
                set_seed((self.arguments.seed + self.step) * ranks + rank)
            with ExitStack() as stack:
                if number < self.micro_steps - 1:  # gradients meet once a step
                    for model in self.models:
                        stack.enter_context(self.accelerator.no_sync(model))
                yield batch

    def backward(self, loss: torch.Tensor):
        """Add the gradients of a micro-batch's loss."""
        self.accelerator.backward(loss)

    def update(self, losses: list[torch.Tensor]):
        """End a step: clip the gradients, move the weights, average them. A step that is not finite stops or skips.

        Args:
            losses: of the step's micro-batches.
        """
        norms = [self.accelerator.clip_grad_norm_(m.parameters(), self.arguments.max_grad_norm) for m in self.models]
        finite = all(bool(torch.isfinite(norm)) for norm in norms)  # gradients have met: all processes agree
        if not finite:
            self._not_finite(losses)
        for optimizer in self.optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        if self.ema is not None and finite:
            self.ema.step(self.models[0].parameters())
        rate = self.schedules[0].get_last_lr()[0]
        for schedule in self.schedules:
            schedule.step()
        self.progress["step"] += 1
        loss = torch.stack([loss.detach() for loss in losses]).mean().item()
        self.bar.update(self.samples)
        self.bar.set_postfix(step=self.step, loss=f"{loss:.5f}")
        record = {"loss": loss, "gradient_norm": norms[0].item(), "learning_rate": rate}
        self.accelerator.log(record, step=self.step)

    def _not_finite(self, losses: list[torch.Tensor]):
        """Say which items made the step not finite; stop unless such steps are skipped."""
        mine = torch.stack([loss.detach().isfinite().int() for loss in losses])
        finite = self.accelerator.gather(mine).view(-1, len(losses)).T  # (micro-batches, processes)
        ranks, size = finite.shape[1], self.arguments.batch_size
        guilty = []
        for number, rank in (finite == 0).nonzero().tolist():
            batches = self.step * self.micro_steps + number  # before it, of each process
            first = size * (batches if self.stream is not None else batches * ranks + rank)
            guilty.append(f"{first} to {first + size - 1}")
            guilty[-1] += f" of process {rank}'s share" if self.stream is not None else ""
        items = ", ".join(guilty) or "unknown: only gradients are not"
        if self.arguments.on_nan == "stop":
            self._stop(f"the loss is not finite; items of the training order: {items}")
        self.progress["skipped"] += 1
        self._say(f"step {self.step}: skipped, not finite (items {items}); {self.progress['skipped']} so far")

    def evaluate(
        self,
        score_of: Callable[[torch.nn.Module, Accelerator], float],
        save_best: Callable[[torch.nn.Module], None],
        figure_of: Callable[[torch.nn.Module], "Figure"] | None = None,
    ):
        """Every `eval_every` steps and at the end: score the averaged weights; arguments as for [`train`]."""
        if self.step % self.arguments.eval_every and self.step != self.arguments.max_steps:
            return
        with self._averaged() as model:
            score = score_of(model, self.accelerator)
            if score < self.progress["best"]:
                self.progress |= {"best": score, "best_step": self.step}
                best = self._whole(model)
                if self.accelerator.is_main_process:
                    self._written(lambda: save_best(best), self.folder)
            if figure_of is not None and self.accelerator.is_main_process and self.whole is None:
                self._draw(figure_of(self.accelerator.unwrap_model(model)))
        self.accelerator.log({"validation": score}, step=self.step)
        self._say(f"step {self.step}: validation {score:.6f}, best {self.progress['best']:.6f}")

    @contextmanager
    def _averaged(self) -> Iterator[torch.nn.Module]:
        model = self.models[0]
        if self.ema is not None:
            self.ema.store(model.parameters())
            self.ema.copy_to(model.parameters())
        model.eval()
        with torch.no_grad():
            yield model
        model.train()
        if self.ema is not None:
            self.ema.restore(model.parameters())

    def _whole(self, model: torch.nn.Module) -> torch.nn.Module:
        if self.whole is None:
            return self.accelerator.unwrap_model(model)
        load_gathered(self.whole, model)
        return self.whole

    def _draw(self, figure: "Figure"):
        from matplotlib.image import imread

        path = self.folder / "figures" / f"step_{self.step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._written(lambda: figure.savefig(path), path)
        pixels = imread(path)[None, ..., :3]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"forecast": pixels}, step=self.step, dataformats="NHWC")

    def save(self):
        """Every `save_every` steps and at the end: write the state beside the last one, then take its place.

        A kill at any moment leaves the last checkpoint, or the new one, complete.
        """
        if self.step % self.arguments.save_every and not self.done:
            return
        new, old = self.checkpoint.with_name("new"), self.checkpoint.with_name("old")
        if self.accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._written(lambda: self._write_state(new), new)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._written(lambda: (new / "progress").write_text(json.dumps(self.progress)), new)
            os.replace(new / "progress", new / "progress.json")  # now it is complete
            shutil.rmtree(old, ignore_errors=True)
            if self.checkpoint.exists():
                os.replace(self.checkpoint, old)
            os.replace(new, self.checkpoint)
            shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path):
        self.accelerator.save_state(folder)
        if self.stream is not None:
            state = {"epoch": self.stream["epoch"], "loader": self.stream["loader"].state_dict()}
            torch.save(state, folder / self._stream_file())

    def _written(self, write: Callable[[], Any], folder: Path):
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as reason:  # a full disk is each of these, by who writes
            self._stop(f"{folder} cannot be written: {reason}", reason)

    def _say(self, text: str):
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def _stop(self, reason: str, error: Exception | None = None):
        line = reason.strip().splitlines()
        text = line[0] if len(line) == 1 else f"{line[0]} {line[-1]}"
        kept = (
            f"the last checkpoint is {self.checkpoint}" if self.checkpoint.exists() else "there is no checkpoint yet"
        )
        raise SystemExit(f"step {self.step}: {text}; {kept}.") from error


def load_gathered(target: torch.nn.Module, sharded: torch.nn.Module):
    """Load the weights of a model that is sharded over processes into a whole one; all processes call it.

    The first process ends with the weights, the others with what `target` had.
    """
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state:
        target.load_state_dict(state)


def mean_over(
    dataset: Dataset,
    batch_size: int,
    total_and_count: Callable[[dict], tuple[torch.Tensor, torch.Tensor]],
    accelerator: Accelerator,
) -> float:
    """The mean of a score over a data set, of which each process takes every n-th item.

    Args:
        total_and_count: batch -> sum of the score, and over how many values.

    Raises:
        ValueError: fewer items than processes.
    """
    items, ranks = len(dataset), accelerator.num_processes  # type: ignore[arg-type]
    if items < ranks:
        raise ValueError(f"`dataset` must hold at least one item for each of {ranks} processes, got {items}.")
    loader = DataLoader(Subset(dataset, range(accelerator.process_index, items, ranks)), batch_size)
    total, count = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        one, number = total_and_count(send_to_device(batch, accelerator.device))
        total, count = total + one.double(), count + number
    if len(loader) < math.ceil(math.ceil(items / ranks) / batch_size):
        total_and_count(send_to_device(batch, accelerator.device))  # sharded weights: as many calls as on the others
    return (accelerator.reduce(total) / accelerator.reduce(count)).item()
