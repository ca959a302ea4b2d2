"""The model: shapes, loading and saving, precision, compilation, training, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import ROOT, frames, inputs_of, tiny_config, tiny_model
from transformers import (
    AutoModel,
    AutoModelForTimeSeriesPrediction,
    Trainer,
    TrainingArguments,
)

from earthformer_hf import CrossCuboid, Cuboid, EarthformerForPrediction, EarthformerModel


def futures(model, batch=2):
    config = model.config
    return torch.randn(batch, config.prediction_length, *config.image_size, config.num_output_channels)


def test_shapes_and_recorded_outputs():
    model = tiny_model(encoder_depths=[1, 2], decoder_depths=[1, 2], attn_implementation="eager")
    with torch.no_grad():
        plain = model(frames(model.config))
        full = model(frames(model.config), output_hidden_states=True, output_attentions=True)
    assert plain.loss is None and plain.predictions.shape == (2, 4, 20, 28, 1)
    assert plain.encoder_hidden_states is None and plain.cross_attentions is None
    assert torch.equal(plain.predictions, full.predictions)
    assert [tuple(x.shape) for x in full.encoder_hidden_states] == [(2, 3, 10, 14, 16)] * 2 + [(2, 3, 5, 7, 32)] * 2
    assert [tuple(x.shape) for x in full.decoder_hidden_states] == [(2, 4, 5, 7, 32)] * 3 + [(2, 4, 10, 14, 16)]
    assert len(full.encoder_attentions) == 3 * 3 and len(full.decoder_attentions) == 3 * 2
    assert len(full.cross_attentions) == 3
    # axial along time: B * H * W windows, 3 tokens, which see 3 tokens and 2 global vectors
    assert full.encoder_attentions[0].shape == (2 * 10 * 14, 4, 3, 3 + 2)
    as_tuple = model(frames(model.config), return_dict=False)
    assert torch.equal(as_tuple[0], plain.predictions)


def test_channels_out_may_differ_from_channels_in():
    model = tiny_model(num_channels=3, num_output_channels=2)
    assert model(frames(model.config)).predictions.shape == (2, 4, 20, 28, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"self_attention_pattern": "video_swin_2x4", "mask_padding": False},
        {"self_attention_pattern": ["spatial_lg_4", "full"], "cross_attention_pattern": "cross_4x4_heter"},
        {"self_attention_pattern": "axial_space_dilate_2", "separate_global_qkv": False},
        {"self_attention_pattern": [Cuboid((2, 4, 4), shift=(1, 2, 0))], "num_global_vectors": 0},
        {"cross_attention_pattern": [CrossCuboid((3, 4), ("dilated", "local", "local"), (1, 0), 2)]},
        {"hidden_sizes": [16], "encoder_depths": [2], "decoder_depths": [2], "position_embedding_type": "t+hw"},
        {"num_covariates": 3, "decoder_depths": [2, 1], "self_attention_pattern": "video_swin_2x4"},
    ],
)
def test_eager_equals_sdpa_and_every_parameter_learns(changes):
    model = tiny_model(**changes)
    inputs, future = inputs_of(model.config), futures(model)
    results = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        results.append(model(**inputs).predictions)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    model.train()(**inputs, future_values=future).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_save_and_load(tmp_path):
    model = tiny_model()
    past = frames(model.config)
    expected = model(past).predictions
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        loaded = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / folder)
        assert type(loaded) is EarthformerForPrediction
        assert torch.equal(loaded(past).predictions, expected)
    model.model.save_pretrained(tmp_path / "headless")
    headless = EarthformerForPrediction.from_pretrained(tmp_path / "headless")
    assert torch.equal(headless.model(past).last_hidden_state, model.model(past).last_hidden_state)
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(base) is EarthformerModel
    assert torch.equal(base(past).last_hidden_state, model.model(past).last_hidden_state)


def test_parameters_missing_from_a_state_dict_are_initialised():
    """Every parameter is built without memory and must be set by `_init_weights`."""
    given = {"head.out_proj.bias": torch.full((1,), 7.0)}
    loaded = EarthformerForPrediction.from_pretrained(None, config=tiny_config(), state_dict=given)
    assert loaded.head.out_proj.bias.item() == 7.0
    built = dict(EarthformerForPrediction(tiny_config()).named_parameters())
    for name, parameter in loaded.named_parameters():
        if name in given:
            continue
        one, other = parameter.std(), built[name].std()
        if other == 0 or parameter.numel() < 64:
            assert torch.isfinite(parameter).all() and (other > 0 or torch.equal(parameter, built[name])), name
        else:
            assert 0.5 < one / other < 2, name
    weight = loaded.model.encoder.levels[1][0].attentions[0].qkv.weight
    assert 0.8 < weight.std().item() * weight.shape[1] ** 0.5 < 1.2


def test_weights_may_wait_on_disk(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    places = {"model.stem": "cpu", "model.encoder": "disk", "model.decoder": "disk", "head": "cpu"}
    loaded = EarthformerForPrediction.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    past = frames(model.config)
    assert loaded.model.encoder.position_embedding.time.weight.is_meta
    torch.testing.assert_close(loaded(past).predictions, model(past).predictions)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision(tmp_path, dtype, tolerance):
    model = tiny_model(self_attention_pattern="video_swin_2x4")  # padding, shifts and global vectors
    past = frames(model.config)
    expected = model(past).predictions
    model.save_pretrained(tmp_path)
    half = EarthformerForPrediction.from_pretrained(tmp_path, dtype=dtype)
    for name in ("eager", "sdpa"):
        half.set_attn_implementation(name)
        predictions = half(past.to(dtype)).predictions
        assert predictions.dtype == dtype
        assert (predictions.float() - expected).abs().max() < tolerance * expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(past, futures(model)).loss
    loss.backward()
    assert torch.isfinite(model.model.encoder.global_vectors.grad).all()


def test_activation_checkpointing_gives_the_same_gradients():
    model = tiny_model().train()
    past, future = frames(model.config), futures(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model.zero_grad()
        model(past, future).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["axial", "video_swin_2x4"])
def test_compiles_as_one_graph(pattern):
    model = tiny_model(self_attention_pattern=pattern)
    past, future = frames(model.config), futures(model)
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model)(past, future)
    assert explained.graph_break_count == 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(past, future).loss, model(past, future).loss)


def test_a_forecast_does_not_depend_on_its_neighbours():
    model = tiny_model(self_attention_pattern="video_swin_2x4")
    past = frames(model.config, batch=3)
    alone = torch.cat([model(sample[None]).predictions for sample in past])
    torch.testing.assert_close(model(past).predictions, alone, rtol=1e-5, atol=1e-5)


# -- covariates -------------------------------------------------------------------------------------------------------


def test_covariates_of_a_model():
    """The forecast depends on those of the context and of the forecast, each at its own time and place."""
    model = tiny_model(num_covariates=3, encoder_depths=[1, 2], decoder_depths=[1, 2])
    inputs = inputs_of(model.config)
    full = model(**inputs, output_hidden_states=True)
    assert full.predictions.shape == (2, 4, 20, 28, 1)
    # the covariates' tokens; level 0 and 1 downwards, 1 and 0 upwards
    assert [x.shape[2] for x in full.decoder_hidden_states] == [10, 10, 5, 5, 5, 5, 10]
    for name in ("past_covariates", "future_covariates"):
        changed = inputs | {name: inputs[name].flip(1)}
        assert (model(**changed).predictions - full.predictions).abs().max() > 1e-3, name
    alone = torch.cat([model(**{name: x[k : k + 1] for name, x in inputs.items()}).predictions for k in (0, 1)])
    torch.testing.assert_close(alone, full.predictions, rtol=1e-5, atol=1e-5)


def test_a_model_with_covariates_is_saved_loaded_and_trained(tmp_path):
    model = tiny_model(num_covariates=3)
    inputs, future = inputs_of(model.config), futures(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path)
    assert loaded.config.num_covariates == 3
    assert torch.equal(loaded(**inputs).predictions, model(**inputs).predictions)

    mask = torch.rand(future.shape) < 0.5
    missing = future.masked_fill(~mask, float("nan"))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train().zero_grad()
        out = model(**inputs, future_values=missing, future_observed_mask=mask)
        torch.testing.assert_close(out.loss, (out.predictions - future)[mask].square().mean())
        out.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_model_with_covariates_compiles_as_one_graph():
    model = tiny_model(num_covariates=3)
    inputs = inputs_of(model.config)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).predictions, model(**inputs).predictions)


@pytest.mark.parametrize("name", ["past_covariates", "future_covariates"])
def test_wrong_covariates_are_refused(name):
    model = tiny_model(num_covariates=3)
    inputs = inputs_of(model.config)
    given = inputs.pop(name)
    with pytest.raises(ValueError, match=f"`{name}` is missing"):
        model(**inputs)
    wrong = [given[:1], given[:, 1:], given[..., :2], given.transpose(2, 3), given.long(), given[0]]
    for covariates in wrong:
        with pytest.raises(ValueError, match=f"`{name}` must be floating point of shape.*got"):
            model(**inputs, **{name: covariates})
    without = tiny_model()
    with pytest.raises(ValueError, match=f"`{name}` must be omitted"):
        without(frames(without.config), **{name: given})


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_observed_values():
    model = tiny_model()
    past, future = frames(model.config), futures(model)
    out = model(past, future)
    torch.testing.assert_close(out.loss, (out.predictions - future).square().mean())
    mask = torch.zeros(1, 4, 20, 1, 1, dtype=torch.bool)
    mask[:, 1, 3:7] = True
    loss = model(past, future, mask).loss
    torch.testing.assert_close(loss, (out.predictions - future)[:, 1, 3:7].square().mean())


def test_missing_future_values_reach_neither_loss_nor_gradient():
    model = tiny_model()
    past, future = frames(model.config), futures(model)
    mask = torch.rand(future.shape) < 0.5
    model(past, future, mask).loss.backward()
    expected = model.head.out_proj.weight.grad.clone()
    model.zero_grad()
    model(past, future.masked_fill(~mask, float("nan")), mask).loss.backward()
    assert torch.equal(model.head.out_proj.weight.grad, expected)


def test_a_batch_without_observed_values_has_no_loss_and_no_gradient():
    """Gradients are 0, not absent: processes that train together wait for all of them."""
    model = tiny_model().train()
    past, future = frames(model.config), futures(model)
    loss = model(past, torch.full_like(future, float("nan")), torch.zeros_like(future, dtype=torch.bool)).loss
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


# -- transformers.Trainer ---------------------------------------------------------------------------------------------


class Random(torch.utils.data.Dataset):
    def __init__(self, config):
        generator = torch.Generator().manual_seed(3)
        self.past = torch.randn(8, 3, *config.image_size, 1, generator=generator)

    def __len__(self):
        return len(self.past)

    def __getitem__(self, item):
        past = self.past[item]
        return {"past_values": past, "future_values": past[-1:].repeat(4, 1, 1, 1) * 0.5}


def test_trainer_trains_evaluates_and_keeps_the_best_model(tmp_path):
    model = tiny_model()
    data = Random(model.config)
    arguments = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=4, learning_rate=2e-3, label_names=["future_values"],
        eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, metric_for_best_model="mae",
        greater_is_better=False, report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def mae(prediction):
        assert prediction.predictions.shape == prediction.label_ids.shape == (8, 4, 20, 28, 1)
        return {"mae": float(np.abs(prediction.predictions - prediction.label_ids).mean())}

    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=mae)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    history = [entry["eval_mae"] for entry in trainer.state.log_history if "eval_mae" in entry]
    assert after["eval_mae"] == pytest.approx(min(history[1:-1]), rel=1e-6)


# -- keywords of forward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typo, meant",
    [
        ("future_value", "future_values"),
        ("future_mask", "future_observed_mask"),
        ("past_covariate", "past_covariates"),
    ],
)
def test_a_typo_in_a_call_is_refused_with_the_nearest_name(typo, meant):
    model = tiny_model()
    past, future = frames(model.config), futures(model)
    with pytest.raises(TypeError, match=rf"EarthformerForPrediction.forward\(\).*'{typo}'; did you mean '{meant}'"):
        model(past_values=past, **{typo: future})
    with pytest.raises(TypeError, match="EarthformerModel.forward.*'past_covariate'; did you mean 'past_covariates'"):
        model.model(past, past_covariate=past)


def test_keywords_that_the_library_passes_are_taken():
    model = tiny_model()
    past, future = frames(model.config), futures(model)
    expected = model(past, future)
    given = model(past, future, num_items_in_batch=2, output_attentions=False, return_dict=True, is_causal=False)
    assert torch.equal(given.loss, expected.loss) and given.encoder_attentions is None
    assert torch.equal(model.model(past, num_items_in_batch=2)[0], model.model(past)[0])


def test_gradients_accumulated_by_the_trainer_are_those_of_the_whole_batch(tmp_path):
    weights = []
    for steps in (1, 2):
        model = tiny_model()
        model.load_state_dict(weights[0] if weights else model.state_dict())
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        weights = weights or [start]
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0, label_names=["future_values"], save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=Random(model.config)).train()
        weights.append(model.state_dict())
    start, whole, accumulated = weights
    assert (whole["head.out_proj.weight"] - start["head.out_proj.weight"]).abs().max() > 1e-3
    for name in whole:
        torch.testing.assert_close(accumulated[name], whole[name], rtol=1e-3, atol=1e-4)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(2, 4, 20, 28, 1), (2, 3, 28, 20, 1), (2, 3, 20, 28, 2), (3, 20, 28, 1), (0, 3, 20, 28, 1)]
)
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"past_values.*3, 20, 28, 1.*got"):
        tiny_model()(torch.zeros(shape))


def test_wrong_dtypes_and_futures_are_refused():
    model = tiny_model()
    past, future = frames(model.config), futures(model)
    with pytest.raises(ValueError, match="floating point, got torch.uint8"):
        model(past.to(torch.uint8))
    with pytest.raises(ValueError, match="`past_values` must be torch.float32 as the weights are, got torch.float64"):
        model(past.double())
    assert model.double()(past.double()).predictions.dtype == torch.float64
    model.float()
    with pytest.raises(ValueError, match="future_values"):
        model(past, future[:, :3])
    with pytest.raises(ValueError, match="boolean"):
        model(past, future, torch.ones_like(future))
    with pytest.raises(ValueError, match="broadcast"):
        model(past, future, torch.ones(2, 3, 20, 28, 1, dtype=torch.bool))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_forecast_from_what_is_not_finite_is_refused(wrong):
    model = tiny_model()
    past, future = frames(model.config), futures(model)
    past[0, 0, 0, 0] = wrong
    with pytest.raises(ValueError, match="`past_values` must be finite: fill missing values first"):
        model.eval()(past)
    assert not model(past, future).loss.isfinite() and not model.train()(past).predictions.isfinite().all()


def test_broken_checkpoints_are_refused(tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    wrong = {**tensors, "head.out_proj.weight": torch.zeros(1, 5)}
    save_file(wrong, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"head.out_proj.weight \(1, 5\) instead of \(1, 4\).*mismatched_sizes"):
        EarthformerForPrediction.from_pretrained(tmp_path)
    report = caplog.text
    assert "head.out_proj.weight" in report and "[1, 5]" in report and "[1, 4]" in report

    lacking = {name: tensor for name, tensor in tensors.items() if name != "head.out_proj.weight"}
    save_file(lacking, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing.*head.out_proj.weight"):
        EarthformerForPrediction.from_pretrained(tmp_path)
    save_file({**tensors, "head.extra": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are unknown.*head.extra"):
        EarthformerForPrediction.from_pretrained(tmp_path)

    save_file(tensors, path, metadata={"format": "pt"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|header|buffer|invalid"):
        EarthformerForPrediction.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path):
    """The process may write files of at most 30 kB: the configuration fits, the weights do not."""
    script = f"""
