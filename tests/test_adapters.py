"""Quantized weights and low-rank adapters, on the model and on the networks of PreDiff."""

import copy
from functools import partial

import pytest
import torch
from tiny import frames, tiny_model, tiny_pipeline
from torch.utils.checkpoint import checkpoint

from earthformer_hf import EarthformerForPrediction, EarthformerUNetModel


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values - expected).norm() / expected.norm()).item()


def linears(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def denoiser() -> tuple[EarthformerUNetModel, tuple]:
    """The UNet of PreDiff, and its inputs."""
    unet = tiny_pipeline(dropout=0.0).unet
    generator = torch.Generator().manual_seed(1)
    sample, context = (torch.randn(2, length, 6, 8, 4, generator=generator) for length in (2, 3))
    return unet, (sample, 5, context)


def test_the_stem_stands_where_the_library_looks_for_input_embeddings():
    """As the patch embedding of vision models: quantization and adapters ask for it, and there are no tokens."""
    model = tiny_model()
    assert model.get_input_embeddings() is model.model.get_input_embeddings() is model.model.stem
    assert model.get_output_embeddings() is None


# -- int8 -------------------------------------------------------------------------------------------------------------
# Errors of these random models: 4 % where weights are rounded, 12 % where activations are as well, 1 % of the UNet.
# Those of the shipped radar model on simulated rain are 1.6 % (torchao), 1.0 % (quanto) and 5.3 % (dynamic).


def test_torchao_quantizes_the_model(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    model = tiny_model()
    past = frames(model.config)
    expected = model(past).predictions
    model.save_pretrained(tmp_path / "float")
    scheme = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = EarthformerForPrediction.from_pretrained(tmp_path / "float", quantization_config=scheme)
    weights = [layer.weight for layer in linears(quantized)]
    assert all(isinstance(weight, quantization.Int8Tensor) for weight in weights)
    predictions = quantized(past).predictions
    assert 0 < relative_error(predictions, expected) < 0.06

    quantized.save_pretrained(tmp_path / "int8")
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "int8")}
    assert size["int8"] < size["float"]
    loaded = EarthformerForPrediction.from_pretrained(tmp_path / "int8")
    assert isinstance(linears(loaded)[0].weight, quantization.Int8Tensor)
    assert torch.equal(loaded(past).predictions, predictions)


def test_torchao_quantizes_the_denoiser(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from diffusers import TorchAoConfig

    unet, inputs = denoiser()
    unet.save_pretrained(tmp_path)
    quantized = EarthformerUNetModel.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()), torch_dtype=torch.float32
    )
    assert all(isinstance(layer.weight, quantization.Int8Tensor) for layer in linears(quantized))
    assert 0 < relative_error(quantized(*inputs).sample, unet(*inputs).sample) < 0.02


def test_quanto_quantizes_the_model():
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = tiny_model()
    past = frames(model.config)
    quantized = copy.deepcopy(model)
    quanto.quantize(quantized, weights=quanto.qint8)
    quanto.freeze(quantized)
    assert all(layer.weight.qtype == quanto.qint8 for layer in linears(quantized))
    predictions = quantized(past).predictions
    assert 0 < relative_error(predictions, model(past).predictions) < 0.06

    loaded = tiny_model()
    quanto.requantize(loaded, quantized.state_dict(), quanto.quantization_map(quantized), torch.device("cpu"))
    assert torch.equal(loaded(past).predictions, predictions)


