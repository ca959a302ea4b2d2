"""PreDiff that is told what a deterministic model forecasts: network, pipeline, encoded windows, training."""

import copy

import numpy as np
import pytest
import torch
from tiny import tiny_forecaster, tiny_pipeline

from earthformer_hf import (
    EarthformerForPrediction,
    EarthformerUNetModel,
    KnowledgeAlignmentCallback,
    PreDiffPipeline,
    sharing,
)
from earthformer_hf.data import Windows
from earthformer_hf.data.latents import EncodedWindows
from earthformer_hf.forecasting.nowcasters import EnsembleNowcaster, describe
from earthformer_hf.pipeline_prediff import encode_frames


def past(batch=2, seed=0):
    return torch.rand(batch, 3, 12, 16, 1, generator=torch.Generator().manual_seed(seed))


def run(pipeline, past_values, **options):
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": generator, "num_inference_steps": 3, "output_type": "pt", "ensemble_size": 2} | options
    return pipeline(past_values, **options).predictions


def inputs(batch=2):
    shapes = {"sample": (2, 6, 8, 4), "context": (3, 6, 8, 4), "condition": (2, 6, 8, 4)}
    return {name: torch.randn(batch, *shape) for name, shape in shapes.items()} | {"timestep": 5}


# -- network ----------------------------------------------------------------------------------------------------------


def test_a_condition_that_weighs_nothing_leaves_the_published_network():
    plain, told, given = tiny_pipeline().unet, tiny_pipeline(forecaster=True).unet, inputs()
    tensors = told.state_dict()
    for name, tensor in plain.state_dict().items():
        if tensors[name].shape == tensor.shape:
            tensors[name] = tensor
        else:  # the condition's channels are the last of a norm, or of what a convolution takes
            assert name.startswith("down.in_block")
            tensors[name].zero_()[tuple(slice(length) for length in tensor.shape)] = tensor
    told.load_state_dict(tensors)
    condition = given.pop("condition")
    expected = plain(**given).sample
    torch.testing.assert_close(told(**given, condition=condition).sample, expected, rtol=1e-5, atol=1e-5)


def test_a_condition_changes_the_output_and_gets_a_gradient():
    unet, given = tiny_pipeline(forecaster=True).unet, inputs()
    given["condition"].requires_grad_()
    output = unet(**given, return_dict=False)[0]
    output.square().mean().backward()
    assert (
        given["condition"].grad.abs().amin((1, 2, 3, 4)).min() >= 0
        and (given["condition"].grad != 0).all((0, 4)).all()
    )
    changed = given | {"condition": given["condition"].detach() + 1.0}
    assert not torch.allclose(unet(**changed).sample, output)


def test_the_condition_stands_beside_the_frames_of_the_forecast():
    """What the network sees: context and sample, a mark of the context, and the condition, 0 for the context."""
    unet, given, seen = tiny_pipeline(forecaster=True).unet, inputs(), []
    unet.down.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    unet(**given)
    (sequence,) = seen
    assert sequence.shape == (2, 5, 6, 8, 4 + 1 + 4)
    assert torch.equal(sequence[..., :4], torch.cat([given["context"], given["sample"]], 1))
    assert (sequence[:, :3, ..., 4] == 1).all() and (sequence[:, 3:, ..., 4] == 0).all()
    assert (sequence[:, :3, ..., 5:] == 0).all() and torch.equal(sequence[:, 3:, ..., 5:], given["condition"])


@pytest.mark.parametrize(
    ("condition_channels", "condition", "message"),
    [
        (4, None, "`condition` is missing: this network has condition_channels=4"),
        (0, torch.zeros(2, 2, 6, 8, 4), "`condition` must be None"),
        (4, torch.zeros(2, 2, 6, 8, 5), r"`condition` must have shape .*2, 6, 8, 4\), got \(2, 2, 6, 8, 5\)"),
        (4, torch.zeros(2, 3, 6, 8, 4), "`condition` must have shape"),
        (4, torch.zeros(1, 2, 6, 8, 4), "`condition` must have the batch size of `sample`, 2, got 1"),
    ],
)
def test_a_wrong_condition_is_refused(condition_channels, condition, message):
    unet = tiny_pipeline(condition_channels=condition_channels).unet
    with pytest.raises(ValueError, match=message):
        unet(**(inputs() | {"condition": condition}))


