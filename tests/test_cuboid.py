"""Cuboids, windows and attention, against their inverses and against plain loops."""

import itertools

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from earthformer_hf import cuboid as cuboid_module
from earthformer_hf.cuboid import (
    CROSS_ATTENTION_PATTERNS,
    SELF_ATTENTION_PATTERNS,
    CrossCuboid,
    Cuboid,
    CuboidCrossAttention,
    CuboidLayerConfig,
    CuboidSelfAttention,
    PatchMerging,
    append_keys,
    cuboid_partition,
    cuboid_regions,
    cuboid_reverse,
    eager_attention_forward,
    pattern_cuboids,
)


L, D = "local", "dilated"


def layer_config(**changes):
    return CuboidLayerConfig(**({"num_attention_heads": 2} | changes))


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4)
    return module.eval()


# -- cutting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", list(itertools.product([L, D], repeat=3)))
def test_reverse_undoes_partition(strategy):
    values = torch.randn(2, 4, 6, 9, 5)
    cuboid = Cuboid((2, 3, 3), strategy)
    windows = cuboid_partition(values, cuboid)
    assert windows.shape == (2, 2 * 2 * 3, 18, 5)
    assert torch.equal(cuboid_reverse(windows, cuboid, (4, 6, 9)), values)


def test_partition_gathers_neighbours_or_a_lattice():
    line = torch.arange(6).view(1, 1, 1, 6, 1)
    local = cuboid_partition(line, Cuboid((1, 1, 2)))[0, :, :, 0]
    dilated = cuboid_partition(line, Cuboid((1, 1, 2), (L, L, D)))[0, :, :, 0]
    assert local.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert dilated.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_patterns_of_the_paper():
    grid = (13, 32, 16)
    found = {name: pattern_cuboids(name, grid, SELF_ATTENTION_PATTERNS) for name in ("axial", "full", "divided_st")}
    assert [cuboid.size for cuboid in found["axial"]] == [(13, 1, 1), (1, 32, 1), (1, 1, 16)]
    assert [cuboid.size for cuboid in found["divided_st"]] == [(13, 1, 1), (1, 32, 16)]
    assert [cuboid.size for cuboid in found["full"]] == [grid]
    plain, shifted = pattern_cuboids("video_swin_2x8", grid, SELF_ATTENTION_PATTERNS)
    assert (plain.size, plain.shift, shifted.shift) == ((2, 8, 8), (0, 0, 0), (1, 4, 4))
    assert [c.strategy[0] for c in pattern_cuboids("spatial_lg_4", grid, SELF_ATTENTION_PATTERNS)] == [L, L, D]
    small = pattern_cuboids("spatial_lg_4", (13, 4, 4), SELF_ATTENTION_PATTERNS)
    assert [cuboid.size for cuboid in small] == [(13, 1, 1), (1, 4, 4)]
    sizes = [c.size for c in pattern_cuboids("axial_space_dilate_4", grid, SELF_ATTENTION_PATTERNS)]
    assert sizes == [(13, 1, 1), (1, 8, 1), (1, 8, 1), (1, 1, 4), (1, 1, 4)]
    heterogeneous = pattern_cuboids("cross_4x4_heter", grid, CROSS_ATTENTION_PATTERNS)
    assert [(c.strategy[1], c.shift) for c in heterogeneous] == [(L, (0, 0)), (D, (0, 0)), (L, (2, 2))]
    local_global = pattern_cuboids("cross_2x2_lg", grid, CROSS_ATTENTION_PATTERNS)
    assert [(c.size, c.cuboids_along_time) for c in local_global] == [((2, 2), 1)] * 2


@pytest.mark.parametrize("name", ["axiel", "video_swin", "video_swin_0x4", "spatial_lg", "spatial_lg_#", "cross_1x1"])
def test_unknown_patterns_are_refused(name):
    with pytest.raises(ValueError, match="Unknown attention pattern"):
        pattern_cuboids(name, (4, 4, 4), SELF_ATTENTION_PATTERNS)


def test_cross_patterns_are_square():
    with pytest.raises(ValueError, match="square"):
        pattern_cuboids("cross_2x4", (4, 4, 4), CROSS_ATTENTION_PATTERNS)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"size": (0, 1, 1)}, "size"),
        ({"size": (1, 1)}, "size"),
        ({"size": 4}, "size"),
        ({"size": (1, 1, 1), "strategy": (L, L, "far")}, "strategy"),
        ({"size": (2, 2, 2), "shift": (0, 2, 0)}, "shift"),
        ({"size": (2, 2, 2), "shift": (-1, 0, 0)}, "shift"),
        ({"size": (2, 2, 2), "shift": (2, 0, 0)}, "shift"),
    ],
)
def test_impossible_cuboids_are_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        Cuboid(**arguments)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"size": (1, 2, 2)}, "size"),
        ({"size": (2, 2), "shift": (0, 2)}, "shift"),
        ({"size": (2, 2), "strategy": (L, L)}, "strategy"),
        ({"size": (2, 2), "cuboids_along_time": 0}, "cuboids_along_time"),
        ({"size": (2, 2), "cuboids_along_time": 1.5}, "cuboids_along_time"),
    ],
)
def test_impossible_cross_cuboids_are_refused(arguments, expected):
    with pytest.raises(ValueError, match=f"CrossCuboid.*{expected}"):
        CrossCuboid(**arguments)


