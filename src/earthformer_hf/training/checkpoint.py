"""The checkpoint of a run: its complete state, on disk, replaced as a whole.

```
OUTPUT_DIR/checkpoints/new     the state that is being written; complete once it holds progress.json
                      /last    the state that a run resumes from
                      /old     the one before, between the two renames that put `new` in the place of `last`
```
"""

import json
import os
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from .batches import StreamBatches


class Checkpoint:
    """State of models, optimisers, schedules and averaged weights, progress, and the place in a stream.

    A kill at any moment leaves the last checkpoint, or the new one, complete.

    Args:
        output_dir: of the run.
        accelerator: has what it saves and loads prepared or registered.
    """

    def __init__(self, output_dir: str | Path, accelerator: Accelerator):
        self.accelerator = accelerator
        self.folder = Path(output_dir) / "checkpoints" / "last"
        self.new, self.old = self.folder.with_name("new"), self.folder.with_name("old")

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def exists(self) -> bool:
        return (self.folder / "progress.json").exists()

    def save(self, progress: dict, stream: StreamBatches | None = None):
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
                (self.new / "progress").write_text(json.dumps(progress))
            os.replace(self.new / "progress", self.new / "progress.json")  # this completes it
            shutil.rmtree(self.old, ignore_errors=True)
            if self.folder.exists():
                os.replace(self.folder, self.old)
            os.replace(self.new, self.folder)
            shutil.rmtree(self.old, ignore_errors=True)
        wait_for_everyone()

    def restore(self, settings: dict, extend: bool = False) -> dict:
        """Load the last checkpoint, if there is one; all processes call it.

        Args:
            settings: what must be as it was when the run began, as JSON can hold it.
            extend: `max_steps` may be higher than it was.

        Returns:
            The stored progress, with these settings; empty without a checkpoint.

        Raises:
            SystemExit: the checkpoint's settings are others; which, in one line.
        """
        if self.accelerator.is_main_process and not self.folder.exists() and (self.new / "progress.json").exists():
            os.replace(self.new, self.folder)  # a kill came between the two renames of `save`
        self.accelerator.wait_for_everyone()
        if not self.exists:
            return {}
        progress = json.loads((self.folder / "progress.json").read_text())
        stored = progress.get("settings", {})
        differing = _differences(stored, settings)
        if set(differing) == {"max_steps"} and settings["max_steps"] > stored["max_steps"]:
            if not extend:
                raise SystemExit(
                    f"{self.folder} was started with max_steps {stored['max_steps']}, not with "
                    f"{settings['max_steps']}; --extend goes on all the same."
                )
            progress["extensions"].append({"max_steps": stored["max_steps"], "step": progress["step"]})
        elif differing:
            words = "; ".join(f"{name} {old}, not with {new}" for name, (old, new) in differing.items())
            raise SystemExit(f"{self.folder} was started with {words}. Choose another `output_dir`.")
        self.accelerator.load_state(self.folder)
        return progress | {"settings": settings}


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