@pytest.mark.parametrize("number", [-1, 10**9])
def test_impossible_numbers_of_channels_are_refused(number):
    with pytest.raises(ValueError, match="must be at"):
        EarthformerUNetModel(condition_channels=number)


# -- pipeline ---------------------------------------------------------------------------------------------------------


def test_each_sample_is_forecast_once_and_every_member_told():
    pipeline, x, contexts, told = tiny_pipeline(forecaster=True), past(2), [], []
    pipeline.forecaster.register_forward_pre_hook(
        lambda module, args, kwargs: contexts.append(kwargs["past_values"]), with_kwargs=True
    )
    pipeline.unet.register_forward_pre_hook(lambda module, arguments: told.append(arguments[3]))
    run(pipeline, x, ensemble_size=3)
    assert len(contexts) == 1 and torch.equal(contexts[0], x)
    with torch.no_grad():
        frames = pipeline.forecaster(past_values=x).predictions
        assert not torch.equal(frames, frames.clip(0, 1))  # the same as in training: not clipped
        expected = encode_frames(pipeline.vae, frames).repeat_interleave(3, 0)
    assert len(told) == 3
    for condition in told:
        torch.testing.assert_close(condition, expected, rtol=1e-5, atol=1e-5)


def test_a_member_is_the_same_in_any_company():
    pipeline, x = tiny_pipeline(forecaster=True), past(3)
    whole = run(pipeline, x, ensemble_size=4)
    alone = torch.cat([run(pipeline, x[:1], ensemble_size=2), run(pipeline, x[:1], max_batch_size=1)])
    torch.testing.assert_close(alone, whole[:1, :2].expand_as(alone), rtol=1e-4, atol=1e-5)
    parts = run(pipeline, x, ensemble_size=4, max_batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_another_forecast_gives_another_ensemble_and_guidance_works_beside_it():
    pipeline, x = tiny_pipeline(alignment=True, forecaster=True), past()
    free = run(pipeline, x)
    guided = run(pipeline, x, callback_on_step_end=KnowledgeAlignmentCallback(0.9))
    assert guided.isfinite().all() and not torch.equal(guided, free)
    other = PreDiffPipeline.from_pipe(pipeline, forecaster=copy.deepcopy(pipeline.forecaster))
    torch.nn.init.ones_(other.forecaster.head.out_proj.bias)
    assert not torch.allclose(run(other, x), free)
    assert other.alignment is pipeline.alignment and PreDiffPipeline.from_pipe(other).forecaster is other.forecaster


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipeline, x = tiny_pipeline(forecaster=True), past(1)
    exact = run(pipeline, x)
    half = run(pipeline.to(dtype), x)
    assert pipeline.forecaster.dtype == dtype
    torch.testing.assert_close(half.float(), exact, rtol=0.2, atol=0.2)
    pipeline.forecaster.float()  # each network in its own
    torch.testing.assert_close(run(pipeline, x).float(), exact, rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 4}, "`forecaster` must have context_length=3 .* got 4"),
        ({"prediction_length": 3}, "`forecaster` must have prediction_length=2 .* got 3"),
        ({"image_size": (12, 12)}, r"`forecaster` must have image_size=\[12, 16\] .* got \(12, 12\)|\[12, 12\]"),
        ({"num_channels": 2}, "`forecaster` must have num_channels=1 .* got 2"),
        ({"num_output_channels": 2, "first_guess": None}, "`forecaster` must have num_output_channels=1 .* got 2"),
        ({"num_covariates": 2}, "`forecaster` must have num_covariates=0 .* got 2"),
    ],
)
def test_a_forecaster_of_other_frames_is_refused(changes, message):
    pipeline = tiny_pipeline(forecaster=True)
    pipeline.register_modules(forecaster=tiny_forecaster(**changes))
    pipeline.vae.encode = None  # would fail
    with pytest.raises(ValueError, match=message):
        run(pipeline, past())


def test_a_forecaster_and_a_network_that_is_told_belong_together():
    pipeline, told = tiny_pipeline(), tiny_pipeline(forecaster=True)
    with pytest.raises(ValueError, match="condition_channels=4 beside a `forecaster`, got 0"):
        run(PreDiffPipeline.from_pipe(pipeline, forecaster=told.forecaster), past())
    with pytest.raises(ValueError, match="condition_channels=0 without a `forecaster`, got 4"):
        run(PreDiffPipeline(told.vae, told.unet, told.scheduler), past())


