"""The calibration of a trained model at each lead time: how far it is right, and how frequent its intensities are."""

from collections.abc import Iterable

import torch


BINS = 4096
LEAST = 1e-3  # between neighbouring values, of their range


def correction_weights(predictions: torch.Tensor, future: torch.Tensor, guess: torch.Tensor) -> list[float]:
    """Weights as of [`EarthformerConfig`] with the least squared error: of each lead time, 0..1.

    Args:
        predictions, future, guess: (N, T, H, W, C), NaN in `future` where it was not observed.
    """
    weights = []
    for lead in range(predictions.shape[1]):
        said, seen = (part[:, lead] - guess[:, lead] for part in (predictions, future))
        said = torch.where(seen.isfinite(), said, 0.0).double()
        power = said.square().sum()
        weights.append(float((said * seen.nan_to_num()).sum() / power) if power > 0 else 1.0)
    return [min(max(weight, 0.0), 1.0) for weight in weights]


def quantile_calibration(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], values: list[float]
) -> list[list[float]]:
    """A calibration as of [`EarthformerConfig`]: where forecasts exceed a value as often as observations do.

    The matching of probabilities of Ebert, "Ability of a poor man's ensemble to predict the probability and
    distribution of precipitation", Monthly Weather Review 129, 2001, per lead time.

    Args:
        pairs: predictions, what followed, both (B, T, H, W, C), and which of it was observed, bool.
        values: rising, in the model's range. The first one, such as no rain, stays what it is; so do those that were
            never observed at a lead time.

    Raises:
        ValueError: no pairs.
    """
    counts, lowest, highest = None, values[0] - 1.0, values[-1] + 1.0
    for predictions, future, observed in pairs:
        observed = observed.expand_as(predictions)
        found = torch.stack(
            [
                torch.stack([torch.histc(part[:, t][observed[:, t]].float(), BINS, lowest, highest) for t in range(T)])
                for part in (predictions.clamp(lowest, highest), future.clamp(lowest, highest))
                for T in [part.shape[1]]
            ]
        ).double()  # (2, T, BINS)
        counts = found if counts is None else counts + found
    if counts is None:
        raise ValueError("`pairs`: nothing to calibrate from.")
    exceeding = counts.flip(-1).cumsum(-1).flip(-1)  # how many lie in a bin or above
    edges = torch.linspace(lowest, highest, BINS + 1, dtype=torch.float64)[:-1]
    rows = []
    for said, seen in zip(*exceeding):
        row = [values[0]]
        for value in values[1:]:
            wanted = seen[torch.searchsorted(edges, value).clamp(max=BINS - 1)]
            place = int((said >= wanted).sum()) - 1  # the highest bin that is reached as often
            knot = float(edges[max(place, 0)]) if 0 < wanted < seen[0] else value
            row.append(max(knot, row[-1] + LEAST))
        rows.append(row)
    return [list(values), *rows]


__all__ = ["correction_weights", "quantile_calibration"]
