"""Cuboid attention: the layers that Earthformer and PreDiff are built from.

A tensor of shape (batch, time, height, width, channels) is cut into cuboids of equal size; attention runs inside each
cuboid, in parallel. A cuboid gathers neighbours ("local") or a regular lattice ("dilated") along each axis, and may be
shifted. A few *global vectors* read from every token and are read by every token, and so carry news between cuboids.

Source: Gao et al., "Earthformer: Exploring Space-Time Transformers for Earth System Forecasting", NeurIPS 2022,
https://arxiv.org/abs/2207.05833, section 3 (equations 1 to 6). Nothing here knows which model it serves.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_torchdynamo_exporting

from .folding import upsample_conv


LEAKY_SLOPE = 0.1  # of every leaky ReLU in the originals
MASKED = -3e4  # added to the score of a pair that must not meet: finite in half precision, nothing after a softmax

# Fused attention kernels on GPUs refuse a longer batch, or more heads, in one call (pytorch issues 142228 and 146704).
# An exported program makes one call whatever its size, since a loop of a fixed number of calls would bound its batch.
MAX_WINDOWS = 65_535


# ---------------------------------------------------------------------------------------------------------------------
# Cuboids and the published patterns of cuboids
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuboid:
    """How one layer of self-attention cuts (time, height, width) into cuboids.

    Args:
        size: tokens of a cuboid along time, height and width.
        strategy: per axis "local" (neighbours) or "dilated" (every n-th token).
        shift: tokens by which the grid is rolled before it is cut, as in Swin Transformer. Ignored on dilated axes
            and on axes that one cuboid covers.

    Raises:
        ValueError: a size below one, an unknown strategy, or a shift outside [0, size).
    """

    size: tuple[int, ...]
    strategy: tuple[str, ...] = ("local", "local", "local")
    shift: tuple[int, ...] = (0, 0, 0)

    def __post_init__(self):
        _check_cuboid(self, axes=3)

    @property
    def volume(self) -> int:
        return math.prod(self.size)

    def fit(self, grid: Sequence[int]) -> "Cuboid":
        """This cuboid on a grid (T, H, W): never larger than the grid, and unshifted where a shift means nothing."""
        size = tuple(min(s, n) for s, n in zip(self.size, grid))
        shift = tuple(
            0 if strategy == "dilated" or n <= s else d
            for d, s, n, strategy in zip(self.shift, self.size, grid, self.strategy)
        )
        return Cuboid(size, self.strategy, shift)


@dataclass(frozen=True)
class CrossCuboid:
    """How one layer of cross-attention cuts the forecast and its context, which may differ in length.

    Along time, both are cut into the same number of cuboids; along height and width, into cuboids of the same size.

    Args:
        size: tokens of a cuboid along height and width.
        strategy: along time, height and width "local" (neighbours) or "dilated" (every n-th token).
        shift: tokens along height and width by which the grid is rolled before it is cut. Ignored on dilated axes.
        cuboids_along_time: into how many cuboids time is cut; 1 for all frames in one.

    Raises:
        ValueError: a size or number below one, an unknown strategy, or a shift outside [0, size).
    """

    size: tuple[int, ...]
    strategy: tuple[str, ...] = ("local", "local", "local")
    shift: tuple[int, ...] = (0, 0)
    cuboids_along_time: int = 1

    def __post_init__(self):
        _check_cuboid(self, axes=2)
        if not isinstance(self.cuboids_along_time, int) or self.cuboids_along_time < 1:
            raise ValueError(
                f"CrossCuboid: `cuboids_along_time` must be a positive integer, got {self.cuboids_along_time!r}."
            )

    def along(self, time: int) -> Cuboid:
        """The cuboid, in tokens, of a sequence of `time` frames."""
        shift = (0 if strategy == "dilated" else n for n, strategy in zip(self.shift, self.strategy[1:]))
        return Cuboid((-(-time // self.cuboids_along_time), *self.size), self.strategy, (0, *shift))

    def padding(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Tokens to add per axis to a grid (T, H, W), so that it holds `cuboids_along_time` whole cuboids."""
        tokens = self.along(grid[0]).size[0] * self.cuboids_along_time
        return (tokens - grid[0], *padding_to(grid[1:], self.size))


# The most that a configuration may ask for, far beyond any published model: a network of it is described in seconds.
MAX_SIZE = 100_000  # frames, pixels along an axis, channels, heads, global vectors
MAX_LEVELS = 16
MAX_LAYERS = 1000  # of attention
MAX_BIASES = 100_000_000  # position biases of one layer, per head


