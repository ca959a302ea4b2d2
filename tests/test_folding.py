"""Upsampling and convolutions in one: against the plain form, which is a nearest upsampling and `nn.Conv2d`."""

import pytest
import torch
from tiny import frames as tiny_frames
from tiny import tiny_model
from torch import nn

from earthformer_hf import EarthformerForPrediction
from earthformer_hf.folding import plain_upsample_conv, upsample_conv


def conv(before: int, after: int, **options) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, **options)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


KINDS = ["one convolution", "two convolutions", "channels beside"]


def case(kind: str, factors=(2, 3), grid=(3, 4), dtype=torch.float64):
    """Arguments of `upsample_conv`: 5 channels become 6, then 7."""
    size = [factor * n for factor, n in zip(factors, grid)]
    frames = torch.randn(2, *grid, 5, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    beside = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True) if kind == "channels beside" else None
    second = None if kind == "one convolution" else conv(9 if beside is not None else 6, 7, dtype=dtype)
    return frames, size, conv(5, 6, dtype=dtype), second, beside


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factors", [(2, 2), (3, 3), (2, 3), (5, 2)])
@pytest.mark.parametrize("grid", [(4, 3), (1, 2), (1, 1)])
def test_values_and_gradients_are_those_of_the_plain_form(kind, factors, grid):
    arguments = case(kind, factors, grid)
    frames, _, first, second, beside = arguments
    wanted = [frames, *first.parameters(), *(second.parameters() if second else [])]
    wanted += [] if beside is None else [beside]
    results = {}
    for function in (upsample_conv, plain_upsample_conv):
        output = function(*arguments)
        towards = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape).cos()
        results[function] = [output.detach(), *torch.autograd.grad((output * towards).sum(), wanted)]
    for result, expected in zip(*results.values()):
        assert error(result, expected) < 1e-12


@pytest.mark.parametrize("first_has, second_has", [(True, False), (False, True), (False, False)])
def test_convolutions_without_bias(first_has, second_has):
    frames = torch.randn(2, 5, 3, 4)
    convs = conv(5, 6, bias=first_has), conv(6, 7, bias=second_has)
    assert error(upsample_conv(frames, (6, 8), *convs), plain_upsample_conv(frames, (6, 8), *convs)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_precision(kind, dtype, bound):
    """Of weights in that precision; bfloat16 has 8 bits, and the kernel is composed in float32."""
    arguments = case(kind, grid=(8, 9), dtype=dtype)
    result = upsample_conv(*arguments)
    assert result.dtype == dtype
    exact = plain_upsample_conv(*(x.double() if isinstance(x, (torch.Tensor, nn.Module)) else x for x in arguments))
    assert error(result.double(), exact) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_composes_the_kernel_in_float32(kind):
    arguments = case(kind, grid=(8, 9), dtype=torch.float32)
    exact = plain_upsample_conv(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        folded, plain = upsample_conv(*arguments), plain_upsample_conv(*arguments)
    assert folded.dtype == plain.dtype == torch.bfloat16
    assert error(folded, exact) < 0.02


@pytest.mark.parametrize("size", [(6, 4), (7, 8), (3, 8), (12, 3), (3, 4)])
def test_what_is_no_whole_multiple_is_done_step_by_step(size):
    """From 3 x 4: the first two are no multiple of both, the others not at least twice as large along both axes."""
    frames, first, second = torch.randn(2, 5, 3, 4), conv(5, 6), conv(6, 7)
    for last in (None, second):
        assert torch.equal(upsample_conv(frames, size, first, last), plain_upsample_conv(frames, size, first, last))


def test_weights_that_change_are_seen():
    arguments = case("two convolutions")
    with torch.no_grad():
        before = upsample_conv(*arguments)
        arguments[2].weight.mul_(2)
        arguments[3].weight.data = -arguments[3].weight.data
        after, expected = upsample_conv(*arguments), plain_upsample_conv(*arguments)
    assert error(after, expected) < 1e-12 and error(after, before) > 0.1


@pytest.mark.parametrize("which", [2, 3])
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward"])
def test_a_convolution_with_a_hook_is_called(which, hook):
    arguments, calls = case("two convolutions"), []
    getattr(arguments[which], f"register_{hook}_hook")(lambda *_: calls.append(1))
    upsample_conv(*arguments).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("which", [2, 3])
def test_a_convolution_inside_an_adapter_is_called(which):
    class Doubled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    arguments = list(case("two convolutions"))
    plain = arguments[which]
    arguments[which] = Doubled(plain.in_channels, plain.out_channels, 3, padding=1, dtype=torch.float64)
    assert torch.equal(upsample_conv(*arguments), plain_upsample_conv(*arguments))


@pytest.mark.parametrize("on_disk", ["head", "head.upsamples", "head.stages"])
def test_weights_of_the_head_may_wait_on_disk(tmp_path, on_disk):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    places = {"model": "cpu", "head.upsamples": "cpu", "head.stages": "cpu", "head.out_proj": "cpu"}
    places = {name: place for name, place in places.items() if not name.startswith(on_disk)} | {on_disk: "disk"}
    loaded = EarthformerForPrediction.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    past = tiny_frames(model.config)
    torch.testing.assert_close(loaded(past).predictions, model(past).predictions)


def test_no_graph_break():
    arguments = case("channels beside", dtype=torch.float32)
    compiled = torch.compile(upsample_conv, fullgraph=True, backend="aot_eager")
    for context in (torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with context:
            torch.testing.assert_close(compiled(*arguments), upsample_conv(*arguments))
