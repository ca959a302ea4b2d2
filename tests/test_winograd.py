"""Convolutions with fewer multiplications: against `nn.Conv3d` itself."""

import pytest
import torch
from tiny import tiny_pipeline
from torch import nn

from earthformer_hf import winograd
from earthformer_hf.folding import is_bare
from earthformer_hf.winograd import MAX_CHANNELS, MIN_CHANNELS, winograd_conv3d


@pytest.fixture(autouse=True)
def narrow_too(monkeypatch):
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)


def conv(before: int = 5, after: int = 6, **options) -> nn.Conv3d:
    return nn.Conv3d(before, after, 3, padding=1, **options)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((result - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("size", [(4, 6, 2), (3, 5, 7), (1, 2, 3), (1, 1, 1)])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_values_are_those_of_the_convolution(size, dtype, bound, channels_last):
    module, volume = conv(dtype=dtype), torch.randn(2, 5, *size, dtype=dtype)
    if channels_last:
        volume = volume.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        result = winograd_conv3d(volume, module)
        assert error(result, module(volume)) < bound
    assert result.shape == (2, 6, *size) and result.permute(0, 2, 3, 4, 1).is_contiguous()


def test_without_bias():
    module, volume = conv(bias=False), torch.randn(1, 5, 3, 4, 4)
    with torch.no_grad():
        assert error(winograd_conv3d(volume, module), module(volume)) < 2e-6


def test_precision_of_many_channels():
    """More than are computed at once; rounding is below that of the direct form."""
    module, volume = conv(256, MAX_CHANNELS + 2), torch.randn(1, 256, 3, 4, 4)
    exact = module.double()(volume.double())
    with torch.no_grad():
        assert error(winograd_conv3d(volume, module.float()), exact) < 2e-6


def test_samples_in_parts(monkeypatch):
    module, volume = conv(), torch.randn(5, 5, 3, 4, 4)
    monkeypatch.setattr(winograd, "MAX_VALUES", 2 * 8 * volume[0].numel())
    with torch.no_grad():
        assert error(winograd_conv3d(volume, module), module(volume)) < 2e-6


def test_weights_that_change_are_seen():
    module, volume = conv(), torch.randn(1, 5, 3, 4, 4)
    with torch.no_grad():
        before = winograd_conv3d(volume, module) - module.bias[:, None, None, None]
        module.weight.data = -2 * module.weight.data
        after = winograd_conv3d(volume, module) - module.bias[:, None, None, None]
    torch.testing.assert_close(after, -2 * before)


def hooked(module, calls):
    module.register_forward_hook(lambda *_: calls.append(1))
    return module


class Adapter(nn.Conv3d):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("case", ["narrow", "gradients", "half", "autocast", "hook", "adapter"])
def test_left_to_the_convolution(case, monkeypatch):
    if case == "narrow":
        monkeypatch.setattr(winograd, "MIN_CHANNELS", MIN_CHANNELS)
    module, volume, calls = conv(), torch.randn(1, 5, 3, 4, 4), []
    if case == "half":
        module, volume = module.bfloat16(), volume.bfloat16()
    elif case == "hook":
        module = hooked(module, calls)
    elif case == "adapter":
        module = Adapter(5, 6, 3, padding=1)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
    with torch.set_grad_enabled(case == "gradients"), autocast:
        result = winograd_conv3d(volume, module)
        assert len(calls) == (case == "hook")
        assert torch.equal(result, module(volume)) and result.requires_grad == (case == "gradients")


def test_weights_that_diffusers_moves_are_called_for():
    """They come to the device when the convolution is called."""
    network, cpu = tiny_pipeline().unet, torch.device("cpu")
    convs = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    assert all(is_bare(module) for module in convs)
    network.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert not any(is_bare(module) for module in convs)


def test_denoiser_forecasts_the_same_with_and_without():
    """A network that records gradients computes its convolutions directly."""
    network = tiny_pipeline().unet
    arguments = torch.randn(2, 2, 6, 8, 4), 5, torch.randn(2, 3, 6, 8, 4)
    direct = network(*arguments)[0].detach()
    with torch.no_grad():
        assert 0 < error(network(*arguments)[0], direct) < 1e-5