def check_layers(depths: Sequence[int], cuboids: Sequence[Sequence], grids: Sequence[Sequence[int]]):
    """Refuse more layers, or longer tables of position biases, than a network can have.

    Args:
        depths: blocks of each level.
        cuboids: of each level, a layer for each in every block.
        grids: (T, H, W) of each level.

    Raises:
        ValueError: names the limit.
    """
    layers = sum(depth * len(level) for depth, level in zip(depths, cuboids))
    if layers > MAX_LAYERS:
        raise ValueError(f"at most {MAX_LAYERS:,} layers of attention (blocks times cuboids) can be, got {layers:,}.")
    for level, grid in zip(cuboids, grids):
        for cuboid in level:
            size = (cuboid.along(grid[0]) if isinstance(cuboid, CrossCuboid) else cuboid).fit(grid).size
            if relative_position_table_length(size) > MAX_BIASES:
                raise ValueError(
                    f"at most {MAX_BIASES:,} position biases can be in a layer, cuboids of {size} have more."
                )


def _check_cuboid(cuboid: Cuboid | CrossCuboid, axes: int):
    """Make tuples of a cuboid's fields, with `axes` entries of size and shift; refuse what cannot work."""
    owner = type(cuboid).__name__
    for name, entries in (("size", axes), ("strategy", 3), ("shift", axes)):
        value = getattr(cuboid, name)
        if not isinstance(value, (list, tuple)) or len(value) != entries:
            which = "time, height, width" if entries == 3 else "height, width"
            raise ValueError(f"{owner}: `{name}` must have {entries} entries ({which}), got {value!r}.")
        object.__setattr__(cuboid, name, tuple(value))
    if not all(isinstance(n, int) and n >= 1 for n in cuboid.size):
        raise ValueError(f"{owner}: `size` must be positive integers, got {cuboid.size}.")
    if not set(cuboid.strategy) <= {"local", "dilated"}:
        raise ValueError(f"{owner}: `strategy` must be 'local' or 'dilated' on each axis, got {cuboid.strategy}.")
    if not all(isinstance(shift, int) and 0 <= shift < size for shift, size in zip(cuboid.shift, cuboid.size)):
        raise ValueError(
            f"{owner}: `shift` must be integers of at least 0 and less than `size`={cuboid.size}, got {cuboid.shift}."
        )


DILATED = ("dilated", "dilated", "dilated")


def _axial(t, h, w):
    return [Cuboid((t, 1, 1)), Cuboid((1, h, 1)), Cuboid((1, 1, w))]


def _divided_space_time(t, h, w):
    return [Cuboid((t, 1, 1)), Cuboid((1, h, w))]


def _full(t, h, w):
    return [Cuboid((t, h, w))]


