"""Cuboid attention: the layers that Earthformer and PreDiff are built from.

A tensor of shape (batch, time, height, width, channels) is cut into cuboids of equal size; attention runs inside each
cuboid, in parallel. A cuboid gathers neighbours ("local") or a regular lattice ("dilated") along each axis, and may be
shifted. A few *global vectors* read from every token and are read by every token, and so carry news between cuboids.

Source: Gao et al., "Earthformer: Exploring Space-Time Transformers for Earth System Forecasting", NeurIPS 2022,
https://arxiv.org/abs/2207.05833, section 3 (equations 1 to 6). Nothing here knows which model it serves.
"""

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


LEAKY_SLOPE = 0.1  # of every leaky ReLU in the originals
MASKED = -3e4  # added to the score of a pair that must not meet: finite in half precision, nothing after a softmax

# Fused attention kernels on GPUs refuse more windows in one call (pytorch issues 142228 and 146704). An exported
# program does not split them, since that would bound its batch.
MAX_WINDOWS = 65_535


# ---------------------------------------------------------------------------------------------------------------------
# Cuboids and the published patterns of cuboids
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cuboid:
    """How one attention layer cuts (time, height, width) into cuboids.

    Args:
        size: tokens of a cuboid along time, height and width. In cross-attention the first number is instead the
            *number* of cuboids along time, since context and forecast differ in length.
        strategy: per axis "local" (neighbours) or "dilated" (every n-th token).
        shift: tokens by which the grid is rolled before it is cut, as in Swin Transformer. Ignored on dilated axes
            and, in self-attention, on axes that one cuboid covers.

    Raises:
        ValueError: a size below one, an unknown strategy, or a shift outside [0, size).
    """

    size: tuple[int, ...]
    strategy: tuple[str, ...] = ("local", "local", "local")
    shift: tuple[int, ...] = (0, 0, 0)

    def __post_init__(self):
        for name in ("size", "strategy", "shift"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or len(value) != 3:
                raise ValueError(f"Cuboid: `{name}` needs three entries (time, height, width), got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if not all(isinstance(n, int) and n >= 1 for n in self.size):
            raise ValueError(f"Cuboid: `size` must be positive integers, got {self.size}.")
        if not set(self.strategy) <= {"local", "dilated"}:
            raise ValueError(f"Cuboid: `strategy` must be 'local' or 'dilated' on each axis, got {self.strategy}.")
        if not all(isinstance(n, int) and n >= 0 for n in self.shift):
            raise ValueError(f"Cuboid: `shift` must be integers of at least 0, got {self.shift}.")
        if any(shift >= size for shift, size in zip(self.shift[1:], self.size[1:])):
            raise ValueError(f"Cuboid: `shift` must be smaller than `size`, got {self.shift} for {self.size}.")

    @property
    def volume(self) -> int:
        return math.prod(self.size)

    def fit(self, grid: Sequence[int]) -> "Cuboid":
        """This cuboid on a grid (T, H, W): never larger than the grid, and unshifted where a shift means nothing."""
        size = tuple(min(s, n) for s, n in zip(self.size, grid))
        shift = tuple(
            0 if kind == "dilated" or n <= s else d
            for d, s, n, kind in zip(self.shift, self.size, grid, self.strategy)
        )
        return Cuboid(size, self.strategy, shift)


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
    return [Cuboid((1, k, k))]


def _cross_local_global(t, h, w, k):
    k = min(k, h, w)
    return [Cuboid((1, k, k)), Cuboid((1, k, k), DILATED)]


def _cross_heterogeneous(t, h, w, k):
    k = min(k, h, w)
    return [Cuboid((1, k, k)), Cuboid((1, k, k), DILATED), Cuboid((1, k, k), shift=(0, k // 2, k // 2))]


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


def pattern_cuboids(name: str, grid: Sequence[int], patterns: dict[str, Callable]) -> list[Cuboid]:
    """The cuboids of a named pattern (Earthformer, table 1 and appendix) on a grid (T, H, W).

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
) -> torch.Tensor | None:
    """Which tokens of a cuboid may see each other: those of equal region.

    A shifted grid wraps around, so that a cuboid at its end holds tokens from both ends of an axis; they are kept
    apart. With `mask_padding`, added tokens form a region of their own.

    Returns:
        An integer tensor (number of cuboids, tokens of a cuboid), or None when every token may see every other. It is
        computed where it is used, from a few small `arange`s: nothing is cached, so that nothing created in inference
        mode can later reach a training step.
    """
    mask_padding = mask_padding and any(padding)
    if not mask_padding and not any(cuboid.shift):
        return None
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
    if mask_padding:
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
    """Plain attention. query (N, heads, Q, d), key (N, heads, K, d), value (N, heads, K, e) -> (N, Q, heads, e)."""
    weights = torch.matmul(query * scaling, key.transpose(-2, -1))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def leaky_or(name: str) -> nn.Module:
    """The activation of that name in transformers; "leaky_relu" with the originals' slope."""
    return nn.LeakyReLU(LEAKY_SLOPE) if name == "leaky_relu" else ACT2FN[name]


class CuboidAttentionBase(nn.Module):
    """What cuboid self-attention and cross-attention share: heads, the choice of kernel and the position bias.

    `config` needs `num_attention_heads`, `attention_dropout`, `dropout`, `layer_norm_eps`, `mask_padding` and
    `_attn_implementation`, a name in transformers' attention interface.
    """

    def __init__(self, config, hidden_size: int, cuboid: Cuboid, max_size: Sequence[int]):
        super().__init__()
        self.config = config
        self.cuboid = cuboid
        self.max_size = tuple(max_size)
        self.num_heads = config.num_attention_heads
        self.scaling = (hidden_size // self.num_heads) ** -0.5
        self.is_causal = False
        self.norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        table_length = relative_position_table_length(self.max_size)
        self.relative_position_bias = nn.Parameter(torch.zeros(table_length, self.num_heads))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(..., tokens, hidden) -> (product of the leading axes, heads, tokens, hidden / heads)."""
        tokens = states.shape[-2]
        return states.reshape(-1, tokens, self.num_heads, states.shape[-1] // self.num_heads).transpose(1, 2)

    def position_bias(
        self,
        query_size: Sequence[int],
        key_size: Sequence[int],
        query_regions: torch.Tensor | None = None,
        key_regions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The additive mask of the scores: position bias, and a large negative number between regions.

        Returns:
            (1 or number of cuboids, heads, tokens of a query cuboid, tokens of a key cuboid).
        """
        table = self.relative_position_bias
        index = relative_position_index(query_size, key_size, self.max_size, table.device)
        bias = table[index].permute(2, 0, 1)[None].contiguous()  # fused kernels want its last axis dense
        if query_regions is None or key_regions is None:
            return bias
        visible = query_regions[:, None, :, None] == key_regions[:, None, None, :]
        return torch.where(visible, bias, MASKED)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of N windows, a bounded number of them per call.

        query (N, heads, Q, d), key (N, heads, K, d), value (N, heads, K, e), mask (1 or a divisor of N, heads, Q, K)
        -> (N, Q, heads * e) and, from kernels that return them, the weights (N, heads, Q, K).
        """
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        windows = query.shape[0]
        if mask is not None and mask.shape[0] > 1:
            mask = mask.repeat(windows // mask.shape[0], 1, 1, 1)
        parts = [slice(None)]
        if not is_torchdynamo_exporting() and windows > MAX_WINDOWS:
            parts = [slice(start, start + MAX_WINDOWS) for start in range(0, windows, MAX_WINDOWS)]
        outputs, weights = [], []
        for part in parts:
            output, weight = attention(
                self,
                query[part],
                key[part],
                value[part],
                mask if mask is None or mask.shape[0] == 1 else mask[part],
                scaling=self.scaling,
                dropout=self.config.attention_dropout if self.training else 0.0,
                is_causal=False,
            )
            outputs.append(output.flatten(2))
            weights.append(weight)
        if len(outputs) == 1:
            return outputs[0], weights[0]
        return torch.cat(outputs), None if weights[0] is None else torch.cat(weights)


class CuboidSelfAttention(CuboidAttentionBase):
    """Attention inside each cuboid, and, with global vectors, between tokens and global vectors.

    Equations 3 to 6 of the paper: every token attends to its cuboid and to all global vectors; every global vector
    attends to all tokens and to all global vectors. Queries, keys and values of the global exchange come either from
    the projections of the local attention (`config.separate_global_qkv` false) or from their own.

    Args:
        config: as `CuboidAttentionBase`, and `separate_global_qkv` where global vectors are used.
        hidden_size: channels of tokens and of global vectors.
        cuboid: how to cut the grid.
        use_global_vectors: whether there are global vectors.
        update_global_vectors: whether they read; false for the last attention before they are dropped.
    """

    def __init__(
        self,
        config,
        hidden_size: int,
        cuboid: Cuboid,
        use_global_vectors: bool = False,
        update_global_vectors: bool = True,
    ):
        super().__init__(config, hidden_size, cuboid, max_size=cuboid.size)
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
        self, hidden_states: torch.Tensor, global_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states (B, T, H, W, C), global_vectors (B, G, C) -> the same shapes, to be added to the inputs.

        Returns:
            New tokens (B, T, H, W, C); attention weights (B * number of cuboids, heads, tokens, tokens + G) or None;
            new global vectors (B, G, C) or None.
        """
        batch, *grid, channels = hidden_states.shape
        cuboid = self.cuboid.fit(grid)
        padding = padding_to(grid, cuboid.size)
        total = tuple(n + p for n, p in zip(grid, padding))

        hidden_states = pad_grid(self.norm(hidden_states), padding)
        windows = cuboid_partition(roll_grid(hidden_states, cuboid.shift, -1), cuboid)  # (B, N, V, C)
        regions = cuboid_regions(grid, padding, cuboid, self.config.mask_padding, windows.device)
        query, key, value = (self.split_heads(x) for x in self.qkv(windows).chunk(3, dim=-1))  # (B * N, heads, V, d)
        mask = self.position_bias(cuboid.size, cuboid.size, regions, regions)

        new_global_vectors = None
        if self.use_global_vectors:
            if global_vectors is None:
                raise ValueError("CuboidSelfAttention was built with global vectors: `global_vectors` is missing.")
            global_vectors = self.global_norm(global_vectors)
            if self.update_global_vectors:
                new_global_vectors = self._update(windows, query, key, value, global_vectors, regions)
            query, key, value, mask = self._add_global_keys(windows, query, key, value, mask, global_vectors)

        windows, weights = self.attend(query, key, value, mask)
        windows = self.dropout(self.out_proj(windows)).reshape(batch, -1, cuboid.volume, channels)
        hidden_states = roll_grid(cuboid_reverse(windows, cuboid, total), cuboid.shift, 1)
        hidden_states = hidden_states[:, : grid[0], : grid[1], : grid[2]]
        return hidden_states, weights, new_global_vectors

    def _add_global_keys(self, windows, query, key, value, mask, global_vectors):
        """Let every cuboid also attend to the global vectors: G more keys and values."""
        number = windows.shape[1]
        if self.config.separate_global_qkv:
            global_key, global_value = self.read_global_key_value(global_vectors).chunk(2, dim=-1)
            # Two kinds of queries meet two kinds of keys in one softmax: side by side, each padded with zeros.
            query = torch.cat([query, self.split_heads(self.read_query(windows))], dim=-1)
            key = F.pad(key, (0, key.shape[-1]))
        else:
            _, global_key, global_value = self.global_qkv(global_vectors).chunk(3, dim=-1)
        global_key, global_value = (
            self.split_heads(x).repeat_interleave(number, dim=0) for x in (global_key, global_value)
        )  # (B * N, heads, G, d)
        if self.config.separate_global_qkv:
            global_key = F.pad(global_key, (global_key.shape[-1], 0))
        key = torch.cat([key, global_key], dim=2)
        value = torch.cat([value, global_value], dim=2)
        return query, key, value, F.pad(mask, (0, global_vectors.shape[1]))

    def _update(self, windows, query, key, value, global_vectors, regions):
        """Global vectors attend to all tokens and to each other -> (B, G, C)."""
        batch, _, _, channels = windows.shape
        if self.config.separate_global_qkv:
            tokens = windows.reshape(batch, -1, channels)
            key, value = self.split_heads(self.update_key(tokens)), self.split_heads(self.update_value(tokens))
            global_query, global_key, global_value = (
                self.split_heads(x) for x in self.update_global_qkv(global_vectors).chunk(3, dim=-1)
            )
            query = torch.cat([self.split_heads(self.update_global_query(global_vectors)), global_query], dim=-1)
            key, global_key = F.pad(key, (0, key.shape[-1])), F.pad(global_key, (global_key.shape[-1], 0))
        else:
            query, global_key, global_value = (
                self.split_heads(x) for x in self.global_qkv(global_vectors).chunk(3, dim=-1)
            )
            # The cuboids' own keys and values: (B * N, heads, V, d) -> (B, heads, N * V, d)
            key, value = (x.reshape(batch, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3) for x in (key, value))
        key, value = torch.cat([key, global_key], dim=2), torch.cat([value, global_value], dim=2)
        mask = None
        if regions is not None and self.config.mask_padding:
            mask = torch.zeros(regions.numel(), dtype=query.dtype, device=query.device)
            mask = mask.masked_fill(regions.flatten() < 0, MASKED)
            mask = F.pad(mask, (0, global_vectors.shape[1])).view(1, 1, 1, -1).expand(-1, -1, query.shape[2], -1)
        new_global_vectors, _ = self.attend(query, key, value, mask)
        return self.dropout(self.global_out_proj(new_global_vectors))


class CuboidCrossAttention(CuboidAttentionBase):
    """Forecast tokens attend to the context tokens of the same place (paper, section 3.2).

    `cuboid.size` is (number of cuboids along time, height, width). Along time, context is padded at its start and the
    forecast at its end, so that the last context frames and the first forecast frames stay in line. Relative time is
    counted from the start of either (the originals' rule).
    """

    def __init__(self, config, hidden_size: int, cuboid: Cuboid, max_time: int):
        super().__init__(config, hidden_size, cuboid, max_size=(max_time, *cuboid.size[1:]))
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, T_out, H, W, C), context (B, T_in, H, W, C) -> (B, T_out, H, W, C), to be added.

        Returns:
            New tokens; attention weights (B * number of cuboids, heads, query tokens, context tokens) or None.
        """
        batch, *grid, channels = hidden_states.shape
        query_cuboid, query_padding = self._cuboid_along(hidden_states.shape[1], grid)
        key_cuboid, key_padding = self._cuboid_along(context.shape[1], grid)
        shift = query_cuboid.shift
        total = tuple(n + p for n, p in zip(grid, query_padding))

        hidden_states = roll_grid(pad_grid(self.norm(hidden_states), query_padding), shift, -1)
        windows = cuboid_partition(hidden_states, query_cuboid)  # (B, N, V, C)
        context_grid = context.shape[1:4]
        context = roll_grid(pad_grid(context, key_padding, time_first=True), shift, -1)
        context = cuboid_partition(context, key_cuboid)  # (B, N, V_context, C)

        mask_padding, device = self.config.mask_padding, windows.device
        # One side may be padded when the other is not: ask for both, or for none.
        both = mask_padding and (any(query_padding) or any(key_padding))
        query_regions = key_regions = None
        if both or any(shift):
            query_regions = cuboid_regions(grid, query_padding, query_cuboid, mask_padding, device)
            key_regions = cuboid_regions(context_grid, key_padding, key_cuboid, mask_padding, device, time_first=True)
            query_regions = self._or_zeros(query_regions, windows)
            key_regions = self._or_zeros(key_regions, context)

        query = self.split_heads(self.query(windows))
        key, value = (self.split_heads(x) for x in self.key_value(context).chunk(2, dim=-1))
        mask = self.position_bias(query_cuboid.size, key_cuboid.size, query_regions, key_regions)
        windows, weights = self.attend(query, key, value, mask)
        windows = self.dropout(self.out_proj(windows)).reshape(batch, -1, query_cuboid.volume, channels)
        hidden_states = roll_grid(cuboid_reverse(windows, query_cuboid, total), shift, 1)
        return hidden_states[:, : grid[0], : grid[1], : grid[2]], weights

    def _cuboid_along(self, time: int, grid: Sequence[int]) -> tuple[Cuboid, tuple[int, ...]]:
        """The cuboid, in tokens, for a sequence of `time` frames, and the padding it needs."""
        number, height, width = self.cuboid.size
        shift = tuple(0 if kind == "dilated" else n for n, kind in zip(self.cuboid.shift, self.cuboid.strategy))
        cuboid = Cuboid((-(-time // number), height, width), self.cuboid.strategy, (0, *shift[1:]))
        padding = (cuboid.size[0] * number - time, *padding_to(grid[1:], cuboid.size[1:]))
        return cuboid, padding

    @staticmethod
    def _or_zeros(regions: torch.Tensor | None, windows: torch.Tensor) -> torch.Tensor:
        if regions is not None:
            return regions
        return torch.zeros(windows.shape[1:3], dtype=torch.long, device=windows.device)


class PositionEmbedding(nn.Module):
    """Learned embeddings of time and place, to be added to the tokens.

    Args:
        time, size, hidden_size: frames, height and width, channels.
        kind: "t+h+w", one embedding per axis, or "t+hw", one per time and one per place.
    """

    def __init__(self, time: int, size: Sequence[int], hidden_size: int, kind: str = "t+h+w"):
        super().__init__()
        self.size = tuple(size)
        self.time = nn.Embedding(time, hidden_size)
        self.per_axis = kind == "t+h+w"
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
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """x + linear(activation(linear(norm(x)))), four times as wide inside."""

    def __init__(self, config, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.activation = leaky_or(config.hidden_act)
        self.down = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Any shape (..., hidden_size), unchanged."""
        inner = self.dropout(self.activation(self.up(self.norm(hidden_states))))
        return hidden_states + self.dropout(self.down(inner))


class CuboidSelfAttentionBlock(GradientCheckpointingLayer):
    """One attention and one feed-forward layer for each cuboid of a pattern (paper, figure 2)."""

    def __init__(
        self,
        config,
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
        self, hidden_states: torch.Tensor, global_vectors: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, T, H, W, C) and global_vectors (B, G, C) or None -> the same shapes."""
        for attention, feed_forward in zip(self.attentions, self.feed_forwards):
            update, _, global_update = attention(hidden_states, global_vectors)
            hidden_states = feed_forward(hidden_states + update)
            if global_vectors is not None and global_update is not None:
                global_vectors = global_vectors + global_update
        return hidden_states, global_vectors


class CuboidCrossAttentionBlock(GradientCheckpointingLayer):
    """One cross-attention and one feed-forward layer for each cuboid of a pattern."""

    def __init__(self, config, hidden_size: int, cuboids: Sequence[Cuboid], max_time: int):
        super().__init__()
        self.attentions = nn.ModuleList(
            CuboidCrossAttention(config, hidden_size, cuboid, max_time) for cuboid in cuboids
        )
        self.feed_forwards = nn.ModuleList(FeedForward(config, hidden_size) for _ in cuboids)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """hidden_states (B, T_out, H, W, C), context (B, T_in, H, W, C) -> (B, T_out, H, W, C)."""
        for attention, feed_forward in zip(self.attentions, self.feed_forwards):
            update, _ = attention(hidden_states, context)
            hidden_states = feed_forward(hidden_states + update)
        return hidden_states


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


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given height and width, then a 3x3 convolution in each frame."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """(B, T, H, W, C_in) -> (B, T, *size, C_out)."""
        frames = hidden_states.flatten(0, 1).permute(0, 3, 1, 2)  # (B * T, C, H, W)
        frames = self.conv(F.interpolate(frames, size=tuple(size), mode="nearest"))
        return frames.permute(0, 2, 3, 1).unflatten(0, hidden_states.shape[:2])
