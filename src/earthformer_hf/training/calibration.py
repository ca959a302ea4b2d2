"""The calibration of a trained model at each lead time: how far it is right, and how frequent its intensities are."""

from collections.abc import Iterable, Sequence

import torch

from ..calibration import interpolated
from ..evaluation.metrics import ensemble_crps


BINS = 4096
LEAST = 1e-3  # between neighbouring values, of their range
PIXELS = 2**15  # of each lead time that a fit of the CRPS looks at
STEPS = 100  # of that fit


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
        values: rising, in the model's range. The first one, such as no rain, stays what it is; those that were never
            observed at a lead time are moved as far as the highest that was.

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
        moved = 0.0
        for value in values[1:]:
            wanted = seen[torch.searchsorted(edges, value).clamp(max=BINS - 1)]
            if 0 < wanted < seen[0]:
                place = int((said >= wanted).sum()) - 1  # the highest bin that is reached as often
                moved = float(edges[max(place, 0)]) - value
            row.append(max(value + moved, row[-1] + LEAST))
        rows.append(row)
    return [list(values), *rows]


def crps_calibration(
    parts: Sequence[torch.Tensor],
    future: torch.Tensor,
    observed: torch.Tensor,
    values: list[float],
) -> tuple[list[list[float]], list[list[float]]]:
    """Weights of the parts of an ensemble's members, and a calibration of their sum, with the least fair CRPS.

    Minimum CRPS estimation, Gneiting et al., "Calibrated probabilistic forecasting using ensemble model output
    statistics and minimum CRPS estimation", Monthly Weather Review 133, 2005, of each member by itself.

    Args:
        parts: members (E, N, T, H, W, C), then what all members of a window have in common, each (N, T, H, W, C).
            The weights add up to 1.
        future: what followed, (N, T, H, W, C).
        observed: bool, broadcasts to it.
        values: rising, in the model's range, at which the calibration bends.

    Returns:
        Weights as the `blend` of a [`PreDiffPipeline`], a row of each lead time, and a `calibration`.
    """
    random = torch.Generator().manual_seed(0)
    blend, rows = [], [list(values)]
    for lead in range(future.shape[1]):
        found = observed[:, lead].expand_as(future[:, lead]).flatten().nonzero()[:, 0]
        found = found[torch.randperm(len(found), generator=random)[:PIXELS]]
        members = parts[0][:, :, lead].flatten(1)[:, found].float()  # (E, P)
        common = [part[:, lead].flatten()[found].float() for part in parts[1:]]  # (P,) each
        weights, knots = _least_crps(members, common, future[:, lead].flatten()[found], values)
        blend.append(weights)
        rows.append(knots)
    return blend, rows


def _least_crps(
    members: torch.Tensor, common: list[torch.Tensor], targets: torch.Tensor, values: list[float]
) -> tuple[list[float], list[float]]:
    """Weights and knots as of [`crps_calibration`]; members (E, P), what is common and targets (P,)."""
    issued, lowest, highest = members.new_tensor(values), values[0], max(values[-1], 1.0)
    start, gaps = issued[:1].clone(), issued.diff().log()
    shares = members.new_zeros(len(common))
    chosen = [tensor.requires_grad_() for tensor in (start, gaps, shares) if len(tensor)]
    optimizer = torch.optim.LBFGS(chosen, max_iter=STEPS, line_search_fn="strong_wolfe")

    def knots() -> torch.Tensor:
        return torch.cat([start, start + gaps.exp().cumsum(0)])

    def fair_crps() -> torch.Tensor:
        optimizer.zero_grad()
        mixed = sum((share * part for share, part in zip(shares, common)), (1 - shares.sum()) * members)
        ensemble = interpolated(mixed, issued, knots()).clamp(lowest, highest)
        score = ensemble_crps(ensemble, targets)[1].mean()
        score.backward()
        return score

    optimizer.step(fair_crps)
    common_weights = shares.tolist()
    return [1 - sum(common_weights), *common_weights], knots().tolist()


__all__ = ["correction_weights", "crps_calibration", "quantile_calibration"]
