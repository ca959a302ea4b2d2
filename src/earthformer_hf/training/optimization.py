"""Optimisers and learning rates of training recipes, beyond what torch has."""

import math

import torch
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from .arguments import TrainingArguments


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each weight matrix is made orthogonal, so that all its directions learn alike.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon; the size of the update follows Liu et al., "Muon is scalable for LLM
    training", 2025, https://arxiv.org/abs/2502.16982, so that AdamW's learning rates carry over. `torch.optim.Muon`
    does this in bfloat16 and matrix by matrix, which takes longer on a CPU than the rest of a training step; here all
    matrices of a shape go together, in float32.

    Args:
        params: parameters of two or more dimensions; all but the first are taken as one.
        lr: learning rate.
        momentum: decay of the running mean of gradients (Nesterov).
        weight_decay: decoupled, relative to the learning rate.

    Raises:
        ValueError: a parameter of fewer dimensions.
    """

    def __init__(self, params, lr: float = 2e-3, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2:
                    raise ValueError(f"Muon: `params` must be matrices, got one of shape {tuple(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                by_shape.setdefault(update.shape, []).append((parameter, update))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalized(torch.stack([update for _, update in pairs]))
                size = 0.2 * math.sqrt(max(rows, columns))
                for (parameter, _), update in zip(pairs, updates):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)
        return loss


def orthogonalized(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """(N, rows, columns) -> the same with all singular values near 1 (0.7 to 1.2), by Newton-Schulz iterations."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    for _ in range(steps):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.775 * square) @ wide
    return (wide if matrices.shape[1] <= matrices.shape[2] else wide.mT).contiguous()


def optimizers_of(model: torch.nn.Module, arguments: TrainingArguments) -> list[torch.optim.Optimizer]:
    """AdamW, without decay of layer norms and biases (as the originals); or Muon for weight matrices beside it."""
    rate, betas = arguments.learning_rate, (arguments.betas[0], arguments.betas[1])
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if arguments.optimizer == "adamw":
        decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], ["bias"]))
        groups: dict[tuple[bool, bool], list] = {}
        for name, parameter in named.items():
            groups.setdefault((name in decayed, "position" in name), []).append(parameter)
        options = [
            {
                "params": parameters,
                "weight_decay": arguments.weight_decay if decays else 0.0,
                "lr": rate * arguments.position_rate if position else rate,
            }
            for (decays, position), parameters in groups.items()
        ]
        return [torch.optim.AdamW(options, rate, betas)]
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    positions: list[torch.nn.Parameter] = []
    for name, parameter in named.items():
        group = positions if "position" in name else matrices if parameter.ndim > 1 else others
        group.append(parameter)
    options = [{"params": others, "lr": rate}, {"params": positions, "lr": rate * arguments.position_rate}]
    options = [option for option in options if option["params"]]
    muon = Muon(matrices, rate, weight_decay=arguments.weight_decay)
    return [muon, torch.optim.AdamW(options, rate, betas, weight_decay=0)]


def learning_rate_schedules(optimizers: list[torch.optim.Optimizer], arguments: TrainingArguments) -> list:
    """For each optimiser a linear rise over the warm-up, then half a cosine down to `min_lr_rate` of the highest."""
    return [
        get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            arguments.warmup_steps,
            arguments.max_steps,
            scheduler_specific_kwargs={"min_lr_rate": arguments.min_lr_rate},
        )
        for optimizer in optimizers
    ]


__all__ = ["Muon", "learning_rate_schedules", "optimizers_of", "orthogonalized"]
