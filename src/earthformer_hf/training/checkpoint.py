"""The checkpoint of a run: its complete state, on disk, replaced as a whole, and checked before it is read.

```
OUTPUT_DIR/checkpoints/new     the state that is being written; complete once it holds manifest.json
                      /last    the state that a run resumes from
                      /old     the one before, between the two renames that put `new` in the place of `last`
                      /lock    held by the run that writes here; a kill releases it
```

The averaged weights are safetensors, the progress is JSON, and what Accelerate writes is read as weights only. The
manifest is written last and holds the digest of every other file.
"""

import hashlib
import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, load
from diffusers import EMAModel
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..errors import one_line
from .batches import StreamBatches


AVERAGE, MANIFEST, PROGRESS = "average.safetensors", "manifest.json", "progress.json"
# What a checkpoint may hold, none of which runs code when it is read as it is here.
KNOWN_FILES = re.compile(
    r"(model(_\d+)?|average)\.safetensors|(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin"
    r"|pytorch_model(_fsdp)?(_\d+)?\.bin|random_states_\d+\.pkl|stream_\d+\.pt|scaler\.pt|progress\.json"
)


class Checkpoint:
    """State of models, optimisers, schedules and averaged weights, progress, and the place in a stream.

    A kill at any moment leaves the last checkpoint, or the new one, complete.

    Args:
        output_dir: of the run.
        accelerator: has what it saves and loads prepared.
    """

    def __init__(self, output_dir: str | Path, accelerator: Accelerator):
        self.accelerator = accelerator
        self.folder = Path(output_dir) / "checkpoints" / "last"
        self.new, self.old = self.folder.with_name("new"), self.folder.with_name("old")
        self._lock = FileLock(self.folder.with_name("lock"), timeout=0)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def exists(self) -> bool:
        return os.path.lexists(self.folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of this folder; [`unlock`] or the end of the process lets them in as well.

        Raises:
            SystemExit: another run is in it.
        """
        problem = [""]
        if self.accelerator.is_main_process:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                problem = [f"another run writes into {self.folder.parent.parent}; choose another `output_dir`."]
        self._refuse(problem)
        try:
            yield
        finally:
            self.unlock()

    def unlock(self):
        """Let other runs into this folder."""
        self._lock.release()

    def save(self, progress: dict, average: EMAModel | None = None, stream: StreamBatches | None = None):
        """Write a checkpoint beside the last one, then put it in its place; all processes call it.

        Raises:
            OSError: it cannot be written. The last checkpoint is untouched.
        """
        is_main, wait_for_everyone = self.accelerator.is_main_process, self.accelerator.wait_for_everyone
        if is_main:
            shutil.rmtree(self.new, ignore_errors=True)
        wait_for_everyone()
        with writing(self.new):
            self.accelerator.save_state(self.new)
            if stream is not None:
                stream.save(self.new)
        wait_for_everyone()
        if is_main:
            with writing(self.new):
                if average is not None:
                    _save_average(average, self.new / AVERAGE)
                (self.new / PROGRESS).write_text(json.dumps(progress))
                digests = {path.name: _digest(path) for path in sorted(self.new.iterdir())}
                (self.new / "manifest").write_text(json.dumps(digests, indent=1))
            os.replace(self.new / "manifest", self.new / MANIFEST)  # this completes it
            shutil.rmtree(self.old, ignore_errors=True)
            if self.folder.exists():
                os.replace(self.folder, self.old)
            os.replace(self.new, self.folder)
            shutil.rmtree(self.old, ignore_errors=True)
        wait_for_everyone()

    def restore(self, settings: dict, average: EMAModel | None = None, extend: bool = False) -> dict:
        """Load the last checkpoint, if there is one; all processes call it.

        Args:
            settings: what must be as it was when the run began, as JSON can hold it.
            average: receives the averaged weights.
            extend: `max_steps` may be higher than it was.

        Returns:
            The stored progress, with these settings; empty without a checkpoint.

        Raises:
            SystemExit: the checkpoint is damaged, or its settings are others; which, in one line.
        """
        problem = [""]
        if self.accelerator.is_main_process:
            if not self.exists and (self.new / MANIFEST).exists():
                os.replace(self.new, self.folder)  # a kill came between the two renames of `save`
            problem = [_damage(self.folder) if self.exists else ""]
        self._refuse(problem)
        if not self.exists:
            return {}
        progress = _read_progress(self.folder)
        stored = progress["settings"]
        differing = _differences(stored, settings)
        if set(differing) == {"max_steps"} and settings["max_steps"] > stored["max_steps"]:
            if not extend:
                raise SystemExit(
                    f"{self.folder} was started with max_steps {stored['max_steps']}, not with "
                    f"{settings['max_steps']}; --extend goes on all the same."
                )
            progress["extensions"].append({"max_steps": stored["max_steps"], "step": progress["step"]})
        elif differing:
            said = {"samples_per_step": "samples_per_step (of batch_size or total_batch_size)"}
            words = "; ".join(
                f"{said.get(name, name)} {old}, not with {new}" for name, (old, new) in differing.items()
            )
            raise SystemExit(f"{self.folder} was started with {words}. Choose another `output_dir`.")
        try:
            self.accelerator.load_state(self.folder)
            states = self.folder / f"random_states_{self.accelerator.process_index}.pkl"
            if states.exists() or self.accelerator.process_index == 0:  # a process that joins has none
                if not torch.equal(load(states)["torch_manual_seed"], torch.get_rng_state()):
                    raise ValueError(f"{states.name} cannot be set")  # of which Accelerate tells nobody
            if average is not None:
                _load_average(average, self.folder / AVERAGE)
        except Exception as reason:  # of any kind, as crafted files have it
            raise SystemExit(f"{self.folder} cannot be resumed from: {one_line(reason)}") from reason
        return progress | {"settings": settings}

    def _refuse(self, problem: list[str]):
        """End all processes if the main one has found a problem."""
        broadcast_object_list(problem)
        if problem[0]:
            raise SystemExit(problem[0])


def _save_average(average: EMAModel, path: Path):
    tensors = {f"{n:06d}": tensor.contiguous() for n, tensor in enumerate(average.shadow_params)}
    safetensors.torch.save_file(tensors | {"step": torch.tensor(average.optimization_step)}, path)


def _load_average(average: EMAModel, path: Path):
    tensors = safetensors.torch.load_file(path)
    average.optimization_step = int(tensors.pop("step"))
    stored = [tensors[name] for name in sorted(tensors)]
    if [tensor.shape for tensor in stored] != [tensor.shape for tensor in average.shadow_params]:
        raise ValueError(f"{AVERAGE} holds other tensors than the model")
    average.shadow_params = stored


def _read_progress(folder: Path) -> dict:
    kinds = {"settings": dict, "extensions": list, "step": int, "best_step": int, "skipped": int, "best": int | float}
    try:
        progress = json.loads((folder / PROGRESS).read_text())
        if all(isinstance(progress[name], kind) for name, kind in kinds.items()) and progress["step"] >= 0:
            return progress
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise SystemExit(f"{folder} is damaged: {PROGRESS} is not that of a run.")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, in one line; empty if nothing is."""
    if folder.is_symlink():
        return f"{folder} is a link, which the next checkpoint could not replace; put the folder itself there."
    if not (folder / MANIFEST).is_file():
        return f"{folder} is no complete checkpoint: {MANIFEST} is missing; choose another `output_dir`."
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        found = {path.name for path in folder.iterdir()} - {MANIFEST}
        for name in sorted({PROGRESS} | found | digests.keys()):
            if not KNOWN_FILES.fullmatch(name):
                return f"{folder} holds {name!r}, which no checkpoint holds; it is not read."
            if name not in found or (folder / name).is_symlink():
                return f"{folder} is damaged: {name} is missing."
            if digests.get(name) != _digest(folder / name):
                return f"{folder} is damaged: {name} is not as it was written."
    except (OSError, ValueError, AttributeError, RecursionError) as reason:
        return f"{folder} is damaged: {MANIFEST}: {one_line(reason)}."
    return ""


def _differences(stored: Any, given: Any, name: str = "") -> dict[str, tuple[str, str]]:
    """Name of each entry that differs, "block.entry" of nested ones -> what was stored and what is given, in short."""
    if isinstance(stored, dict) and isinstance(given, dict):
        differing: dict[str, tuple[str, str]] = {}
        for key in sorted(stored.keys() | given.keys()):
            path = f"{name}.{key}" if name else key
            differing |= _differences(stored.get(key, "nothing"), given.get(key, "nothing"), path)
        return differing
    if stored == given:
        return {}
    return {name: (textwrap.shorten(str(stored), 60), textwrap.shorten(str(given), 60))}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a full disk raises differs by who writes: make it an OSError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as reason:
        raise OSError(f"{path} cannot be written: {reason}") from reason


__all__ = ["Checkpoint", "writing"]
