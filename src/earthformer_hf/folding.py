"""Nearest-neighbour upsampling and the 3x3 convolutions right after it, at the cost of one transposed convolution.

```
plain:   frames -> each pixel s x s times -> first convolution -> second convolution
folded:  frames -> transposed convolution of stride s, kernel s + 2 (one convolution) or s + 4 (two)
```

Both are the same linear map: an upsampled frame repeats its pixels, so that what the convolutions do to repetitions
can be added up beforehand, from the weights alone. They differ in one place. Between two convolutions the plain form
puts zeros around the frame, where the composed kernel sees what the first convolution gives there; this is a line
along each edge, which is computed and taken off again.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast


def plain_upsample_conv(
    frames: torch.Tensor,
    size: Sequence[int],
    first: nn.Conv2d,
    second: nn.Conv2d | None = None,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `upsample_conv` computes, step by step."""
    frames = first(F.interpolate(frames, size=tuple(size), mode="nearest"))
    if second is None:
        return frames
    return second(frames if beside is None else torch.cat([frames, beside.to(frames.dtype)], dim=1))


def upsample_conv(
    frames: torch.Tensor,
    size: Sequence[int],
    first: nn.Conv2d,
    second: nn.Conv2d | None = None,
    beside: torch.Tensor | None = None,
) -> torch.Tensor:
    """Nearest-neighbour upsampling to `size`, then one or two convolutions.

    Folded where `size` is a whole multiple of at least 2 along both axes, and the convolutions are nothing but their
    weights. The kernel is composed in every call, in float32 or better.

    Args:
        frames: (N, C, H, W).
        size: height and width of the result.
        first, second: convolutions 3x3 that keep the size, padded with zeros.
        beside: (N, C', *size), channels that join those between the two convolutions.

    Returns:
        (N, channels of the last convolution, *size).
    """
    factors = [n // m for n, m in zip(size, frames.shape[2:])]
    whole = all(n == m * factor and factor > 1 for n, m, factor in zip(size, frames.shape[2:], factors))
    if not whole or not all(is_bare(conv) for conv in (first, second) if conv is not None):
        return plain_upsample_conv(frames, size, first, second, beside)
    if second is None:
        kernel, bias = _compose(factors, first)
        return F.conv_transpose2d(frames, kernel, bias, stride=factors, padding=1)

    weight, weight_beside = second.weight.tensor_split([first.out_channels], dim=1)
    kernel, bias = _compose(factors, first, weight, second.bias)
    output = F.conv_transpose2d(frames, kernel, bias, stride=factors, padding=2)
    weights = first.weight, weight
    output[:, :, :: size[0] - 1] -= _from_beyond(frames, factors[1], weights, first.bias, corners=True)
    weights = first.weight.mT, weight.mT
    output[..., :: size[1] - 1] -= _from_beyond(frames.mT, factors[0], weights, first.bias, corners=False).mT
    if beside is not None:
        output += F.conv2d(beside.to(frames.dtype), weight_beside, padding=1)
    return output


def is_bare(conv: nn.Conv2d | nn.Conv3d) -> bool:
    """No adapter around its weights, nor a hook that expects it to be called, such as one that loads them."""
    hooks = conv._forward_pre_hooks, conv._forward_hooks, conv._backward_pre_hooks, conv._backward_hooks
    offloaded = hasattr(conv, "_hf_hook") or hasattr(conv, "_diffusers_hook")
    return type(conv) in (nn.Conv2d, nn.Conv3d) and not any(hooks) and not offloaded


def _compose(
    factors: Sequence[int], first: nn.Conv2d, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kernel (C_in, C_out, s + 2, s + 2), with a second weight s + 4, and bias of the transposed convolution."""
    dtype = torch.promote_types(first.weight.dtype, torch.float32)
    with maybe_autocast(first.weight.device.type, enabled=False):
        taps = first.weight.to(dtype).flatten(0, 1)[:, None]  # (C_between * C_in, 1, 3, 3)
        kernel = F.conv2d(taps.new_ones(1, 1, *factors), taps, padding=2)
        kernel = kernel.view(*first.weight.shape[:2], *kernel.shape[2:]).transpose(0, 1)
        if weight is None:
            return kernel.to(first.weight.dtype), first.bias
        kernel = F.conv2d(kernel, weight.to(dtype), padding=2)
        if first.bias is not None:
            through = (weight.to(dtype).sum((2, 3)) * first.bias.to(dtype)).sum(1)
            bias = (through if bias is None else through + bias).to(weight.dtype)
        return kernel.to(weight.dtype), bias


def _from_beyond(
    frames: torch.Tensor,
    factor: int,
    weights: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    corners: bool,
) -> torch.Tensor:
    """What the second convolution adds to the first and last row if the first is not cut off at the frame.

    Args:
        frames: (N, C_in, H, W), before upsampling.
        factor: of upsampling along the rows.
        weights, bias: weights of both convolutions, and the first's bias.
        corners: whether the places diagonally beyond the corners count.

    Returns:
        (N, C_out, 2, factor * W).
    """
    first, second = weights
    rows = []
    for row, towards, away in ((0, slice(2, 3), slice(0, 1)), (-1, slice(0, 1), slice(2, 3))):
        edge = frames[:, :, row, None].repeat_interleave(factor, dim=3)  # (N, C_in, 1, factor * W)
        beyond = F.conv2d(edge, first[:, :, towards], bias, padding=(0, 2 if corners else 1))
        rows.append(F.conv2d(beyond, second[:, :, away], padding=(0, 0 if corners else 1)))
    return torch.cat(rows, dim=2)


__all__ = ["is_bare", "plain_upsample_conv", "upsample_conv"]