import resource, signal, torch
from tiny import tiny_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
torch.manual_seed(1)
model = tiny_model(dropout=0.25)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
model.save_pretrained({str(tmp_path / "model")!r})
"""
    tiny_model().save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT / "tests")
    assert result.returncode != 0 and "too large" in result.stderr, result.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_again_leaves_no_stale_shards(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_saving_leaves_alone_what_it_did_not_write(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, is_main_process=False)
    model.save_pretrained(tmp_path, variant="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "model.fp16.safetensors"}


def test_norms_train_behind_frozen_convolutions():
    """GroupNorm's backward on the CPU can end the process, so another one tries."""
    script = """
import torch
from tiny import frames, tiny_model
model = tiny_model()
for module in model.modules():
    if isinstance(module, torch.nn.Conv2d):
        module.requires_grad_(False)
model(frames(model.config)).predictions.square().mean().backward()
assert model.model.stem.stages[0].layers[1].weight.grad.abs().sum() > 0
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT / "tests")
    assert result.returncode == 0, result.stderr


def test_deterministic_initialisation():
    torch.manual_seed(5)
    first = EarthformerForPrediction(tiny_config())
    torch.manual_seed(5)
    second = EarthformerForPrediction(tiny_config())
    for one, other in zip(first.parameters(), second.parameters()):
        assert torch.equal(one, other)
