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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

    def restore(self, settings: dict) -> dict:
        """Load the last checkpoint, if there is one; all processes call it.

        Args:
            settings: what must be as it was when the run began.

        Returns:
            The stored progress; empty without a checkpoint.

        Raises:
            SystemExit: the checkpoint's settings are others.
        """
        if self.accelerator.is_main_process and not self.folder.exists() and (self.new / "progress.json").exists():
            os.replace(self.new, self.folder)  # a kill came between the two renames of `save`
        self.accelerator.wait_for_everyone()
        if not self.exists:
            return {}
        progress = json.loads((self.folder / "progress.json").read_text())
        if progress.get("settings") != settings:
            raise SystemExit(f"{self.folder} was started with {progress.get('settings')}, not with {settings}.")
        self.accelerator.load_state(self.folder)
        return progress


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a full disk raises differs by who writes: make it an OSError that names the path."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as reason:
        raise OSError(f"{path} cannot be written: {reason}") from reason


__all__ = ["Checkpoint", "writing"]