def _video_swin(t, h, w, p, m):
    p, m = min(p, t), min(m, h, w)
    return [Cuboid((p, m, m)), Cuboid((p, m, m), shift=(p // 2, m // 2, m // 2))]


def _spatial_local_global(t, h, w, m):
    if h <= m and w <= m:
        return _divided_space_time(t, h, w)
    return [Cuboid((t, 1, 1)), Cuboid((1, m, m)), Cuboid((1, m, m), DILATED)]


def _axial_space_dilate(t, h, w, k):
    k = min(k, h, w)
    rows, columns = (1, h // k, 1), (1, 1, w // k)
    return [Cuboid((t, 1, 1)), Cuboid(rows, DILATED), Cuboid(rows), Cuboid(columns, DILATED), Cuboid(columns)]


def _cross(t, h, w, k):
    k = min(k, h, w)
    return [CrossCuboid((k, k))]


def _cross_local_global(t, h, w, k):
    k = min(k, h, w)
    return [CrossCuboid((k, k)), CrossCuboid((k, k), DILATED)]


def _cross_heterogeneous(t, h, w, k):
    k = min(k, h, w)
    return [CrossCuboid((k, k)), CrossCuboid((k, k), DILATED), CrossCuboid((k, k), shift=(k // 2, k // 2))]


# '#' stands for a number in the name, which becomes an argument: "video_swin_2x8" calls _video_swin(t, h, w, 2, 8).
SELF_ATTENTION_PATTERNS: dict[str, Callable] = {
    "axial": _axial,
    "divided_st": _divided_space_time,
    "full": _full,
    "video_swin_#x#": _video_swin,
    "spatial_lg_#": _spatial_local_global,
    "axial_space_dilate_#": _axial_space_dilate,
}
CROSS_ATTENTION_PATTERNS: dict[str, Callable] = {
    "cross_#x#": _cross,
    "cross_#x#_lg": _cross_local_global,
    "cross_#x#_heter": _cross_heterogeneous,
}


def pattern_cuboids(name: str, grid: Sequence[int], patterns: dict[str, Callable]) -> list:
    """The cuboids of a named pattern (Earthformer, table 1 and appendix) on a grid (T, H, W).

    Returns:
        [`Cuboid`]s, or [`CrossCuboid`]s if `patterns` are those of cross-attention.

    Raises:
        ValueError: the name is not in `patterns`, or a number in it is zero.
    """
    numbers = [int(n) for n in re.findall(r"\d+", name)]
    key = re.sub(r"\d+", "#", name)
    if key not in patterns or key.count("#") != len(numbers) or 0 in numbers:
        raise ValueError(f"Unknown attention pattern {name!r}; known are {', '.join(patterns)} ('#' is a number).")
    if patterns is CROSS_ATTENTION_PATTERNS:
        if numbers[0] != numbers[1]:
            raise ValueError(f"Cross-attention patterns are square, got {name!r}.")
        numbers = numbers[:1]
    return patterns[key](*grid, *numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Cutting a tensor into cuboids, and which tokens of a cuboid may see each other
# ---------------------------------------------------------------------------------------------------------------------


def padding_to(grid: Sequence[int], size: Sequence[int]) -> tuple[int, ...]:
    """Tokens to add per axis so that cuboids of `size` divide the grid."""
    return tuple(-n % s for n, s in zip(grid, size))


def pad_grid(hidden_states: torch.Tensor, padding: Sequence[int], time_first: bool = False) -> torch.Tensor:
    """Add zeros at the end of time, height and width of (B, T, H, W, C); `time_first` pads time at the start."""
    if not any(padding):
        return hidden_states
    t, h, w = padding
    return F.pad(hidden_states, (0, 0, 0, w, 0, h, *((t, 0) if time_first else (0, t))))


def cuboid_partition(hidden_states: torch.Tensor, cuboid: Cuboid) -> torch.Tensor:
    """(B, T, H, W, C) -> (B, number of cuboids, tokens of a cuboid, C). The cuboid must divide the grid."""
    batch, *grid, channels = hidden_states.shape
    shape, outer, inner = [batch], [], []
    for axis, (n, size, strategy) in enumerate(zip(grid, cuboid.size, cuboid.strategy)):
        # local: (cuboid, token within it); dilated: (token within it, cuboid)
        shape += [n // size, size] if strategy == "local" else [size, n // size]
        first, second = 2 * axis + 1, 2 * axis + 2
        outer.append(first if strategy == "local" else second)
        inner.append(second if strategy == "local" else first)
    hidden_states = hidden_states.reshape(*shape, channels).permute(0, *outer, *inner, 7)
    count = (grid[0] // cuboid.size[0]) * (grid[1] // cuboid.size[1]) * (grid[2] // cuboid.size[2])
    return hidden_states.reshape(batch, count, cuboid.volume, channels)


def cuboid_reverse(windows: torch.Tensor, cuboid: Cuboid, grid: Sequence[int]) -> torch.Tensor:
    """(B, number of cuboids, tokens of a cuboid, C) -> (B, T, H, W, C): the inverse of `cuboid_partition`."""
    batch, _, _, channels = windows.shape
    windows = windows.reshape(batch, *(n // s for n, s in zip(grid, cuboid.size)), *cuboid.size, channels)
    order = [0]
    for axis, strategy in enumerate(cuboid.strategy):
        outer, inner = axis + 1, axis + 4
        order += [outer, inner] if strategy == "local" else [inner, outer]
    return windows.permute(*order, 7).reshape(batch, *grid, channels)


def roll_grid(hidden_states: torch.Tensor, shift: Sequence[int], sign: int) -> torch.Tensor:
    """Roll (B, T, H, W, C) by sign * shift along time, height and width."""
    if not any(shift):
        return hidden_states
    return torch.roll(hidden_states, [sign * n for n in shift], dims=(1, 2, 3))


def cuboid_regions(
    grid: Sequence[int],
    padding: Sequence[int],
    cuboid: Cuboid,
    mask_padding: bool,
    device: torch.device,
    time_first: bool = False,
) -> torch.Tensor:
    """Which tokens of a cuboid may see each other: those of equal region.

    A shifted grid wraps around, so that a cuboid at its end holds tokens from both ends of an axis; they are kept
    apart. With `mask_padding`, added tokens form a region of their own.

    Returns:
        An integer tensor (number of cuboids, tokens of a cuboid), -1 for an added token that is masked. It is computed
        where it is used, from a few small `arange`s: nothing is cached, so that nothing created in inference mode can
        later reach a training step.
    """
    total = [n + p for n, p in zip(grid, padding)]
    region = torch.zeros(1, *total, 1, dtype=torch.long, device=device)
    padded = torch.zeros_like(region, dtype=torch.bool)
    for axis in range(3):
        n, size, shift = total[axis], cuboid.size[axis], cuboid.shift[axis]
        position = torch.arange(n, device=device)  # after rolling
        along_axis = [n if a == axis + 1 else 1 for a in range(5)]
        if shift > 0:
            ends = (position >= n - size).long() + (position >= n - shift).long()
            region = 3 * region + ends.view(along_axis)
        origin = (position + shift) % n  # before rolling
        added = origin < padding[axis] if axis == 0 and time_first else origin >= grid[axis]
        padded = padded | added.view(along_axis)
    if mask_padding and any(padding):
        region = region.masked_fill(padded, -1)
    return cuboid_partition(region, cuboid)[0, :, :, 0]


def relative_position_index(
    query_size: Sequence[int], key_size: Sequence[int], max_size: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Row of the bias table for each pair of tokens of a cuboid.

    The table has one row per offset (query minus key) between -(max_size - 1) and max_size - 1 on each axis, so a
    cuboid that a small grid has shrunk uses the rows of its true offsets.

    Returns:
        Integer tensor (tokens of a query cuboid, tokens of a key cuboid).
    """
    index = torch.zeros((), dtype=torch.long, device=device)
    for axis, (q, k, n) in enumerate(zip(query_size, key_size, max_size)):
        offset = torch.arange(q, device=device)[:, None] - torch.arange(k, device=device)[None, :] + n - 1
        shape = [1] * 6
        shape[axis], shape[axis + 3] = q, k
        index = index * (2 * n - 1) + offset.view(shape)
    return index.reshape(math.prod(query_size), math.prod(key_size))


def relative_position_table_length(max_size: Sequence[int]) -> int:
    """Rows of the table that `relative_position_index` points into."""
    return math.prod(2 * n - 1 for n in max_size)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention. query (N, heads, Q, d), key and value (N, heads, K, d) -> (N, Q, heads, d)."""
    weights = torch.matmul(query * scaling, key.transpose(-2, -1))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


@dataclass(frozen=True)
class CuboidLayerConfig:
    """What all attention and feed-forward layers of a model have in common.

    Args:
        num_attention_heads: heads of every attention; they divide the channels.
        mask_padding: whether tokens added to fill the last cuboid are hidden from attention.
        separate_global_qkv: whether the exchange with global vectors has projections of its own.
        hidden_act: activation of the feed-forward layers, a name that `build_activation` knows.
        dropout, attention_dropout: probabilities, of outputs and of attention weights.
        layer_norm_eps: epsilon of the layer norms.
    """

    num_attention_heads: int
    mask_padding: bool = True
    separate_global_qkv: bool = True
    hidden_act: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5


def append_keys(
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    other_key: torch.Tensor,
    other_value: torch.Tensor,
    other_query: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """More keys for the same softmax.

    They meet the query of the other keys. With `other_query`, they meet that one instead: its scores become a part of
    the mask, and the appended keys are zero. So a fused kernel takes them, which allows one query.

    Args:
        key, value: (N, heads, K, d).
        mask: to be added to the scores, of a shape that broadcasts to (N, heads, Q, K).
        other_key, other_value: (N, heads, G, d).
        other_query: (N, heads, Q, d).
        scaling: of the scores of `other_query`.

    Returns:
        key and value (N, heads, K + G, d), mask (... , K + G).
    """
    more = other_key.shape[2]
    value = torch.cat([value, other_value], dim=2)
    if other_query is None:
        return torch.cat([key, other_key], dim=2), value, F.pad(mask, (0, more))
    scores = torch.matmul(other_query, scaling * other_key.transpose(-2, -1))  # (N, heads, Q, G)
    mask = torch.cat([mask.expand(*scores.shape[:3], -1), scores], dim=-1)
    return F.pad(key, (0, 0, 0, more)), value, mask


class CuboidAttentionBase(nn.Module):
    """What cuboid self-attention and cross-attention share: heads, position bias and the call of a kernel.

    A kernel takes (batch, heads, tokens, channels) and a mask that is added to the scores, (1, heads, ...). Cuboids
    that all have the same mask join the batch, (B * N, heads, ...). Where each of the N cuboids has a mask of its own,
    the cuboids *join the heads* instead, (B, N * heads, ...), so that one mask serves every sample. Where queries of
    their own meet the global vectors, the scores of these are in the mask, which then is another for every sample.
    """

    def __init__(self, config: CuboidLayerConfig, hidden_size: int, max_size: Sequence[int]):
        super().__init__()
        self.config = config
        self.max_size = tuple(max_size)
        self.num_heads = config.num_attention_heads
        self.scaling = (hidden_size // self.num_heads) ** -0.5
        self.norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        table_length = relative_position_table_length(self.max_size)
        self.relative_position_bias = nn.Parameter(torch.zeros(table_length, self.num_heads))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def split_heads(self, states: torch.Tensor, join_heads: bool = False) -> torch.Tensor:
        """(B, N, tokens, heads * d) -> (B * N, heads, tokens, d), or (B, N * heads, tokens, d) to join the heads."""
        states = states.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)  # (B, N, heads, tokens, d)
        return states.flatten(1, 2) if join_heads else states.flatten(0, 1)

    def merge_heads(self, states: torch.Tensor, cuboids: int, join_heads: bool = False) -> torch.Tensor:
        """What a kernel returns, (B * N, Q, heads, d) or (B, Q, N * heads, d) -> (B, N, Q, heads * d)."""
        if join_heads:
            return states.unflatten(2, (cuboids, -1)).transpose(1, 2).flatten(3)
        return states.flatten(2).unflatten(0, (-1, cuboids))

    def position_bias(
        self,
        query_size: Sequence[int],
        key_size: Sequence[int],
        query_regions: torch.Tensor | None = None,
        key_regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mask that is added to the scores: the position bias, and a large negative number between regions.

        Args:
            query_size, key_size: of the cuboids, along time, height and width.
            query_regions, key_regions: of `cuboid_regions`, (N, tokens); None where every token may see every other.

        Returns:
            (1, heads, tokens of a query cuboid, tokens of a key cuboid), or with regions (1, N * heads, ...).
        """
        table = self.relative_position_bias
        index = relative_position_index(query_size, key_size, self.max_size, table.device)
        bias = table[index].permute(2, 0, 1)[None].contiguous()  # fused kernels want its last axis dense
        if query_regions is None or key_regions is None:
            return bias
        visible = query_regions[:, None, :, None] == key_regions[:, None, None, :]
        return torch.where(visible, bias, MASKED).flatten(0, 1)[None]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        attn_implementation: str,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention, in several calls of the kernel where it would refuse one.

        Args:
            query, key, value: (B, H, Q, d), (B, H, K, d) and (B, H, K, d), as of `split_heads`.
            mask: added to the scores, (1, H, Q, K) or (B, H, Q, K).
            attn_implementation: a name in transformers' attention interface.

        Returns:
            (B, Q, H, d) and, from kernels that return them, the weights (windows, heads, Q, K).
        """
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(attn_implementation, eager_attention_forward)
        dropout = self.config.attention_dropout if self.training else 0.0
        axis = int(query.shape[1] > MAX_WINDOWS)
        parts = [(query, key, value, mask)]
        if not is_torchdynamo_exporting() and query.shape[axis] > MAX_WINDOWS:
            states = [x.split(MAX_WINDOWS, axis) for x in (query, key, value)]
            masks = itertools.repeat(mask) if mask.shape[axis] == 1 else mask.split(MAX_WINDOWS, axis)
            parts = list(zip(*states, masks))
        outputs, weights = zip(
            *(attention(self, *part, scaling=self.scaling, dropout=dropout, is_causal=False) for part in parts)
        )
        output = outputs[0] if len(parts) == 1 else torch.cat(outputs, 2 * axis)
        if weights[0] is None:
            return output, None
        weight = weights[0] if len(parts) == 1 else torch.cat(weights, axis)
        return output, weight.reshape(-1, self.num_heads, *weight.shape[2:])


class CuboidSelfAttention(CuboidAttentionBase):
    """Attention inside each cuboid, and, with global vectors, between tokens and global vectors.

    Equations 3 to 6 of the paper: every token attends to its cuboid and to all global vectors; every global vector
    attends to all tokens and to all global vectors. Queries, keys and values of the global exchange come either from
    the projections of the local attention (`config.separate_global_qkv` false) or from their own.

    Args:
        config: of all layers.
        hidden_size: channels of tokens and of global vectors.
        cuboid: how to cut the grid.
        use_global_vectors: whether there are global vectors.
        update_global_vectors: whether they read; false for the last attention before they are dropped.
    """

    def __init__(
        self,
        config: CuboidLayerConfig,
        hidden_size: int,
        cuboid: Cuboid,
        use_global_vectors: bool = False,
        update_global_vectors: bool = True,
    ):
        super().__init__(config, hidden_size, max_size=cuboid.size)
        self.cuboid = cuboid
        self.use_global_vectors = use_global_vectors
        self.update_global_vectors = use_global_vectors and update_global_vectors
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        if self.use_global_vectors:
            self.global_norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
            if config.separate_global_qkv:
                self.read_query = nn.Linear(hidden_size, hidden_size, bias=False)
                self.read_global_key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
            else:
                self.global_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        if self.update_global_vectors:
            self.global_out_proj = nn.Linear(hidden_size, hidden_size)
            if config.separate_global_qkv:
                self.update_global_query = nn.Linear(hidden_size, hidden_size, bias=False)
                self.update_key = nn.Linear(hidden_size, hidden_size, bias=False)
                self.update_value = nn.Linear(hidden_size, hidden_size, bias=False)
                self.update_global_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        global_vectors: torch.Tensor | None = None,
        attn_implementation: str = "sdpa",
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states (B, T, H, W, C), global_vectors (B, G, C) -> the same shapes, to be added to the inputs.

        Returns:
            New tokens (B, T, H, W, C); attention weights (B * number of cuboids, heads, tokens, tokens + G) or None;
            new global vectors (B, G, C) or None.
        """
        grid = hidden_states.shape[1:4]
        cuboid = self.cuboid.fit(grid)
        padding = padding_to(grid, cuboid.size)
        total = tuple(n + p for n, p in zip(grid, padding))

        windows = pad_grid(self.norm(hidden_states), padding)
        windows = cuboid_partition(roll_grid(windows, cuboid.shift, -1), cuboid)  # (B, N, V, C)
        windows = windows.contiguous()  # once, or every linear map does it
        regions = None
        if any(cuboid.shift) or (self.config.mask_padding and any(padding)):
            regions = cuboid_regions(grid, padding, cuboid, self.config.mask_padding, windows.device)
        windows, weights, global_vectors = self._attend_windows(
            windows, global_vectors, cuboid, regions, attn_implementation
        )
        hidden_states = roll_grid(cuboid_reverse(windows, cuboid, total), cuboid.shift, 1)
        return hidden_states[:, : grid[0], : grid[1], : grid[2]], weights, global_vectors

    def _attend_windows(self, windows, global_vectors, cuboid, regions, attn_implementation):
        """Windows (B, N, V, C), global vectors (B, G, C) or None -> new ones, and between them the weights."""
        cuboids, join_heads = windows.shape[1], regions is not None
        query, key, value = (self.split_heads(x, join_heads) for x in self.qkv(windows).chunk(3, dim=-1))
        mask = self.position_bias(cuboid.size, cuboid.size, regions, regions)

        new_global_vectors = None
        if self.use_global_vectors:
            if global_vectors is None:
                raise ValueError("CuboidSelfAttention was built with global vectors: `global_vectors` is missing.")
            global_vectors = self.global_norm(global_vectors)
            if self.update_global_vectors:
                new_global_vectors = self._update(windows, key, value, global_vectors, regions, attn_implementation)
            key, value, mask = self._add_global_keys(windows, key, value, mask, global_vectors, join_heads)

        output, weights = self.attend(query, key, value, mask, attn_implementation)
        output = self.out_proj(self.merge_heads(output, cuboids, join_heads))
        return self.dropout(output), weights, new_global_vectors

    def _add_global_keys(self, windows, key, value, mask, global_vectors, join_heads):
        """Tokens attend to their cuboid and to the global vectors: G more keys and values for every cuboid."""
        global_query = None
        if self.config.separate_global_qkv:
            global_query = self.split_heads(self.read_query(windows), join_heads)
            states = self.read_global_key_value(global_vectors).chunk(2, dim=-1)
        else:
            states = self.global_qkv(global_vectors).chunk(3, dim=-1)[1:]
        states = (x[:, None].expand(-1, windows.shape[1], -1, -1) for x in states)  # (B, N, G, C)
        global_key, global_value = (self.split_heads(x, join_heads) for x in states)
        return append_keys(key, value, mask, global_key, global_value, global_query, self.scaling)

    def _update(self, windows, key, value, global_vectors, regions, attn_implementation):
        """Global vectors attend to all tokens and to each other -> (B, G, C)."""
        if self.config.separate_global_qkv:
            tokens = windows.flatten(1, 2)  # (B, N * V, C)
            states = self.update_global_query(global_vectors), self.update_key(tokens), self.update_value(tokens)
            query, key, value = (self.split_heads(x[:, None]) for x in states)
            states = self.update_global_qkv(global_vectors).chunk(3, dim=-1)
            global_query, global_key, global_value = (self.split_heads(x[:, None]) for x in states)
        else:
            states = self.global_qkv(global_vectors).chunk(3, dim=-1)
            query, global_key, global_value = (self.split_heads(x[:, None]) for x in states)
            global_query = None
            # The cuboids' own keys and values: (B * N, heads, V, d) or (B, N * heads, V, d) -> (B, heads, N * V, d)
            shape = (windows.shape[0], -1, self.num_heads, *key.shape[2:])
            key, value = (x.reshape(shape).transpose(1, 2).flatten(2, 3) for x in (key, value))
        mask = query.new_zeros(1, 1, 1, key.shape[2])
        if regions is not None and self.config.mask_padding:
            mask = mask.masked_fill(regions.flatten() < 0, MASKED)
        key, value, mask = append_keys(key, value, mask, global_key, global_value, global_query, self.scaling)
        mask = mask.expand(-1, -1, query.shape[2], -1)
        output, _ = self.attend(query, key, value, mask, attn_implementation)
        return self.dropout(self.global_out_proj(output.flatten(2)))


class CuboidCrossAttention(CuboidAttentionBase):
    """Forecast tokens attend to the context tokens of the same place (paper, section 3.2).

    Along time, context is padded at its start and the forecast at its end, so that the last context frames and the
    first forecast frames stay in line. Relative time is counted from the start of either (the originals' rule).

    Args:
        config: of all layers.
        hidden_size: channels of tokens.
        cuboid: how to cut forecast and context.
        max_time: frames of context and forecast together: the largest distance in time that has a position bias.
    """

    def __init__(self, config: CuboidLayerConfig, hidden_size: int, cuboid: CrossCuboid, max_time: int):
        super().__init__(config, hidden_size, max_size=(max_time, *cuboid.size))
        self.cuboid = cuboid
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, attn_implementation: str = "sdpa"
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, T_out, H, W, C), context (B, T_in, H, W, C) -> (B, T_out, H, W, C), to be added.

        Returns:
            New tokens; attention weights (B * number of cuboids, heads, query tokens, context tokens) or None.
        """
        grid, context_grid = hidden_states.shape[1:4], context.shape[1:4]
        cuboid, context_cuboid = self.cuboid.along(grid[0]), self.cuboid.along(context_grid[0])
        padding, context_padding = self.cuboid.padding(grid), self.cuboid.padding(context_grid)
        total = tuple(n + p for n, p in zip(grid, padding))
        shift = cuboid.shift

        hidden_states = roll_grid(pad_grid(self.norm(hidden_states), padding), shift, -1)
        windows = cuboid_partition(hidden_states, cuboid)  # (B, N, V, C)
        context = roll_grid(pad_grid(context, context_padding, time_first=True), shift, -1)
        context = cuboid_partition(context, context_cuboid)  # (B, N, V_context, C)

        mask_padding, device = self.config.mask_padding, windows.device
        regions = context_regions = None
        if any(shift) or (mask_padding and any(padding + context_padding)):
            regions = cuboid_regions(grid, padding, cuboid, mask_padding, device)
            context_regions = cuboid_regions(
                context_grid, context_padding, context_cuboid, mask_padding, device, time_first=True
            )
        join_heads = regions is not None
        query = self.split_heads(self.query(windows), join_heads)
        key, value = (self.split_heads(x, join_heads) for x in self.key_value(context).chunk(2, dim=-1))
        mask = self.position_bias(cuboid.size, context_cuboid.size, regions, context_regions)
        output, weights = self.attend(query, key, value, mask, attn_implementation)
        windows = self.dropout(self.out_proj(self.merge_heads(output, windows.shape[1], join_heads)))
        hidden_states = roll_grid(cuboid_reverse(windows, cuboid, total), shift, 1)
        return hidden_states[:, : grid[0], : grid[1], : grid[2]], weights


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def build_activation(name: str) -> nn.Module:
    """The activation of that name in transformers; "leaky_relu" with the originals' slope.

    Raises:
        KeyError: transformers has no activation of that name.
    """
    return nn.LeakyReLU(LEAKY_SLOPE) if name == "leaky_relu" else ACT2FN[name]


class FeedForward(nn.Module):
    """x + linear(activation(linear(norm(x)))), four times as wide inside."""

    def __init__(self, config: CuboidLayerConfig, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.activation = build_activation(config.hidden_act)
        self.down = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Any shape (..., hidden_size), unchanged."""
        inner = self.dropout(self.activation(self.up(self.norm(hidden_states))))
        return hidden_states + self.dropout(self.down(inner))


class CuboidSelfAttentionBlock(GradientCheckpointingLayer):
    """One attention and one feed-forward layer for each cuboid of a pattern (paper, figure 2).

    Args:
        config: of all layers.
        hidden_size: channels of tokens and of global vectors.
        cuboids: of the pattern.
        use_global_vectors: whether there are global vectors.
        update_last: whether the last attention updates them; false for the last block before they are dropped.
    """

    def __init__(
        self,
        config: CuboidLayerConfig,
        hidden_size: int,
        cuboids: Sequence[Cuboid],
        use_global_vectors: bool = False,
        update_last: bool = True,
    ):
        super().__init__()
        last = len(cuboids) - 1
        self.attentions = nn.ModuleList(
            CuboidSelfAttention(config, hidden_size, cuboid, use_global_vectors, update_last or i < last)
            for i, cuboid in enumerate(cuboids)
        )
        self.feed_forwards = nn.ModuleList(FeedForward(config, hidden_size) for _ in cuboids)

    def forward(
        self,
        hidden_states: torch.Tensor,
        global_vectors: torch.Tensor | None = None,
        attn_implementation: str = "sdpa",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, T, H, W, C) and global_vectors (B, G, C) or None -> the same shapes."""
        for attention, feed_forward in zip(self.attentions, self.feed_forwards):
            update, _, global_update = attention(hidden_states, global_vectors, attn_implementation)
            hidden_states = feed_forward(hidden_states + update)
            if global_vectors is not None and global_update is not None:
                global_vectors = global_vectors + global_update
        return hidden_states, global_vectors


class CuboidCrossAttentionBlock(GradientCheckpointingLayer):
    """One cross-attention and one feed-forward layer for each cuboid of a pattern."""

    def __init__(self, config: CuboidLayerConfig, hidden_size: int, cuboids: Sequence[CrossCuboid], max_time: int):
        super().__init__()
        self.attentions = nn.ModuleList(
            CuboidCrossAttention(config, hidden_size, cuboid, max_time) for cuboid in cuboids
        )
        self.feed_forwards = nn.ModuleList(FeedForward(config, hidden_size) for _ in cuboids)

    def forward(
        self, hidden_states: torch.Tensor, context: torch.Tensor, attn_implementation: str = "sdpa"
    ) -> torch.Tensor:
        """hidden_states (B, T_out, H, W, C), context (B, T_in, H, W, C) -> (B, T_out, H, W, C)."""
        for attention, feed_forward in zip(self.attentions, self.feed_forwards):
            update, _ = attention(hidden_states, context, attn_implementation)
            hidden_states = feed_forward(hidden_states + update)
        return hidden_states


# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


class PositionEmbedding(nn.Module):
    """Learned embeddings of time and place, to be added to the tokens.

    Args:
        time, size, hidden_size: frames, height and width, channels.
        embedding_type: "t+h+w", one embedding per axis, or "t+hw", one per time and one per place.
    """

    def __init__(self, time: int, size: Sequence[int], hidden_size: int, embedding_type: str = "t+h+w"):
        super().__init__()
        self.size = tuple(size)
        self.time = nn.Embedding(time, hidden_size)
        self.per_axis = embedding_type == "t+h+w"
        if self.per_axis:
            self.height = nn.Embedding(size[0], hidden_size)
            self.width = nn.Embedding(size[1], hidden_size)
        else:
            self.place = nn.Embedding(size[0] * size[1], hidden_size)

    def forward(self, device: torch.device) -> torch.Tensor:
        """-> (T, H, W, C)."""
        height, width = self.size
        time = self.time(torch.arange(self.time.num_embeddings, device=device))[:, None, None]
        if self.per_axis:
            rows = self.height(torch.arange(height, device=device))[:, None]
            return time + rows + self.width(torch.arange(width, device=device))
        return time + self.place(torch.arange(height * width, device=device)).unflatten(0, self.size)


# ---------------------------------------------------------------------------------------------------------------------
# Changing resolution
# ---------------------------------------------------------------------------------------------------------------------


def reduced_size(size: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """Height and width after patch merging: divided, rounded up."""
    return -(-size[0] // stride[0]), -(-size[1] // stride[1])


class PatchMerging(nn.Module):
    """Merge patches of stride (height, width) into one token; a grid it does not divide is padded with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: Sequence[int], eps: float):
        super().__init__()
        self.stride = tuple(stride)
        self.norm = nn.LayerNorm(in_channels * stride[0] * stride[1], eps=eps)
        self.reduction = nn.Linear(in_channels * stride[0] * stride[1], out_channels, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C_in) -> (B, T, ceil(H / stride), ceil(W / stride), C_out)."""
        high, wide = self.stride
        hidden_states = pad_grid(hidden_states, (0, *padding_to(hidden_states.shape[2:4], self.stride)))
        batch, time, height, width, channels = hidden_states.shape
        hidden_states = hidden_states.reshape(batch, time, height // high, high, width // wide, wide, channels)
        hidden_states = hidden_states.transpose(3, 4).flatten(-3)  # (B, T, H / high, W / wide, high * wide * C)
        return self.reduction(self.norm(hidden_states))


def in_half_precision(states: torch.Tensor) -> bool:
    """Whether a convolution computes these states in half precision."""
    device = states.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return autocast or states.dtype in (torch.bfloat16, torch.float16)


def as_frames(hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, T, H, W, C) -> (B * T, C, H, W), for upsampling.

    Channels stay last in memory. Not so in half precision on a CPU, which takes four times as long for transposed
    convolutions of them if it has no instructions for bfloat16.
    """
    frames = hidden_states.flatten(0, 1).permute(0, 3, 1, 2)
    return frames.contiguous() if frames.is_cpu and in_half_precision(frames) else frames


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given height and width, then a 3x3 convolution in each frame."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """(B, T, H, W, C_in) -> (B, T, *size, C_out)."""
        frames = upsample_conv(as_frames(hidden_states), size, self.conv)
        return frames.permute(0, 2, 3, 1).unflatten(0, hidden_states.shape[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation
# ---------------------------------------------------------------------------------------------------------------------


class SafeGroupNorm(nn.GroupNorm):
    """Group norm whose backward does not crash on the CPU.

    PyTorch 2.13 ends in a segmentation fault where the input has channels last and needs no gradient, as frames do,
    and tokens behind frozen layers:

        norm = torch.nn.GroupNorm(2, 4)
        frames = torch.randn(2, 8, 8, 4).permute(0, 3, 1, 2)  # (N, C, H, W), needs no gradient
        norm(frames).sum().backward()
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and not input.requires_grad:
            # Not `contiguous`, which leaves the strides of axes of length 1 as they are.
            input = input.clone(memory_format=torch.contiguous_format)
        return super().forward(input)


__all__ = [
    "CROSS_ATTENTION_PATTERNS",
    "LEAKY_SLOPE",
    "MAX_LAYERS",
    "MAX_LEVELS",
    "MAX_SIZE",
    "SELF_ATTENTION_PATTERNS",
    "CrossCuboid",
    "Cuboid",
    "CuboidAttentionBase",
    "CuboidCrossAttention",
    "CuboidCrossAttentionBlock",
    "CuboidLayerConfig",
    "CuboidSelfAttention",
    "CuboidSelfAttentionBlock",
    "FeedForward",
    "PatchMerging",
    "PositionEmbedding",
    "SafeGroupNorm",
    "Upsample",
    "as_frames",
    "build_activation",
    "check_layers",
    "cuboid_partition",
    "cuboid_regions",
    "cuboid_reverse",
    "in_half_precision",
    "pattern_cuboids",
    "reduced_size",
]
