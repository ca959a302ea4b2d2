"""What a forward pass costs, counted and not timed: multiplications, kernels, copies."""

import sys
from collections import Counter

import pytest
import torch
from tiny import ROOT, frames, tiny_model, tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from earthformer_hf import EarthformerConfig, stem_earthformer
from earthformer_hf.cuboid import Cuboid, CuboidAttentionBase, CuboidLayerConfig, CuboidSelfAttention, as_frames
from earthformer_hf.folding import plain_upsample_conv
from earthformer_hf.stem_earthformer import EarthformerHead
from earthformer_hf.unet_earthformer import TimeResidualBlock


sys.path.insert(0, str(ROOT / "benchmarks"))

import run as benchmark  # noqa: E402


FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Calls(TorchDispatchMode):
    """Counts the operations of PyTorch that run, and those that copy at least `large` elements."""

    def __init__(self, large: int = 0):
        super().__init__()
        self.large, self.names, self.copies = large, Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names[function.name()] += 1
        copy = function.name() in ("aten::clone", "aten::copy_", "aten::_to_copy")
        self.copies += copy and result.numel() >= self.large
        return result


def flops(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def test_flops_of_the_head_of_sevir(monkeypatch):
    """On tensors without data; upsampling and the two convolutions after it are one transposed convolution."""
    with torch.device("meta"):
        head, tokens = EarthformerHead(EarthformerConfig()), torch.randn(1, 12, 32, 32, 128)
        folded = flops(head, tokens)
        monkeypatch.setattr(stem_earthformer, "upsample_conv", plain_upsample_conv)
        plain = flops(head, tokens)
    assert folded < plain / 3


def test_flops_of_the_denoiser_of_sevir_lr():
    """Its convolutions are most of them, and for a forecast need 64 multiplications instead of 216."""
    block, tokens = TimeResidualBlock(128, 128, 4, 0.0), torch.randn(1, 2, 4, 4, 128)
    direct = flops(block, tokens)
    with torch.no_grad():
        kernels = 2 * 2 * 64 * 27 * 128 * 128  # weights of two convolutions, transformed
        assert flops(block, tokens) - kernels == direct * 64 / 216


@pytest.mark.parametrize("pattern", ["axial", "video_swin_2x4"])
@pytest.mark.parametrize("separate", [True, False])
def test_every_attention_is_fused(pattern, separate, monkeypatch):
    model, attentions = tiny_model(separate_global_qkv=separate, self_attention_pattern=pattern), []
    attend = CuboidAttentionBase.attend
    monkeypatch.setattr(CuboidAttentionBase, "attend", lambda *args: attentions.append(1) or attend(*args))
    with torch.no_grad(), Calls() as calls:
        model(frames(model.config))
    assert calls.names[FUSED] == len(attentions) > 8
    assert calls.names["aten::_softmax"] == 0


@pytest.mark.parametrize("size, copies", [((4, 1, 1), 1), ((1, 5, 1), 1), ((1, 1, 6), 0)])
def test_tokens_are_copied_into_axial_cuboids_once(size, copies):
    """Not for every linear map; and not at all along the width, where cuboids are views of the grid."""
    layer = CuboidSelfAttention(CuboidLayerConfig(2), 8, Cuboid(size), use_global_vectors=True)
    monitored = Calls(large=3 * 4 * 5 * 6 * 8)
    states = []
    layer.qkv.register_forward_pre_hook(lambda module, args: states.append(monitored.copies))
    layer.out_proj.register_forward_pre_hook(lambda module, args: states.append(args[0].is_contiguous()))
    with torch.no_grad(), monitored:
        layer(torch.randn(3, 4, 5, 6, 8), torch.randn(3, 2, 8))
    assert states == [copies, True]


def test_the_denoiser_is_one_graph():
    network = tiny_pipeline().unet
    arguments = torch.randn(2, 2, 6, 8, 4), torch.tensor(5), torch.randn(2, 3, 6, 8, 4)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments)[0], network(*arguments)[0])


def test_time_blocks_return_dense_tokens():
    """A strided view would slow down every addition after it."""
    block, tokens, embedding = TimeResidualBlock(6, 8, 4, 0.0), torch.randn(2, 3, 4, 5, 6), torch.randn(2, 4)
    with torch.no_grad():
        assert block(tokens, embedding).is_contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            assert block(tokens, embedding).is_contiguous()


def test_time_blocks_copy_nothing_in_half_precision():
    block, tokens = TimeResidualBlock(8, 8, 4, 0.0).bfloat16(), torch.randn(2, 3, 4, 5, 8, dtype=torch.bfloat16)
    with torch.no_grad(), Calls() as calls:
        block(tokens, torch.randn(2, 4, dtype=torch.bfloat16))
    assert calls.copies == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_blocks_in_half_precision_train(dtype):
    """Also where the tokens need no gradient; see `SafeGroupNorm`."""
    block, tokens = TimeResidualBlock(8, 8, 4, 0.0).to(dtype), torch.randn(2, 3, 4, 5, 8, dtype=dtype)
    block(tokens, torch.randn(2, 4, dtype=dtype)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


@pytest.mark.parametrize("half", [True, False])
def test_frames_to_be_upsampled_keep_their_channels_last_but_in_half_precision(half):
    tokens = torch.randn(2, 3, 4, 5, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        frames = as_frames(tokens)
    assert torch.equal(frames[4, :, 1, 2], tokens[1, 1, 1, 2])
    assert frames.is_contiguous() == half != frames.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("network", ["earthformer", "default", "scale_shift"])
def test_the_plain_path_of_the_benchmark(network):
    """It gives the same, step by step, and leaves nothing behind."""
    if network == "earthformer":
        model = tiny_model(separate_global_qkv=True)
        arguments = (frames(model.config),)
    else:
        model = tiny_pipeline(resnet_time_scale_shift=network, num_global_vectors=2).unet
        arguments = torch.randn(2, 2, 6, 8, 4), 5, torch.randn(2, 3, 6, 8, 4)
    with torch.no_grad():
        ours = model(*arguments)[0]
        with benchmark.plain_path(model), Calls() as calls:
            plain = model(*arguments)[0]
        torch.testing.assert_close(plain, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
        assert calls.names[FUSED] == 0 < calls.names["aten::_softmax"]
        upsampled = calls.names["aten::upsample_nearest2d"]
        assert calls.names["aten::leaky_relu_"] == 0
        with Calls() as calls:
            assert torch.equal(model(*arguments)[0], ours)
        assert calls.names["aten::_softmax"] == 0 and calls.names["aten::upsample_nearest2d"] < upsampled
