"""The pipeline: members that never change with their company, every scheduler, saving and loading, refusals."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline

from earthformer_hf import EarthformerAlignmentModel, EarthformerUNetModel, KnowledgeAlignmentCallback, PreDiffPipeline
from earthformer_hf.pipeline_hub import _files
from earthformer_hf.pipeline_prediff import MAX_PIXELS, _member_generators
from earthformer_hf.schedules import denoised, noise_levels, posterior_deviation, use_float64_tables


SCALED = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 2e-2}
SCHEDULERS = {
    "ddpm": DDPMScheduler(clip_sample=False, **SCALED),
    "ddim": DDIMScheduler(clip_sample=False, **SCALED),
    "dpm-solver++": DPMSolverMultistepScheduler(**SCALED),
    "unipc": UniPCMultistepScheduler(**SCALED),
    "euler": EulerDiscreteScheduler(**SCALED),
    "flow": FlowMatchEulerDiscreteScheduler(),
}


def past(batch=2, seed=0):
    return torch.rand(batch, 3, 12, 16, 1, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipeline, past_values, **options):
    options = {"generator": seeded(), "num_inference_steps": 3, "output_type": "pt"} | options
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(past_values, **options)


# -- shapes and members -----------------------------------------------------------------------------------------------


def test_output_types_and_shapes():
    pipeline, x = tiny_pipeline(), past()
    output = run(pipeline, x, ensemble_size=3, output_type="np")
    assert isinstance(output.predictions, np.ndarray) and output.predictions.shape == (2, 3, 2, 12, 16, 1)
    assert output.latents.shape == (2, 3, 2, 6, 8, 4)
    as_torch = run(pipeline, x, ensemble_size=3)
    np.testing.assert_array_equal(output.predictions, as_torch.predictions.numpy())
    first, second = run(pipeline, x, ensemble_size=3, output_type="latent", return_dict=False)
    assert torch.equal(first, second) and torch.equal(first, output.latents)
    torch.testing.assert_close(pipeline.decode(first.flatten(0, 1)), as_torch.predictions.flatten(0, 1))


def test_a_list_of_contexts_is_a_batch():
    pipeline, x = tiny_pipeline(), past()
    expected = run(pipeline, x, ensemble_size=2).predictions
    for items in ([x[0], x[1]], [x[:1], x[1:]], [x[0].numpy(), x[1].numpy()]):
        assert torch.equal(run(pipeline, items, ensemble_size=2).predictions, expected)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_member_is_the_same_in_any_company(name):
    """Whatever the batch, the ensemble size and the bound on network calls."""
    pipeline, x = tiny_pipeline(SCHEDULERS[name]), past(3)
    whole = run(pipeline, x, ensemble_size=4).predictions
    assert whole.std(dim=1).mean() > 1e-3  # members differ
    scale = whole.abs().max()
    for options in ({"ensemble_size": 2}, {"ensemble_size": 4, "max_batch_size": 3}):
        part = run(pipeline, x, **options).predictions
        assert (part - whole[:, : part.shape[1]]).abs().max() <= 1e-4 * scale
    for batch in (1, 2):  # fewer samples
        part = run(pipeline, x[:batch], ensemble_size=3).predictions
        assert (part - whole[:batch, :3]).abs().max() <= 1e-4 * scale


def test_two_samples_have_their_own_noise():
    """Independent of each other, and of the first as it was always drawn: from (base, member)."""
    pipeline, x = tiny_pipeline(), past(1)
    start = torch.stack([torch.randn(2, 6, 8, 4, generator=member) for member in _member_generators(seeded(), 3, 40)])
    correlations = torch.corrcoef(start.flatten(1)) - torch.eye(120)
    assert correlations.abs().max() < 0.3  # of 384 numbers each, 5 standard deviations are 0.26
    base = int(torch.randint(2**63 - 1, (1,), generator=seeded()))
    for member in range(3):
        state = np.random.SeedSequence((base, member)).generate_state(1, np.uint64)[0]
        noise = torch.randn(2, 6, 8, 4, generator=torch.Generator().manual_seed(int(state >> np.uint64(1))))
        assert torch.equal(noise, start[member])
    ensembles = run(pipeline, x.expand(2, -1, -1, -1, -1), ensemble_size=3).predictions
    assert not torch.isclose(ensembles[0], ensembles[1]).all((1, 2, 3, 4)).any()


def test_a_list_of_generators_gives_each_member_its_own():
    pipeline, x = tiny_pipeline(SCHEDULERS["ddpm"]), past(2)
    together = run(pipeline, x, ensemble_size=2, generator=[seeded(i) for i in range(4)]).predictions
    for b in range(2):
        for k in range(2):
            alone = run(pipeline, x[b : b + 1], ensemble_size=1, generator=seeded(2 * b + k)).predictions
            torch.testing.assert_close(together[b, k], alone[0, 0], rtol=1e-4, atol=1e-5)
    as_list = run(pipeline, x[:1], ensemble_size=1, generator=[seeded(7)]).predictions
    assert torch.equal(as_list, run(pipeline, x[:1], ensemble_size=1, generator=seeded(7)).predictions)


def test_without_a_generator_torchs_own_seed_counts():
    pipeline, x = tiny_pipeline(), past(1)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(pipeline, x, ensemble_size=1, generator=None).latents)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_given_latents_are_the_initial_noise():
    pipeline, x = tiny_pipeline(), past(1)
    noise = torch.randn(1, 2, 2, 6, 8, 4, generator=seeded(3))
    first = run(pipeline, x, ensemble_size=2, latents=noise, generator=seeded(1)).latents
    assert torch.equal(first, run(pipeline, x, ensemble_size=2, latents=noise, generator=seeded(2)).latents)
    swapped = run(pipeline, x, ensemble_size=2, latents=noise.flip(1)).latents
    torch.testing.assert_close(swapped, first.flip(1), rtol=1e-4, atol=1e-5)


def test_eta_adds_noise_to_ddim():
    pipeline, x = tiny_pipeline(), past(1)
    plain, noisy = (run(pipeline, x, ensemble_size=1, eta=eta).latents for eta in (0.0, 1.0))
    assert not torch.allclose(plain, noisy)


def test_the_context_is_encoded_once():
    pipeline, calls = tiny_pipeline(), []
    encode = pipeline.vae.encode
    pipeline.vae.encode = lambda images: calls.append(len(images)) or encode(images)
    run(pipeline, past(2), ensemble_size=5, num_inference_steps=4)
    assert calls == [2 * 3]  # one call, one image per context frame


def test_no_network_call_exceeds_the_bound():
    pipeline, sizes = tiny_pipeline(), []
    pipeline.unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(output[0])))
    run(pipeline, past(2), ensemble_size=4, num_inference_steps=2, max_batch_size=3)
    assert sizes == [3, 3, 2] * 2


def test_no_autoencoder_call_exceeds_its_bound(monkeypatch):
    """By default a number of pixels; and what goes through in parts is the same to the last bit."""
    pipeline, x, sizes = tiny_pipeline(), past(2), []
    whole = run(pipeline, x, ensemble_size=3)
    for half in (pipeline.vae.encoder, pipeline.vae.decoder):
        half.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    expected = {5: [3, 3] + [4, 4, 4], 4: [3, 3] + [4, 4, 4], 2: [2] * 3 + [2] * 6}
    for images, calls in expected.items():
        monkeypatch.setattr("earthformer_hf.pipeline_prediff.MAX_PIXELS", 12 * 16 * images + 1)
        sizes.clear()
        assert torch.equal(run(pipeline, x, ensemble_size=3).predictions, whole.predictions)
        assert sizes == calls
    monkeypatch.undo()
    assert MAX_PIXELS == 16 * 128 * 128
    sizes.clear()
    run(pipeline, x, ensemble_size=3, max_batch_size=2)
    assert sizes == [6] + [4, 4, 4]  # 2 samples of 3 frames, 2 members of 2 frames


def test_latents_lose_nothing_between_steps():
    """float32 whatever the network computes in, as callbacks see them."""
    pipeline, x, seen = tiny_pipeline(), past(1), []
    noise = torch.randn(1, 1, 2, 6, 8, 4, generator=seeded())
    pipeline.unet.register_forward_hook(lambda module, inputs, output: (0 * output[0],))  # and so exact in any dtype
    expected = run(pipeline, x, ensemble_size=1, latents=noise, num_inference_steps=20).latents
    pipeline.unet.to(torch.bfloat16)

    def callback(pipe, step, timestep, tensors):
        seen.extend(tensor.dtype for tensor in tensors.values())
        return {}

    names = ["latents", "noisy_latents", "denoised_latents"]
    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    output = run(pipeline, x, ensemble_size=1, latents=noise, num_inference_steps=20, **options)
    assert torch.equal(output.latents, expected) and set(seen) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    pipeline, x = tiny_pipeline(), past(1)
    exact = run(pipeline, x, ensemble_size=1).predictions
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(run(pipeline, x, ensemble_size=1).predictions.float(), exact, rtol=0.1, atol=0.1)
    output = run(pipeline.to(dtype), x, ensemble_size=1)
    assert output.latents.dtype == torch.float32  # whatever the networks compute in
    torch.testing.assert_close(output.predictions.float(), exact, rtol=0.1, atol=0.1)


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_a_callback_sees_and_changes_the_step():
    pipeline, seen = tiny_pipeline(), []
    names = ["latents", "noisy_latents", "denoised_latents", "context_latents", "past_values"]

    def callback(pipe, step, timestep, tensors):
        seen.append({name: tensors[name].clone() for name in names} | {"timestep": timestep})
        return {"latents": tensors["latents"] + 1}

    x = past(2)
    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    output = run(pipeline, x, ensemble_size=2, **options)
    assert torch.equal(output.latents, seen[-1]["latents"] + 1)
    assert torch.equal(seen[1]["noisy_latents"], seen[0]["latents"] + 1)
    assert seen[0]["latents"].shape == (2, 2, 2, 6, 8, 4) and seen[0]["context_latents"].shape == (2, 3, 6, 8, 4)
    assert torch.equal(seen[0]["past_values"], x)
    # DDIM's last step lands on what the network takes for the clean sample
    torch.testing.assert_close(seen[-1]["denoised_latents"], seen[-1]["latents"], rtol=1e-3, atol=1e-3)


def test_interrupt_leaves_out_the_rest():
    pipeline, steps = tiny_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    run(pipeline, past(1), ensemble_size=1, num_inference_steps=5, callback_on_step_end=callback)
    assert steps == [0, 1]


def test_an_exception_leaves_no_state_behind():
    pipeline, x = tiny_pipeline(), past(1)
    expected = run(pipeline, x, ensemble_size=2).predictions

    def callback(pipe, step, timestep, tensors):
        assert pipe.max_batch_size == 1 and pipe.num_timesteps == 3
        pipe._interrupt = True
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipeline, x, ensemble_size=2, max_batch_size=1, callback_on_step_end=callback)
    assert pipeline.max_batch_size is None and not pipeline.interrupt
    assert torch.equal(run(pipeline, x, ensemble_size=2).predictions, expected)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda latents: {"latents": latents[:, :1]},
            r"`latents` of.*\(1, 2, 2, 6, 8, 4\).*\(1, 1, 2, 6",
        ),
        (lambda latents: {"latents": latents.double()}, r"`latents` of.*float32.*float64"),
        (lambda latents: {"latents": latents.to("meta")}, r"`latents` of.*cpu.*meta"),
        (lambda latents: {"latents": latents.numpy()}, r"`latents` of.*ndarray"),
        (lambda latents: {"context_latents": latents}, r"`context_latents` of.*\(1, 3, 6, 8, 4\)"),
        (lambda latents: None, "must return a dict of tensors, got NoneType"),
    ],
)
def test_what_a_callback_returns_is_checked(answer, message):
    def callback(pipe, step, timestep, tensors):
        return answer(tensors["latents"])

    with pytest.raises(ValueError, match=message):
        run(tiny_pipeline(), past(1), ensemble_size=2, callback_on_step_end=callback)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_call_leaves_the_pipeline_and_its_scheduler_as_they_were(name):
    pipeline, x = tiny_pipeline(SCHEDULERS[name]), past(1)
    run(pipeline, x, ensemble_size=1)  # which sets the progress bar
    before, tables = dict(vars(pipeline)), copy.deepcopy(vars(pipeline.scheduler))
    run(pipeline, x, ensemble_size=2, num_inference_steps=4, max_batch_size=1)
    assert vars(pipeline) == before and vars(pipeline.scheduler).keys() == tables.keys()
    assert all(np.array_equal(value, tables[name]) for name, value in vars(pipeline.scheduler).items())


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_are_those_of_the_scheduler(name):
    """A clean sample noised to a level comes back from the true model output, and one exact step ends on it."""
    scheduler = type(SCHEDULERS[name]).from_config(SCHEDULERS[name].config)
    use_float64_tables(scheduler)
    scheduler.set_timesteps(1)
    levels = noise_levels(scheduler)
    clean, noise = torch.randn(2, 4, 3, generator=seeded())
    alpha, sigma = levels[0]
    noisy = (alpha * clean + sigma * noise).float()
    truth = noise - clean if name == "flow" else noise
    torch.testing.assert_close(denoised(scheduler, levels[0], truth, noisy), clean, rtol=1e-3, atol=2e-3)
    if hasattr(scheduler, "scale_model_input"):
        scaled = scheduler.scale_model_input(noisy, scheduler.timesteps[0])
        torch.testing.assert_close(scaled, noisy / levels[0].norm().float(), rtol=1e-4, atol=1e-4) if (
            name == "euler"
        ) else None
    after = scheduler.step(truth, scheduler.timesteps[0], noisy).prev_sample
    assert levels[1].tolist() == [1.0, 0.0]
    if name != "ddpm":  # which stops short of its end on a shortened schedule
        torch.testing.assert_close(after, clean, rtol=1e-3, atol=2e-3)


def test_posterior_deviation_is_that_of_ddpm():
    scheduler = DDPMScheduler(clip_sample=False, **SCALED)
    use_float64_tables(scheduler)
    scheduler.set_timesteps(1000)
    levels = noise_levels(scheduler)
    for step in (0, 1, 500, 998, 999):
        variance = scheduler._get_variance(scheduler.timesteps[step])
        assert posterior_deviation(levels[step], levels[step + 1]) == pytest.approx(float(variance**0.5), rel=1e-6)


# -- saving and loading -----------------------------------------------------------------------------------------------


def test_a_saved_pipeline_forecasts_the_same(tmp_path):
    pipeline, x = tiny_pipeline(alignment=True), past(1)
    pipeline.save_pretrained(tmp_path)
    loaded = PreDiffPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is EarthformerUNetModel and type(loaded.alignment) is EarthformerAlignmentModel
    assert torch.equal(run(loaded, x).predictions, run(pipeline, x).predictions)
    assert not loaded.unet.training
    guide = KnowledgeAlignmentCallback.from_pretrained(tmp_path, target=1.0, guidance_scale=3.0)
    assert guide.guidance_scale == 3.0 and type(guide.alignment) is EarthformerAlignmentModel


def test_float64_tables_are_not_saved(tmp_path):
    pipeline, dtypes = tiny_pipeline(SCHEDULERS["ddpm"]), set()

    def callback(pipe, step, timestep, tensors):
        dtypes.add(pipe.scheduler.alphas_cumprod.dtype)
        return {}

    run(pipeline, past(1), ensemble_size=1, callback_on_step_end=callback)
    assert dtypes == {torch.float64} and pipeline.scheduler.alphas_cumprod.dtype == torch.float32
    pipeline.save_pretrained(tmp_path / "used")
    tiny_pipeline(DDPMScheduler(clip_sample=False, **SCALED)).save_pretrained(tmp_path / "fresh")
    used, fresh = ((tmp_path / name / "scheduler/scheduler_config.json").read_text() for name in ("used", "fresh"))
    assert used == fresh


def test_variants_dtypes_and_given_components(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    loaded = PreDiffPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype={"unet": torch.bfloat16})
    assert loaded.unet.dtype == torch.bfloat16 and loaded.vae.dtype == torch.float32
    assert run(loaded, past(1)).predictions.isfinite().all()
    scheduler = SCHEDULERS["unipc"]
    assert PreDiffPipeline.from_pretrained(tmp_path, variant="fp16", scheduler=scheduler).scheduler is scheduler


def test_a_pipeline_from_another_shares_its_components():
    pipeline = tiny_pipeline(alignment=True)
    other = PreDiffPipeline.from_pipe(pipeline)
    assert type(other) is PreDiffPipeline and other.components.keys() == pipeline.components.keys()
    assert all(other.components[name] is component for name, component in pipeline.components.items())
    assert PreDiffPipeline.from_pipe(pipeline, scheduler=SCHEDULERS["unipc"]).scheduler is SCHEDULERS["unipc"]
    assert PreDiffPipeline.from_pipe(tiny_pipeline()).alignment is None


def test_habits_of_diffusers_users_are_obeyed_or_refused_by_name(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    for habit in ({"use_safetensors": True}, {"low_cpu_mem_usage": False}, {"disable_mmap": True}):
        loaded = PreDiffPipeline.from_pretrained(tmp_path, **habit)
        assert all(map(torch.equal, loaded.unet.state_dict().values(), pipeline.unet.state_dict().values()))
    refused = {"use_safetensors": False, "custom_pipeline": "x", "safety_checker": None, "dtype": "float33"}
    for name, value in refused.items():
        with pytest.raises(ValueError, match=name):
            PreDiffPipeline.from_pretrained(tmp_path, **{name: value})


def test_the_arguments_of_diffusers_do_what_they_do_there(tmp_path):
    pipeline, x = tiny_pipeline(alignment=True), past(1)
    pipeline.save_pretrained(tmp_path)
    expected = run(pipeline, x, ensemble_size=2).predictions
    for options in ({"device_map": "cpu"}, {"device_map": "balanced", "max_memory": {"cpu": "1GB"}}):
        loaded = PreDiffPipeline.from_pretrained(tmp_path, **options)
        assert torch.equal(run(loaded, x, ensemble_size=2).predictions, expected)
        guide = KnowledgeAlignmentCallback(5.0)
        assert run(loaded, x, ensemble_size=1, callback_on_step_end=guide).predictions.isfinite().all()
    assert PreDiffPipeline.from_pretrained(tmp_path, device_map="cpu").hf_device_map == "cpu"
    with pytest.raises(NotImplementedError, match="elsewhere not supported"):
        PreDiffPipeline.from_pretrained(tmp_path, device_map="elsewhere")
    with pytest.raises(ValueError, match="PipelineQuantizationConfig"):
        PreDiffPipeline.from_pretrained(tmp_path, quantization_config={"unet": "int8"})

    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16, {"default": "bfloat16"}):
        for name in ("dtype", "torch_dtype"):
            loaded = PreDiffPipeline.from_pretrained(tmp_path, **{name: dtype})
            assert {loaded.vae.dtype, loaded.unet.dtype, loaded.alignment.dtype} == {torch.bfloat16}
    loaded = PreDiffPipeline.from_pretrained(tmp_path, dtype={"unet": "float16"}, alignment=None)
    assert loaded.unet.dtype == torch.float16 and loaded.vae.dtype == torch.float32 and loaded.alignment is None


def test_only_the_weights_of_one_variant_are_downloaded(tmp_path):
    pipeline, hub = tiny_pipeline(), tmp_path / "hub"
    for variant in (None, "fp16"):
        pipeline.save_pretrained(hub, variant=variant)
        pipeline.unet.save_pretrained(hub / "unet", variant=variant, max_shard_size="40KB")
        pipeline.unet.save_pretrained(hub / "unet/checkpoint", variant=variant)
    (hub / "unet/diffusion_pytorch_model.bin").touch()
    stored = [path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()]
    for variant, stem in ((None, "diffusion_pytorch_model"), ("fp16", "diffusion_pytorch_model.fp16")):
        files = set(filter_repo_objects(stored, allow_patterns=_files(["vae", "unet", "scheduler"], variant)))
        weights = {name for name in files if not name.endswith(".json")}
        shards = {name for name in stored if re.fullmatch(rf"unet/{stem}-\d+-of-\d+.safetensors", name)}
        assert len(shards) > 1 and weights == {f"{name}/{stem}.safetensors" for name in ("vae", "unet")} | shards
        for name in files:
            target = tmp_path / str(variant) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(hub / name)
        loaded = PreDiffPipeline.from_pretrained(tmp_path / str(variant), variant=variant)  # they are enough
        assert all(map(torch.equal, loaded.unet.state_dict().values(), pipeline.unet.state_dict().values()))
    given = filter_repo_objects(stored, allow_patterns=_files(["vae", "scheduler"], None))
    assert not any(name.startswith("unet") for name in given)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["out_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="out_proj.weight"):
        PreDiffPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_index.json"):
        PreDiffPipeline.from_pretrained(tmp_path / "unet")


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    pipeline.unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    PreDiffPipeline.from_pretrained(tmp_path)  # with safetensors beside them
    (tmp_path / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold safetensors.*diffusion_pytorch_model\.bin"):
        PreDiffPipeline.from_pretrained(tmp_path)
    pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="40KB")
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    weights = {name: "diffusion_pytorch_model.bin" for name in pipeline.unet.state_dict()}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    with pytest.raises(ValueError, match=r"must hold safetensors.*diffusion_pytorch_model\.bin"):
        PreDiffPipeline.from_pretrained(tmp_path)


def test_code_beside_the_weights_is_never_run(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    for name in ("pipeline_prediff.py", "unet/unet_earthformer.py", "unet/evil.py"):
        (tmp_path / name).write_text("raise SystemExit('this ran')")
    index = (tmp_path / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index.replace("earthformer_hf.unet_earthformer", "evil"))
    (tmp_path / "None.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(
        ValueError, match="trust_remote_code"
    ):  # what diffusers takes for the file of `custom_pipeline`
        PreDiffPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    (tmp_path / "None.py").unlink()
    loaded = PreDiffPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is PreDiffPipeline and type(loaded.unet) is EarthformerUNetModel


@pytest.mark.parametrize("path", ["None.py", "unet/earthformer_hf.unet_earthformer.py", "vae/diffusers.py"])
def test_code_where_diffusers_looks_for_it_is_not_run_either(path, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / path).write_text("raise SystemExit('this ran')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        PreDiffPipeline.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("scheduler", ["os", "system"], "'system' is no scheduler of diffusers"),
        ("scheduler", ["diffusers", "AutoencoderKL"], "'AutoencoderKL' is no scheduler"),
        ("unet", "evil", "'unet' must be a pair of names, got 'evil'"),
        ("unet", ["evil"], "'unet' must be a pair of names"),
        ("unet", [None, None], "expected .*'unet'"),
        ("_class_name", ["evil", "Pipeline"], None),
        ("vae", ["os", "system"], None),
        ("extra", ["os", "system"], None),
    ],
)
def test_what_an_index_names_is_never_imported(name, entry, message, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: entry}))
    if message is None:
        assert type(PreDiffPipeline.from_pretrained(tmp_path).vae) is AutoencoderKL
    else:
        with pytest.raises(ValueError, match=message):
            PreDiffPipeline.from_pretrained(tmp_path)


# -- bad input --------------------------------------------------------------------------------------------------------

NOISE = torch.zeros(2, 8, 2, 6, 8, 4)


@pytest.mark.parametrize(
    ("past_values", "options", "message"),
    [
        (past()[:, :2], {}, r"\(at least 1, 3, 12, 16, 1\), got \(2, 2, 12, 16, 1\)"),
        (past()[:, :, :8], {}, r"got \(2, 3, 8, 16, 1\)"),
        (past()[0], {}, r"got \(3, 12, 16, 1\)"),
        (past()[:0], {}, r"got \(0, 3, 12, 16, 1\)"),
        (past().long(), {}, "floating point"),
        (past() * float("nan"), {}, "finite"),
        ([past()[0], past()[0, :2]], {}, "arrays of one shape"),
        ([], {}, "arrays of one shape"),
        (past(), {"ensemble_size": 0}, "`ensemble_size`"),
        (past(), {"num_inference_steps": 0}, "`num_inference_steps`"),
        (past(), {"max_batch_size": 0}, "`max_batch_size`"),
        (past(), {"generator": [seeded()] * 3}, "2 samples x 8 members = 16, got 3"),
        (past(), {"latents": NOISE[:, :4]}, r"\(2, 8, 2, 6, 8, 4\), got \(2, 4, 2, 6, 8, 4\)"),
        (past(), {"output_type": "pil"}, "`output_type`"),
        (past(), {"ensemble_size": True}, "`ensemble_size` must be an integer of at least 1, got True"),
        (past(), {"ensemble_size": 2.0}, "`ensemble_size`"),
        (past(), {"num_inference_steps": 1001}, "num_inference_steps"),
        (past(), {"eta": 2.0}, "`eta` must be a number from 0 to 1, got 2.0"),
        (past(), {"eta": float("nan")}, "`eta`"),
        (past(), {"generator": 3}, "torch.Generator"),
        (past(), {"latents": NOISE.numpy()}, "`latents`"),
        (past(), {"latents": NOISE * float("nan")}, "`latents`"),
        (None, {}, "`past_values`"),
        ("rain", {}, "`past_values`"),
        (past(), {"callback_on_step_end_tensor_inputs": ["unet"]}, "unet"),
    ],
)
def test_bad_input_is_refused_before_any_computation(past_values, options, message):
    pipeline = tiny_pipeline()
    pipeline.vae.encode = None  # would fail
    with pytest.raises(ValueError, match=message):
        run(pipeline, past_values, **options)


def test_numbers_of_numpy_are_numbers():
    pipeline, x = tiny_pipeline(), past(1)
    options = {"ensemble_size": np.int64(2), "num_inference_steps": np.int32(2), "max_batch_size": np.int64(1)}
    expected = run(pipeline, x, ensemble_size=2, num_inference_steps=2, max_batch_size=1).predictions
    assert torch.equal(run(pipeline, x, **options).predictions, expected)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, LCMScheduler])
def test_noise_cannot_be_predicted_from_noise_alone(scheduler):
    """At a zero terminal signal-to-noise ratio: 0 / 0, so an ensemble of NaN."""
    options = SCALED | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline = tiny_pipeline(scheduler(**options))
    pipeline.vae.encode = None  # would fail
    with pytest.raises(ValueError, match=f"`scheduler`: {scheduler.__name__} begins with noise alone.*'v_prediction'"):
        run(pipeline, past(1))
    for changes in ({"prediction_type": "v_prediction"}, {"timestep_spacing": "leading"}):
        working = tiny_pipeline(DDIMScheduler(clip_sample=False, **(options | changes)))
        assert run(working, past(1), ensemble_size=1).predictions.isfinite().all()


def test_an_ensemble_that_is_not_finite_is_no_forecast():
    options = SCALED | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline = tiny_pipeline(DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **options))
    pipeline.vae.decode = None  # would fail
    with pytest.raises(ValueError, match="not finite after 5 steps of DDIMScheduler with eta=1.0"):
        run(pipeline, past(1), ensemble_size=1, num_inference_steps=5, eta=1.0)


def test_networks_that_do_not_fit_are_refused():
    pipeline = tiny_pipeline(in_channels=5)
    with pytest.raises(ValueError, match="5 channels, `vae` gives 4"):
        run(pipeline, past())


def test_a_training_step_on_inputs_without_gradient_survives():
    """GroupNorm's backward on the CPU ends the process where its input is permuted and needs no gradient."""
    code = """
import torch
from earthformer_hf import EarthformerAlignmentModel, EarthformerUNetModel
unet = EarthformerUNetModel((4, 4), 2, 1, 3, (8,), 1, 2)
alignment = EarthformerAlignmentModel((4, 4), 2, 1, block_out_channels=(8,), num_attention_heads=2)
for network, context in ((unet, [torch.randn(2, 2, 4, 4, 3)]), (alignment, [])):
    sample = torch.randn(2, network.config.prediction_length, 4, 4, network.config.in_channels)
    network(sample, 5, *context, return_dict=False)[0].sum().backward()
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_gradient_checkpointing_gives_the_same_gradients():
    unet = tiny_pipeline().unet.train()
    sample, context = torch.randn(1, 2, 6, 8, 4), torch.randn(1, 3, 6, 8, 4)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet.zero_grad()
        torch.manual_seed(0)
        unet(sample, 5, context).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in unet.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)