def test_a_pipeline_forecasts_the_same_after_saving_and_sharing(tmp_path):
    pipeline, x = tiny_pipeline(forecaster=True, alignment=True), past(1)
    before = run(pipeline, x)
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = PreDiffPipeline.from_pretrained(tmp_path / "saved")
    assert type(loaded.forecaster) is EarthformerForPrediction and not loaded.forecaster.training
    assert torch.equal(run(loaded, x), before)
    sharing.export(pipeline, tmp_path / "shared")
    for shared in (sharing.load(tmp_path / "shared")[1], PreDiffPipeline.from_pretrained(tmp_path / "shared")):
        assert torch.equal(run(shared, x), before)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half/forecaster/model.fp16.safetensors").is_file()
    loaded = PreDiffPipeline.from_pretrained(tmp_path / "half", variant="fp16", dtype={"forecaster": "float16"})
    assert loaded.forecaster.dtype == torch.float16 and loaded.unet.dtype == torch.float32
    without = PreDiffPipeline.from_pretrained(tmp_path / "saved", forecaster=None)
    assert without.forecaster is None


def test_a_hostile_forecaster_is_refused(tmp_path):
    pipeline = tiny_pipeline(forecaster=True)
    pipeline.save_pretrained(tmp_path)
    part = tmp_path / "forecaster"
    (part / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    for load in (PreDiffPipeline.from_pretrained, sharing.load):
        with pytest.raises(ValueError, match="forecaster.* adapter"):
            load(tmp_path)
    (part / "adapter_config.json").unlink()
    (part / "model.safetensors").rename(part / "pytorch_model.bin")
    for load in (PreDiffPipeline.from_pretrained, sharing.load):
        with pytest.raises(ValueError, match="safetensors"):
            load(tmp_path)
    for path in part.iterdir():
        path.unlink()
    part.rmdir()
    with pytest.raises(ValueError, match="the component 'forecaster' is missing"):
        PreDiffPipeline.from_pretrained(tmp_path)


def test_nowcasters_take_such_a_pipeline():
    from earthformer_hf import EarthformerFeatureExtractor

    pipeline, x = tiny_pipeline(forecaster=True), past(1)
    nowcaster = EnsembleNowcaster(pipeline, EarthformerFeatureExtractor(), {}, num_inference_steps=2)
    noise = nowcaster.noise(range(2), 0, 0, (12, 16))
    assert nowcaster.predict(x, x > 0, noise).shape == (2, 2, 12, 16, 1)
    networks = pipeline.vae, pipeline.unet, pipeline.forecaster
    expected = sum(parameter.numel() for network in networks for parameter in network.parameters())
    assert describe(nowcaster)["parameters"] == f"{expected:,}"


# -- training ---------------------------------------------------------------------------------------------------------


def test_encoded_windows_hold_what_the_pipeline_tells(tmp_path):
    pipeline = tiny_pipeline(forecaster=True)
    values = np.random.default_rng(0).uniform(0, 1, (8, 12, 16)).astype("float32")

    def encode(frames):
        return frames.astype("float32"), np.ones(frames.shape, bool)

    windows = Windows([{"id": "a", "values": values}], encode, 3, 2)
    options = {"num_windows": len(windows), "folder": tmp_path, "description": "a test", "seed": 5}
    plain = EncodedWindows(windows, pipeline.vae, **options)
    told = EncodedWindows(windows, pipeline.vae, **options, forecaster=pipeline.forecaster)
    assert told.digest != plain.digest and "condition_latents" not in plain[0]
    for position in range(2 * len(windows)):  # the same draw
        item, other = told[position], plain[position]
        assert all(torch.equal(item[name], other[name]) for name in other)
    past_values = torch.stack([item["past_values"] for item in windows])
    expected = pipeline._condition(past_values).detach()
    torch.testing.assert_close(told.stacked("condition_latents").float(), expected, rtol=2e-3, atol=2e-3)
    again = EncodedWindows([], pipeline.vae, **options, forecaster=pipeline.forecaster)  # from disk
    torch.testing.assert_close(again[3], told[3])
    with torch.no_grad():
        pipeline.forecaster.head.out_proj.bias += 1
    assert EncodedWindows(windows, pipeline.vae, **options, forecaster=pipeline.forecaster).digest != told.digest
