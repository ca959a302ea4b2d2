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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import EMAModel, ModelMixin
from safetensors import SafetensorError
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .arguments import TrainingArguments
from .batches import StreamBatches, ordered_batches
from .checkpoint import Checkpoint, writing
from .distributed import join_processes, load_gathered
from .optimization import learning_rate_schedules, optimizers_of
from .seeds import derive_seed


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Arguments that say where, how fast and how often, and may be others when a run goes on: see `settings` of [`Run`].
MAY_DIFFER = (
    "output_dir", "batch_size", "total_batch_size", "gradient_checkpointing", "torch_compile", "num_workers",
    "eval_every", "patience", "save_every", "stop_at", "extend", "on_nan", "report_to", "push_to_hub",
    "latents", "vae", "pipeline",
)  # fmt: skip
READ_ERRORS = (OSError, EOFError, ValueError, SafetensorError)


def train(
    model: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, dict], torch.Tensor],
    train_set: Dataset | datasets.IterableDataset,
    score_of: Callable[[torch.nn.Module, Accelerator], float],
    save_best: Callable[[torch.nn.Module], None],
    arguments: TrainingArguments,
    figure_of: Callable[[torch.nn.Module], "Figure"] | None = None,
    settings: dict[str, Any] | None = None,
) -> "Run":
    """Train a model; the averaged weights with the lowest score so far are saved.

    Args:
        model: on the CPU.
        loss_of: model and batch -> loss; dropout and noise are seeded by the step.
        train_set: item n is a function of n alone, for every n, see [`~earthformer_hf.data.windows.TrainingWindows`];
            or a stream of items, which is divided among the processes.
        score_of: model and accelerator -> score, lower is better, the same on every process.
        save_best: writes the (unwrapped) model into `arguments.output_dir`; called on the main process.
        arguments: see [`TrainingArguments`].
        figure_of: (unwrapped) model -> a figure of forecasts, drawn at each evaluation into OUTPUT_DIR/figures; called
            on the main process.
        settings: see [`Run`].

    Returns:
        The run, at its end.

    Raises:
        ValueError: arguments that do not go together.
        SystemExit: the loss is not finite, data cannot be read, a checkpoint cannot be written, or OUTPUT_DIR holds
            the checkpoint of a run with other settings. The last checkpoint is intact.
    """
    run = Run(arguments, settings)
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
    """The state of one training run: accelerator, models, optimisers, averaged weights, progress and checkpoint.

    Args:
        arguments: see [`TrainingArguments`].
        settings: what the run follows from beside the arguments, such as data and model, see
            [`~earthformer_hf.training.run_settings`]. A checkpoint is continued only if these, and all arguments but
            `MAY_DIFFER`, are what they were when it began.

    Raises:
        ValueError: `total_batch_size` is no multiple of what all processes take at once, or what `report_to` names is
            not installed.
    """

    def __init__(self, arguments: TrainingArguments, settings: dict[str, Any] | None = None):
        self.samples_per_step, self.micro_steps = _divided(arguments)
        self.arguments, self.folder = arguments, Path(arguments.output_dir)
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=arguments.mixed_precision,
            gradient_accumulation_steps=self.micro_steps,
            step_scheduler_with_optimizer=False,  # else a schedule takes one step per process
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=arguments.output_dir,
        )
        if arguments.report_to != "none" and not self.accelerator.log_with:  # Accelerate only warns
            raise ValueError(f"`report_to` must name a package that is installed, got {arguments.report_to!r}.")
        self.checkpoint = Checkpoint(arguments.output_dir, self.accelerator)
        self.models: list[torch.nn.Module] = []
        self.optimizers: list[Any] = []
        self.schedules: list[Any] = []
        self.ema: EMAModel | None = None
        self.gathered_model: torch.nn.Module | None = None  # receives the weights of a model sharded over processes
        self.stream: StreamBatches | None = None
        fixed = {name: value for name, value in asdict(arguments).items() if name not in MAY_DIFFER}
        fixed |= {"samples_per_step": self.samples_per_step} | (settings or {})
        self.progress: dict[str, Any] = {
            "step": 0, "best": math.inf, "best_step": 0, "skipped": 0, "extensions": [],
            "settings": json.loads(json.dumps(fixed)),
        }  # fmt: skip

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return self.progress["step"]

    @property
    def last_step(self) -> int:
        return min(self.arguments.max_steps, self.arguments.stop_at or self.arguments.max_steps)

    @property
    def done(self) -> bool:
        """Whether the last step was taken, or nothing became better for `patience` evaluations."""
        since_best, patience = self.step - self.progress["best_step"], self.arguments.patience
        out_of_patience = patience is not None and since_best >= patience * self.arguments.eval_every
        return self.step >= self.last_step or out_of_patience

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Take a model in; the first one is averaged, evaluated and saved, others (a discriminator) only trained.

        Raises:
            ValueError: the weights are to be sharded, with an optimiser or averaging that cannot be.
        """
        arguments, accelerator = self.arguments, self.accelerator
        if accelerator.is_fsdp2:
            whole = "FULL" in str(accelerator.state.fsdp_plugin.state_dict_type)
            if arguments.optimizer != "adamw" or arguments.ema_decay is not None or not whole:
                raise ValueError(
                    "Sharded weights need `optimizer: adamw`, `ema_decay: null` and `fsdp_state_dict_type: "
                    "FULL_STATE_DICT`."
                )
            self.gathered_model = copy.deepcopy(model)
        _checkpoint_and_compile(model, arguments)
        optimizers = optimizers_of(model, arguments)
        schedules = learning_rate_schedules(optimizers, arguments)
        model, *prepared = accelerator.prepare(model, *optimizers, *schedules)
        self.optimizers += prepared[: len(optimizers)]
        self.schedules += prepared[len(optimizers) :]
        if not self.models and arguments.ema_decay is not None:
            # with this offset the decay of update n is min(ema_decay, (1 + n) / (10 + n)), as in PreDiff
            self.ema = EMAModel(model.parameters(), decay=arguments.ema_decay, update_after_step=-1)
        self.models.append(model.train())
        return model

    def steps(self, train_set: Dataset | datasets.IterableDataset) -> Iterator[Iterator[dict]]:
        """From the last checkpoint to the end: for each step its micro-batches, on the device."""
        with self.checkpoint.locked():
            self.progress |= self.checkpoint.restore(self.progress["settings"], self.ema, self.arguments.extend)
            if self.ema is not None:
                self.ema.to(self.accelerator.device)
            if self.arguments.report_to != "none":
                plain = {k: v for k, v in asdict(self.arguments).items() if isinstance(v, int | float | str)}
                self.accelerator.init_trackers("tracking", plain)
            batches = self._batches(train_set)
            self.bar = tqdm(
                total=self.last_step * self.samples_per_step,
                initial=self.step * self.samples_per_step,
                unit=" samples",
                disable=not self.accelerator.is_main_process,
            )
            with self.bar:
                while not self.done:
                    yield self._micro_batches(batches)
        if self.step >= self.arguments.max_steps and not self.progress["best_step"]:
            raise SystemExit(f"no evaluation of {self.step} steps gave a finite score: there is no model.")

    def _batches(self, train_set: Dataset | datasets.IterableDataset) -> Iterator[dict]:
        options = self.arguments.batch_size, self.arguments.num_workers, self.accelerator
        with self._stop_on(READ_ERRORS, "the data cannot be read: "):
            if isinstance(train_set, datasets.IterableDataset):
                self.stream = StreamBatches(train_set, *options)
                if self.checkpoint.exists:
                    self.stream.restore(self.checkpoint.folder)
                yield from self.stream
            else:
                items = range(self.step * self.samples_per_step, self.last_step * self.samples_per_step)
                yield from ordered_batches(train_set, *options, items)

    def _micro_batches(self, batches: Iterator[dict]) -> Iterator[dict]:
        for micro_step in range(self.micro_steps):
            batch = next(batches)
            if micro_step == 0:  # dropout and noise of a step: others in every step, process and seed
                set_seed(derive_seed(self.arguments.seed, self.step, self.accelerator.process_index))
            with ExitStack() as stack:
                if micro_step < self.micro_steps - 1:  # processes exchange gradients once a step
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
        finite = all(bool(torch.isfinite(norm)) for norm in norms)  # of exchanged gradients: all processes agree
        if not finite:
            self._stop_or_skip(losses)
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
        own_loss = torch.stack([loss.detach() for loss in losses]).mean()
        loss = self.accelerator.reduce(own_loss, "mean").item()
        self.bar.update(self.samples_per_step)
        self.bar.set_postfix(step=self.step, loss=f"{loss:.5f}")
        record = {"loss": loss, "gradient_norm": norms[0].item(), "learning_rate": rate}
        self.accelerator.log(record, step=self.step)

    def _stop_or_skip(self, losses: list[torch.Tensor]):
        """Name the items that made the step not finite; stop unless such steps are skipped, or weights are lost."""
        if not all(bool(torch.isfinite(p).all()) for model in self.models for p in model.parameters()):
            self._stop("the weights are not finite; a lower learning rate, or a longer warm-up, may keep them so")
        own = torch.stack([loss.detach().isfinite().int() for loss in losses])
        finite = self.accelerator.gather(own).view(-1, len(losses)).T  # (micro-batches, processes)
        batches_before = self.step * self.micro_steps  # that each process has read
        items = _name_items(finite, batches_before, self.arguments.batch_size, self.stream is not None)
        if self.arguments.on_nan == "stop":
            self._stop(f"the loss is not finite; items of the training order: {items}")
        self.progress["skipped"] += 1
        self._print(f"step {self.step}: skipped, not finite (items {items}); {self.progress['skipped']} so far")

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
            if not math.isfinite(score) and self.arguments.on_nan == "stop":
                self._stop(f"the validation score is {score}")
            if score < self.progress["best"]:
                self.progress |= {"best": score, "best_step": self.step}
                best = self._gather(model)
                if self.accelerator.is_main_process:
                    with self._stop_on(OSError), writing(self.folder):
                        save_best(best)
            if figure_of is not None and self.accelerator.is_main_process and self.gathered_model is None:
                self._save_figure(figure_of(self.accelerator.unwrap_model(model)))
        self.accelerator.log({"validation": score}, step=self.step)
        self._print(f"step {self.step}: validation {score:.6f}, best {self.progress['best']:.6f}")

    @contextmanager
    def _averaged(self) -> Iterator[torch.nn.Module]:
        """The first model with its averaged weights, ready to forecast; then it trains on with its own."""
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

    def _gather(self, model: torch.nn.Module) -> torch.nn.Module:
        if self.gathered_model is None:
            return self.accelerator.unwrap_model(model)
        load_gathered(self.gathered_model, model)
        return self.gathered_model

    def _save_figure(self, figure: "Figure"):
        path = self.folder / "figures" / f"step_{self.step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._stop_on(OSError), writing(path):
            figure.savefig(path)
        _log_picture(self.accelerator, path, self.step)

    def save(self):
        """Every `save_every` steps and at the end: replace the checkpoint."""
        if self.step % self.arguments.save_every == 0 or self.done:
            with self._stop_on(OSError):
                self.checkpoint.save(self.progress, self.ema, self.stream)

    def _print(self, text: str):
        if self.accelerator.is_main_process:
            tqdm.write(text)

    @contextmanager
    def _stop_on(self, errors: Any, prefix: str = "") -> Iterator[None]:
        try:
            yield
        except errors as reason:
            self._stop(f"{prefix}{reason}", reason)

    def _stop(self, text: str, reason: Exception | None = None):
        """End with one line, also where `text` is the several lines of a worker's error: its first and its last."""
        lines = text.strip().splitlines()
        line = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
        self.checkpoint.unlock()
        kept = f"the last checkpoint is {self.checkpoint}" if self.checkpoint.exists else "there is no checkpoint yet"
        raise SystemExit(f"step {self.step}: {line}; {kept}.") from reason


