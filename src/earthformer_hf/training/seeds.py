"""Seeds that follow from whole numbers, and do not overlap as sums of them would."""

import numpy as np
import torch


def derive_seed(seed: int, *key: int) -> int:
    """A seed of 32 bits that follows from a run's seed and a key, such as the step and the process.

    Nearby seeds and keys give unrelated results, and none is the run's seed itself, from which the weights are drawn:
    step 1 of seed 0 draws other noise than step 0 of seed 1.

    Args:
        seed, key: at least 0.
    """
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


def validation_generator(rank: int = 0) -> torch.Generator:
    """Noise for scores and figures: the same at every evaluation and in every run, another one in each process.

    Args:
        rank: number of the process.
    """
    return torch.Generator().manual_seed(derive_seed(0, rank))


__all__ = ["derive_seed", "validation_generator"]
