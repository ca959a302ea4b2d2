"""A 3x3x3 convolution with 64 multiplications for every 8 places instead of 216, for inference on a CPU.

Along one axis, two neighbouring outputs of the kernel (f, g, h) on the values (a, b, c, d) are

    f a + g b + h c = m0 + m1 + m2        m0 = (a - c) f      m1 = (b + c) (f + g + h) / 2
    f b + g c + h d = m1 - m2 - m3        m3 = (b - d) h      m2 = (c - b) (f - g + h) / 2

which are four multiplications instead of six; along three axes 4 x 4 x 4 instead of 6 x 6 x 6. The result is the same
but for rounding. The sums over channels become 64 products of matrices.

Source: Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast Algorithms for Convolutional
Neural Networks", CVPR 2016, https://arxiv.org/abs/1509.09308.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .folding import is_bare


MIN_CHANNELS = 128  # of input and output; fewer take as long or longer, for a batch of more than one
# Of the output, and of transformed values, at once: they bound the memory that a call needs.
MAX_CHANNELS, MAX_VALUES = 128, 2**22


def winograd_conv3d(volume: torch.Tensor, conv: nn.Conv3d) -> torch.Tensor:
    """`conv(volume)`, of a 3x3x3 convolution that keeps the size and is padded with zeros.

    Left to `conv` if it is narrow, or more than its weights; on a GPU, in half precision, while a model is compiled or
    exported, and where gradients are recorded.

    Args:
        volume: (B, C_in, T, H, W).

    Returns:
        (B, C_out, T, H, W), with channels last in memory.
    """
    if not _applies(volume, conv):
        return conv(volume)
    tokens, size = volume.permute(0, 2, 3, 4, 1), volume.shape[2:]  # (B, T, H, W, C_in)
    output = tokens.new_empty(*tokens.shape[:4], conv.out_channels)
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
    transform = conv.weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    transform = torch.kron(torch.kron(transform, transform), transform)  # (64, 27)
    time, height, width = ((1, 1 + n % 2) for n in size)  # zeros on both sides, to an even size
    samples = max(1, MAX_VALUES // (8 * tokens[0].numel()))
    for some, results in zip(tokens.split(samples), output.split(samples)):
        sums = F.pad(some, (0, 0, *width, *height, *time))
        for _ in size:
            sums = _sums_of_neighbours(sums)
        grid = sums.shape[:-1]  # (4, 4, 4, samples, T / 2, H / 2, W / 2)
        sums = sums.view(64, -1, conv.in_channels)
        parts = (x.split(MAX_CHANNELS) for x in (conv.weight, bias, results.movedim(-1, 0)))
        for weights, biases, part in zip(*parts):
            kernel = (transform @ weights.reshape(-1, 27).T).view(64, -1, conv.in_channels)
            products = torch.bmm(sums, kernel.mT).view(*grid, -1)
            for _ in size:
                products = _two_places(products)
            products = products[:, : size[0], : size[1], : size[2]]
            torch.add(products, biases, out=part.movedim(0, -1))
    return output.permute(0, 4, 1, 2, 3)


def _applies(volume: torch.Tensor, conv: nn.Conv3d) -> bool:
    if not volume.is_cpu or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    full = volume.dtype == conv.weight.dtype in (torch.float32, torch.float64)
    wide = min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    return full and wide and is_bare(conv) and not torch.compiler.is_compiling()


def _sums_of_neighbours(values: torch.Tensor) -> torch.Tensor:
    """The fourth axis, 2 n + 2 values: (..., 2 n + 2, ...) -> (4, ..., n, ...)."""
    even, odd = values.unflatten(3, (-1, 2)).unbind(4)
    a, b, c, d = even[:, :, :, :-1], odd[:, :, :, :-1], even[:, :, :, 1:], odd[:, :, :, 1:]
    sums = values.new_empty(4, *a.shape)
    torch.sub(a, c, out=sums[0])
    torch.add(b, c, out=sums[1])
    torch.sub(c, b, out=sums[2])
    torch.sub(b, d, out=sums[3])
    return sums


def _two_places(products: torch.Tensor) -> torch.Tensor:
    """The first axis, 4 products, becomes two places of the fourth axis left: (4, ..., n, ...) -> (..., 2 n, ...)."""
    m0, m1, m2, m3 = products
    places = m0.new_empty(*m0.shape[:4], 2, *m0.shape[4:])
    torch.add(m0, m1, out=places[:, :, :, :, 0]).add_(m2)
    torch.sub(m1, m2, out=places[:, :, :, :, 1]).sub_(m3)
    return places.flatten(3, 4)


__all__ = ["winograd_conv3d"]