def test_quanto_quantizes_the_denoiser(tmp_path):
    quanto = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from diffusers import QuantoConfig

    unet, inputs = denoiser()
    unet.save_pretrained(tmp_path / "float")
    scheme = QuantoConfig(weights_dtype="int8")
    quantized = EarthformerUNetModel.from_pretrained(tmp_path / "float", quantization_config=scheme)
    assert all(layer.weight.qtype == quanto.qint8 for layer in linears(quantized))
    sample = quantized(*inputs).sample
    assert 0 < relative_error(sample, unet(*inputs).sample) < 0.02
    quantized.save_pretrained(tmp_path / "int8")
    assert torch.equal(EarthformerUNetModel.from_pretrained(tmp_path / "int8")(*inputs).sample, sample)


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:.*quantiz:UserWarning")
def test_dynamic_int8_of_pytorch():
    if not {"x86", "fbgemm", "onednn", "qnnpack"} & set(torch.backends.quantized.supported_engines):
        pytest.skip("this PyTorch has no engine for quantized layers")

    def quantize(model):
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    model = tiny_model()
    past = frames(model.config)
    quantized = quantize(copy.deepcopy(model))
    assert linears(quantized) == []
    assert quantized.head.out_proj.weight().dtype == torch.qint8
    predictions = quantized(past).predictions
    assert 0 < relative_error(predictions, model(past).predictions) < 0.2
    loaded = quantize(tiny_model())
    loaded.load_state_dict(quantized.state_dict())
    assert torch.equal(loaded(past).predictions, predictions)


# -- LoRA -------------------------------------------------------------------------------------------------------------


def lora(**options):
    """An adapter that changes the output at once, of the attention's projections."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.LoraConfig(r=4, target_modules=["qkv", "query", "out_proj"], init_lora_weights=False, **options)


def assert_equal_outputs(one: torch.Tensor, other: torch.Tensor):
    """Up to rounding, which depends on where the weights lie in memory; an adapter changes far more."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those of the adapter, and of nothing else."""
    model.zero_grad()
    loss.backward()
    found = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    adapter = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert set(found) == adapter and len(adapter) > 20
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    return found


def assert_equal_gradients(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_adapter_of_the_model_learns_behind_checkpoints(use_reentrant):
    config = lora()
    model = tiny_model().train()
    past = frames(model.config)
    future = torch.randn_like(model(past).predictions)
    model.add_adapter(config)
    plain = gradients(model, model(past, future).loss)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_equal_gradients(gradients(model, model(past, future).loss), plain)


@torch.no_grad()
def test_an_adapter_of_the_model_is_saved_loaded_and_merged(tmp_path):
    config = lora()
    import peft

    base = tiny_model()
    past = frames(base.config)
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    predictions = adapted(past_values=past).predictions
    assert relative_error(predictions, base(past).predictions) > 0.01
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_equal_outputs(loaded(past_values=past).predictions, predictions)
    merged = loaded.merge_and_unload()
    assert type(merged) is EarthformerForPrediction
    assert_equal_outputs(merged(past).predictions, predictions)


@torch.no_grad()
def test_the_library_saves_and_loads_an_adapter_beside_its_base(tmp_path):
    config = lora()
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    past = frames(base.config)
    adapted = EarthformerForPrediction.from_pretrained(tmp_path / "base")
    adapted.add_adapter(config)
    predictions = adapted.eval()(past).predictions
    adapted.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_equal_outputs(loaded.eval()(past).predictions, predictions)
    together = EarthformerForPrediction.from_pretrained(tmp_path / "adapter")
    assert_equal_outputs(together.eval()(past).predictions, predictions)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_adapter_of_the_denoiser_learns_behind_checkpoints(use_reentrant):
    config = lora()
    unet, (sample, timestep, context) = denoiser()
    unet.train().add_adapter(config)

    def loss():
        return unet(sample, timestep, context).sample.square().mean()

    plain = gradients(unet, loss())
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True) if use_reentrant else None)
    assert unet.is_gradient_checkpointing
    assert_equal_gradients(gradients(unet, loss()), plain)


@torch.no_grad()
def test_an_adapter_of_the_denoiser_is_saved_loaded_and_merged(tmp_path):
    config = lora()
    unet, inputs = denoiser()
    expected = unet(*inputs).sample
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(config)
    sample = adapted(*inputs).sample
    assert relative_error(sample, expected) > 0.01
    adapted.disable_adapters()
    assert_equal_outputs(adapted(*inputs).sample, expected)
    adapted.enable_adapters()
    adapted.save_lora_adapter(tmp_path)
    loaded = copy.deepcopy(unet)
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_equal_outputs(loaded(*inputs).sample, sample)
    loaded.fuse_lora()
    loaded.unload_lora()
    assert not [name for name, _ in loaded.named_parameters() if "lora_" in name]
    assert_equal_outputs(loaded(*inputs).sample, sample)