@pytest.mark.parametrize("time, tokens, padding", [(5, 2, 3), (8, 2, 0), (3, 1, 1), (9, 3, 3)])
def test_cross_cuboids_have_the_same_number_along_any_time(time, tokens, padding):
    cuboid = CrossCuboid((2, 3), (L, D, L), shift=(1, 2), cuboids_along_time=4)
    assert cuboid.along(time) == Cuboid((tokens, 2, 3), (L, D, L), shift=(0, 0, 2))
    assert cuboid.padding((time, 5, 3)) == (padding, 1, 0)
    values = torch.zeros(1, time + padding, 6, 3, 1)
    assert cuboid_partition(values, cuboid.along(time)).shape == (1, 4 * 3 * 1, tokens * 2 * 3, 1)


@pytest.mark.parametrize("join_heads", [True, False])
def test_merging_heads_undoes_splitting(join_heads):
    layer = CuboidSelfAttention(layer_config(), 8, Cuboid((1, 2, 3)))
    windows = torch.randn(3, 5, 6, 8)
    split = layer.split_heads(windows, join_heads)
    assert split.shape == ((3, 5 * 2, 6, 4) if join_heads else (3 * 5, 2, 6, 4))
    assert torch.equal(layer.merge_heads(split.transpose(1, 2), 5, join_heads), windows)


# -- attention, against a loop over pairs of tokens -------------------------------------------------------------------


