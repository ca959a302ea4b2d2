"""What processes that train together share: their number, a score's mean, and weights that are spread over them."""

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import send_to_device
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.utils import logging


def join_processes() -> PartialState:
    """Join the processes that torchrun started; without being told, Accelerate does not where there is no GPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def mean_over(
    dataset: Dataset,
    batch_size: int,
    total_and_count: Callable[[dict], tuple[torch.Tensor, torch.Tensor]],
    accelerator: Accelerator,
) -> float:
    """The mean of a score over a data set, of which each of n processes takes every n-th item.

    It is NaN where `past_values` are not finite, from which a model refuses to forecast.

    Args:
        total_and_count: batch -> sum of the score, and over how many values.

    Raises:
        ValueError: fewer items than processes, or nothing to score.
    """
    items, ranks = len(dataset), accelerator.num_processes  # type: ignore[arg-type]
    if items < ranks:
        raise ValueError(f"`dataset` must hold at least one item for each of {ranks} processes, got {items}.")
    loader = DataLoader(Subset(dataset, range(accelerator.process_index, items, ranks)), batch_size)

    def scored(batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        batch = send_to_device(batch, accelerator.device)
        past = batch.get("past_values")
        if past is None or torch.isfinite(past).all():
            return total_and_count(batch)
        _, batch_count = total_and_count(batch | {"past_values": past.nan_to_num()})  # all make as many calls
        return torch.tensor(math.nan, device=accelerator.device), batch_count

    total, count = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in logging.tqdm(loader, desc="validation", leave=False, disable=not accelerator.is_main_process):
        batch_total, batch_count = scored(batch)
        total, count = total + batch_total.double(), count + batch_count
    if len(loader) < math.ceil(math.ceil(items / ranks) / batch_size):
        # Another process has one batch more. Sharded weights are gathered in every call, so all make as many calls.
        scored(batch)
    total, count = accelerator.reduce(total), accelerator.reduce(count)
    if not count:
        raise ValueError(f"`dataset`: none of its {items} items holds a value to score.")
    return (total / count).item()


def load_gathered(target: torch.nn.Module, sharded: torch.nn.Module):
    """Load the weights of a model that is sharded over processes into an unsharded one; all processes call it.

    The first process ends with the weights, the others with what `target` had.
    """
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state:
        target.load_state_dict(state)


__all__ = ["join_processes", "load_gathered", "mean_over"]