def _divided(arguments: TrainingArguments) -> tuple[int, int]:
    """Samples of a step over all processes, and micro-batches that each of them takes in it."""
    at_once = arguments.batch_size * join_processes().num_processes
    samples = arguments.total_batch_size or at_once
    if samples % at_once:
        raise ValueError(
            f"`total_batch_size` must be a multiple of {at_once}, which is `batch_size` times the processes, "
            f"got {samples}."
        )
    return samples, samples // at_once


def _log_picture(accelerator: Accelerator, path: Path, step: int):
    """Hand a picture to the trackers that take pictures."""
    from matplotlib.image import imread

    pixels = imread(path)[None, ..., :3]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({"forecast": pixels}, step=step, dataformats="NHWC")


def _name_items(finite: torch.Tensor, batches_before: int, batch_size: int, streamed: bool) -> str:
    """The positions, in the order of training, of the items whose loss is not finite: (micro-batches, processes)."""
    ranks, positions = finite.shape[1], []
    for micro_step, rank in (finite == 0).nonzero().tolist():
        batches = batches_before + micro_step
        first = batch_size * (batches if streamed else batches * ranks + rank)
        positions.append(f"{first} to {first + batch_size - 1}")
        positions[-1] += f" of process {rank}'s share" if streamed else ""
    return ", ".join(positions) or "unknown: only gradients are not"


def _checkpoint_and_compile(model: torch.nn.Module, arguments: TrainingArguments):
    for module in model.modules():
        if arguments.gradient_checkpointing and isinstance(module, PreTrainedModel):
            module.activation_checkpointing_enable()
        elif arguments.gradient_checkpointing and isinstance(module, ModelMixin):
            module.enable_gradient_checkpointing()
        if arguments.torch_compile and isinstance(module, GradientCheckpointingLayer):
            module.compile()  # in place: the names of weights stay


__all__ = ["Run", "train"]