def axis_groups(length, size, strategy, shift, mask_padding):
    """For each position of an axis, padded: (which cuboid, where in it, which piece of a cut cuboid, is it real)."""
    size = min(size, length)
    shift = 0 if strategy == D or size == length else shift
    total = -(-length // size) * size
    rows = []
    for origin in range(total):
        rolled = (origin - shift) % total
        cuboid, place = (rolled // size, rolled % size) if strategy == L else divmod(rolled, total // size)[::-1]
        piece = 0 if rolled < total - size else (1 if rolled < total - shift else 2)
        rows.append((cuboid, place, piece if shift else 0, origin < length or not mask_padding))
    return rows, size


def naive_self_attention(layer, values):
    """Every token looks for the tokens of its cuboid and piece, one pair at a time."""
    config, cuboid = layer.config, layer.cuboid
    batch, *grid, channels = values.shape
    axes, sizes = zip(
        *(
            axis_groups(n, *spec, config.mask_padding)
            for n, *spec in zip(grid, cuboid.size, cuboid.strategy, cuboid.shift)
        )
    )
    heads, width = config.num_attention_heads, channels // config.num_attention_heads
    normed = layer.norm(values)
    out = torch.zeros_like(values)
    tokens = list(itertools.product(*(range(len(axis)) for axis in axes)))
    facts = {token: [axis[i] for axis, i in zip(axes, token)] for token in tokens}
    for b in range(batch):
        qkv = {}
        for token in tokens:
            real = all(i < n for i, n in zip(token, grid))
            state = normed[(b, *token)] if real else torch.zeros(channels)
            qkv[token] = layer.qkv(state).view(3, heads, width)
        for token in itertools.product(*(range(n) for n in grid)):
            mine = facts[token]
            others = [
                other
                for other in tokens
                if all(a[0] == m[0] and a[2] == m[2] and a[3] for a, m in zip(facts[other], mine))
            ]
            scores = []
            for other in others:
                index = 0
                for m, a, n in zip(mine, facts[other], cuboid.size):
                    index = index * (2 * n - 1) + m[1] - a[1] + n - 1
                product = (qkv[token][0] * qkv[other][1]).sum(-1) * width**-0.5
                scores.append(product + layer.relative_position_bias[index])
            weights = torch.stack(scores).softmax(0)  # (others, heads)
            mixed = sum(w[:, None] * qkv[other][2] for w, other in zip(weights, others))
            out[(b, *token)] = layer.out_proj(mixed.flatten())
    return out


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(
    "grid, cuboid",
    [
        ((3, 5, 4), Cuboid((2, 2, 2), shift=(1, 1, 1))),  # padded and shifted
        ((3, 5, 4), Cuboid((2, 3, 2), (L, D, D), shift=(1, 1, 1))),  # dilated: no shift there
        ((3, 4, 2), Cuboid((2, 3, 4))),  # a grid narrower than the cuboid: true relative offsets
        ((2, 3, 3), Cuboid((4, 3, 3), shift=(1, 0, 0))),
    ],
)
def test_self_attention_equals_a_loop(grid, cuboid, mask_padding):
    layer = randomised(CuboidSelfAttention(layer_config(mask_padding=mask_padding), 8, cuboid))
    values = torch.randn(1, *grid, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(values, None, "eager")[0], naive_self_attention(layer, values), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("separate", [True, False])
def test_global_vectors_read_every_real_token_and_are_read_by_all(separate):
    """One softmax over cuboid and globals; globals over all real tokens and themselves; order does not matter."""
    config = layer_config(separate_global_qkv=separate)
    cuboid = Cuboid((2, 2, 2), shift=(1, 1, 1))
    layer = randomised(CuboidSelfAttention(config, 8, cuboid, use_global_vectors=True))
    values, vectors = torch.randn(1, 3, 3, 3, 8), torch.randn(1, 2, 8)
    with torch.no_grad():
        _, weights, updated = layer(values, vectors, "eager")
        tokens, normed = layer.norm(values).reshape(27, 8), layer.global_norm(vectors)[0]

        def heads(x):
            return x.view(-1, 2, 4).transpose(0, 1)  # (heads, tokens, width)

        _, key, value = layer.qkv(tokens).chunk(3, dim=-1)
        if separate:
            key, value = layer.update_key(tokens), layer.update_value(tokens)
            own_query, own_key, own_value = layer.update_global_qkv(normed).chunk(3, dim=-1)
            query = layer.update_global_query(normed)
        else:
            query, own_key, own_value = layer.global_qkv(normed).chunk(3, dim=-1)
            own_query = query
        scores = torch.cat(
            [heads(query) @ heads(key).transpose(1, 2), heads(own_query) @ heads(own_key).transpose(1, 2)], dim=-1
        )
        mixed = (scores * 4**-0.5).softmax(-1) @ torch.cat([heads(value), heads(own_value)], dim=1)
        expected = layer.global_out_proj(mixed.transpose(0, 1).reshape(1, 2, 8))
    torch.testing.assert_close(updated, expected, rtol=1e-4, atol=1e-5)
    assert weights.shape == (8, 2, 8, 8 + 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 2, 8))
    assert (weights[..., 8:] > 0).all()


def test_regions_keep_the_ends_of_a_rolled_axis_apart():
    regions = cuboid_regions((1, 1, 6), (0, 0, 0), Cuboid((1, 1, 3), shift=(0, 0, 1)), True, torch.device("cpu"))
    # rolled by one: 1 2 3 | 4 5 0
    assert regions[0].unique().numel() == 1
    assert regions[1, 0] == regions[1, 1] != regions[1, 2]
    padded = cuboid_regions((1, 1, 5), (0, 0, 1), Cuboid((1, 1, 3)), True, torch.device("cpu"))
    assert (padded[0] >= 0).all() and padded[1].tolist()[2] == -1
    shown = cuboid_regions((1, 1, 5), (0, 0, 1), Cuboid((1, 1, 3)), False, torch.device("cpu"))
    assert shown.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_cross_attention_sees_only_its_place():
    layer = randomised(CuboidCrossAttention(layer_config(), 8, CrossCuboid((2, 2), shift=(1, 1)), max_time=7))
    values, context = torch.randn(1, 4, 4, 4, 8), torch.randn(1, 3, 4, 4, 8, requires_grad=True)
    out, _ = layer(values, context, "eager")
    out[0, :, 0, 0].sum().backward()
    reached = context.grad[0].abs().sum((0, 3)) > 0
    assert reached.tolist() == [[i == 0 and j == 0 for j in range(4)] for i in range(4)]


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(
    "cuboid, cross_cuboid",
    [
        (Cuboid((2, 2, 3), shift=(0, 1, 1)), CrossCuboid((2, 3), shift=(1, 1), cuboids_along_time=2)),
        (Cuboid((2, 3, 2), (L, D, L)), CrossCuboid((3, 2), (L, D, L), cuboids_along_time=2)),
    ],
)
def test_eager_and_sdpa_agree(cuboid, cross_cuboid, mask_padding):
    config = layer_config(mask_padding=mask_padding)
    layer = randomised(CuboidSelfAttention(config, 8, cuboid, use_global_vectors=True))
    cross = randomised(CuboidCrossAttention(config, 8, cross_cuboid, max_time=9))
    values, vectors, context = torch.randn(2, 3, 5, 7, 8), torch.randn(2, 3, 8), torch.randn(2, 4, 5, 7, 8)
    results = {}
    for name in ("eager", "sdpa"):
        with torch.no_grad():
            tokens, _, globals_ = layer(values, vectors, name)
            results[name] = tokens, globals_, cross(values, context, name)[0]
    for one, other in zip(*results.values()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_more_windows_than_a_kernel_takes(implementation):
    layer = randomised(CuboidSelfAttention(layer_config(), 4, Cuboid((2, 1, 1)), use_global_vectors=True))
    values, vectors = torch.randn(1, 2, 70_000, 1, 4), torch.randn(1, 1, 4)
    with torch.no_grad():
        together = layer(values, vectors, implementation)[0]
        parts = [layer(part, vectors, implementation)[0] for part in values.split(35_000, dim=2)]
    torch.testing.assert_close(together, torch.cat(parts, dim=2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_per_cuboid_is_stored_once_for_all_samples(implementation, monkeypatch):
    """The kernel gets it for one sample, in calls of bounded size; the result is that of a repeated mask, exactly."""
    layer = CuboidSelfAttention(layer_config(), 8, Cuboid((1, 2, 3)))
    batch, cuboids, tokens = 3, 5, 6
    states = [torch.randn(batch, cuboids, tokens, 8) for _ in range(3)]
    mask = torch.randn(cuboids, 2, tokens, tokens)
    kernel, shapes = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward), []
    query, key, value = (layer.split_heads(x) for x in states)
    repeated = mask.repeat(batch, 1, 1, 1)
    expected, weights = kernel(layer, query, key, value, repeated, scaling=layer.scaling, is_causal=False)
    expected = layer.merge_heads(expected, cuboids)

    def recording_kernel(module, query, key, value, attention_mask, **options):
        shapes.append(tuple(attention_mask.shape))
        return kernel(module, query, key, value, attention_mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, implementation, recording_kernel)
    query, key, value = (layer.split_heads(x, join_heads=True) for x in states)
    for largest, calls in ((65_535, [10]), (7, [7, 3])):
        monkeypatch.setattr(cuboid_module, "MAX_WINDOWS", largest)
        result = layer.attend(query, key, value, mask.flatten(0, 1)[None], implementation)
        assert torch.equal(layer.merge_heads(result[0], cuboids, join_heads=True), expected)
        assert result[1] is weights is None or torch.equal(result[1], weights)
        assert shapes == [(1, n, tokens, tokens) for n in calls]
        shapes.clear()


def test_first_used_in_inference_mode_then_trained():
    layer = randomised(CuboidSelfAttention(layer_config(), 8, Cuboid((2, 2, 2), shift=(1, 1, 1)), True))
    values, vectors = torch.randn(1, 3, 5, 5, 8), torch.randn(1, 2, 8)
    with torch.inference_mode():
        before = layer(values, vectors, "eager")[0].clone()
    after, _, updated = layer.train()(values, vectors, "eager")
    torch.testing.assert_close(before.clone(), after.detach())
    (after.sum() + updated.sum()).backward()
    assert layer.relative_position_bias.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype):
    cuboid = CrossCuboid((2, 2), shift=(1, 1), cuboids_along_time=3)
    cross = CuboidCrossAttention(layer_config(), 8, cuboid, max_time=9).to(dtype)
    values = torch.randn(1, 4, 5, 5, 8, dtype=dtype, requires_grad=True)
    out, _ = cross(values, torch.randn(1, 4, 5, 5, 8, dtype=dtype), "eager")
    out.float().square().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(values.grad).all()


def test_patch_merging_pads_with_zeros():
    merge = randomised(PatchMerging(3, 5, (2, 3), eps=1e-5))
    values = torch.randn(1, 2, 3, 4, 3)
    with torch.no_grad():
        out = merge(values)
        corner = torch.zeros(2, 3, 3)
        corner[0, 0] = values[0, 0, 2, 3]
        expected = merge.reduction(merge.norm(corner.flatten()))
    assert out.shape == (1, 2, 2, 2, 5)
    torch.testing.assert_close(out[0, 0, 1, 1], expected)


def test_appended_keys_share_the_softmax():
    """Scores of both kinds side by side, written out; values and gradients in float64."""
    query, other_query = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 3, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    other_key, other_value = torch.randn(2, 3, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    inputs = query, other_query, key, value, other_key, other_value, bias
    scores = torch.cat([0.3 * query @ key.mT + bias, 0.3 * other_query @ other_key.mT], dim=-1)
    expected = scores.softmax(-1) @ torch.cat([value, other_value], dim=2)
    keys, values, mask = append_keys(key, value, bias, other_key, other_value, other_query, scaling=0.3)
    result = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    towards = torch.randn_like(expected)
    gradients = (torch.autograd.grad(x, inputs, towards) for x in (result, expected))
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
