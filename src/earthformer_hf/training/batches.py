"""The batches that a run reads: of a data set in a fixed order, or of a stream that remembers its place."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset


def ordered_batches(
    train_set: Dataset, batch_size: int, num_workers: int, accelerator: Accelerator, items: range
) -> DataLoader:
    """This process's batches of the given items, on the device; with n processes each takes every n-th batch.

    Args:
        items: positions in `train_set`, one after the other.
    """
    loader = DataLoader(train_set, batch_size, sampler=items, num_workers=num_workers)
    return accelerator.prepare(loader)


class StreamBatches:
    """Batches of the examples of a stream that are this process's, on the device, epoch after epoch without end.

    Args:
        stream: divided among the processes by `datasets.distributed.split_dataset_by_node`.
        batch_size: an epoch's last examples that do not fill a batch are left out.
        num_workers: processes that read.
        accelerator: of the run.
    """

    def __init__(self, stream: datasets.IterableDataset, batch_size: int, num_workers: int, accelerator: Accelerator):
        from torchdata.stateful_dataloader import StatefulDataLoader

        self.accelerator, self.epoch = accelerator, 0
        self.examples = split_dataset_by_node(stream, accelerator.process_index, accelerator.num_processes)
        self.loader = StatefulDataLoader(self.examples, batch_size, num_workers=num_workers, drop_last=True)
        self.within_epoch = False  # whether the next epoch to be read was begun before the checkpoint

    def __iter__(self) -> Iterator[dict]:
        while True:
            empty = not self.within_epoch
            for batch in self.loader:
                empty = False
                yield send_to_device(batch, self.accelerator.device)
            if empty:
                raise ValueError(
                    f"`train_set`: a process's examples of the stream are less than a batch ({self.examples})."
                )
            self.within_epoch = False
            self.epoch += 1
            self.examples.set_epoch(self.epoch)

    def save(self, folder: Path):
        """Write this process's place in the stream into a checkpoint."""
        torch.save({"epoch": self.epoch, "loader": self.loader.state_dict()}, self._file(folder))

    def restore(self, folder: Path):
        """Go on where a checkpoint was written.

        Raises:
            SystemExit: another number of processes wrote it; they divided the stream in another way.
        """
        files, processes = len(list(folder.glob("stream_*.pt"))), self.accelerator.num_processes
        if files != processes:
            raise SystemExit(
                f"{folder} was written by {files} processes that read a stream, now there are {processes}: each reads "
                "other examples of it than it did."
            )
        stored = torch.load(self._file(folder), weights_only=True)
        self.epoch, self.within_epoch = stored["epoch"], True
        self.examples.set_epoch(self.epoch)
        self.loader.load_state_dict(stored["loader"])

    def _file(self, folder: Path) -> Path:
        return folder / f"stream_{self.accelerator.process_index}.pt"


__all__ = ["StreamBatches", "ordered_batches"]
