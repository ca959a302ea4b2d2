"""The training script on tiny files: it learns, and a run that was interrupted ends like one that was not."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from local_hub import USER, LocalHub
from safetensors.torch import load_file
from test_data import write_radar, write_sst
from tiny import ROOT, tiny_forecaster, tiny_model

from earthformer_hf import KnowledgeAlignmentCallback, PreDiffPipeline
from earthformer_hf.schedules import denoised, noise_for_training
from earthformer_hf.training import Run, TrainingArguments
from earthformer_hf.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from earthformer_hf.training.losses import intensity_weighted_mse, laplace_loss, soft_csi_loss
from earthformer_hf.training.optimization import Muon, optimizers_of, orthogonalized


FIXTURES = ROOT / "tests/fixtures/parity"


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_soft_csi_is_the_csi_of_sharp_forecasts_and_pays_for_raising_a_miss():
    random = np.random.default_rng(0)
    future, forecast = (torch.tensor(random.uniform(0, 1, (2, 3, 8, 8, 1)), dtype=torch.float32) for _ in range(2))
    observed = torch.tensor(random.uniform(size=future.shape) > 0.2)
    thresholds = [0.25, 0.7]
    found = []
    for threshold in thresholds:
        told, happened = (x.numpy()[observed.numpy()] >= threshold for x in (forecast, future))
        found.append((told & happened).sum() / (told | happened).sum())
    loss = soft_csi_loss(forecast, future.masked_fill(~observed, torch.nan), observed, [*thresholds, 2.0], width=1e-6)
    assert loss.item() == pytest.approx(1 - np.mean(found), abs=1e-6)  # 2.0 never occurs, and does not count
    miss = torch.full((1, 1, 1, 1, 1), 0.6, requires_grad=True)
    soft_csi_loss(miss, torch.ones(1, 1, 1, 1, 1), torch.ones(1, dtype=torch.bool), [0.7]).backward()
    assert miss.grad.item() < 0
    assert soft_csi_loss(forecast, future, torch.zeros_like(observed), thresholds).item() == 0


def test_intensity_weighted_loss():
    prediction, future = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.5, float("nan"), 1.0]])
    observed = torch.tensor([[True, False, True]])
    loss = intensity_weighted_mse(prediction, future, observed, 2.0)
    assert loss == pytest.approx((0.25 * (1 + 2 * 0.5) + 4 * (1 + 2 * 1.0)) / 2)
    cubed = intensity_weighted_mse(prediction, future, observed, 2.0, 3.0)
    assert cubed == pytest.approx((0.25 * (1 + 2 * 0.125) + 4 * (1 + 2 * 1.0)) / 2)
    plain = intensity_weighted_mse(prediction, future.nan_to_num(), torch.ones(1, 3, dtype=torch.bool), 0.0)
    assert plain == pytest.approx((0.25 + 1 + 4) / 3)
    frames = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1, 1)
    early = intensity_weighted_mse(
        frames, torch.zeros_like(frames), torch.ones(1, dtype=torch.bool), 0.0, lead_power=1
    )
    assert early == pytest.approx((1 * 4 / 3 + 4 * 2 / 3) / 2)  # weights 1 and 1/2, of mean 1


def test_orthogonalized_matrices_keep_their_directions():
    torch.manual_seed(0)
    matrices = torch.randn(3, 6, 10)
    left, values, right = torch.linalg.svd(orthogonalized(matrices), full_matrices=False)
    assert 0.6 < values.min() and values.max() < 1.3
    expected_left, _, expected_right = torch.linalg.svd(matrices, full_matrices=False)
    nearest = expected_left @ expected_right  # all singular values 1
    assert (orthogonalized(matrices) - nearest).norm() < 0.35 * nearest.norm()
    torch.testing.assert_close(orthogonalized(matrices.mT), orthogonalized(matrices).mT)


def test_muon_steps_as_torch_does():
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 2, 3), torch.randn(3, 4, 2, 3)  # a convolution's weight, taken as 4 x 6
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())
    optimizers = [
        Muon([ours], lr=0.1, weight_decay=0.5),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
    ]
    for gradient in gradients:
        ours.grad, theirs.grad = gradient, gradient.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start.flatten(1)).norm()
    assert (ours.flatten(1) - theirs).norm() < 0.02 * moved  # theirs is in bfloat16
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_averaged_weights_as_recorded(tmp_path):
    tensors = load_file(FIXTURES / "ema.safetensors")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))

    def fill(prefix):
        start = f"input/{prefix}."
        stored = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
        model.load_state_dict(stored, strict=prefix == "init")

    fill("init")
    model[0].bias.requires_grad_(False)  # what does not learn is not recorded
    run = Run(TrainingArguments(str(tmp_path), ema_decay=0.9999))
    run.prepare(model)
    for step in range(5):
        fill(f"step{step}")
        run.ema.step(model.parameters())
        for (name, parameter), ours in zip(model.named_parameters(), run.ema.shadow_params):
            if not parameter.requires_grad:
                continue
            torch.testing.assert_close(ours, tensors[f"output/step{step}.{name.replace('.', '')}"])


def test_learning_rates_as_recorded(tmp_path):
    rates = load_file(FIXTURES / "lr_schedule_sevir.safetensors")["output/lr"]
    run = Run(
        TrainingArguments(
            str(tmp_path), max_steps=50, warmup_steps=10, learning_rate=1e-3, min_lr_rate=1e-3, optimizer="adamw"
        )
    )
    run.prepare(torch.nn.Linear(1, 1))
    ours = []
    for _ in rates:
        ours.append(run.schedules[0].get_last_lr()[0])
        run.optimizers[0].step()
        run.schedules[0].step()
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), rates, rtol=1e-9, atol=0)


def test_adamw_decays_no_norm_and_no_bias():
    model = tiny_model()
    arguments = TrainingArguments(optimizer="adamw", learning_rate=1e-3, weight_decay=0.1, position_rate=3.0)
    (optimizer,) = optimizers_of(model, arguments)
    names = {parameter: name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(name)
            norm = isinstance(modules[name.rpartition(".")[0]], torch.nn.LayerNorm)
            assert group["weight_decay"] == (0 if norm or "bias" in name else 0.1), name
            assert group["lr"] == pytest.approx(3e-3 if "position" in name else 1e-3), name
    assert seen == set(names.values())


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(prediction_type="epsilon"),
        DDPMScheduler(prediction_type="sample"),
        DDPMScheduler(prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=["noise", "x0", "v", "flow"],
)
def test_a_network_that_says_the_target_knows_the_clean_sample(scheduler):
    clean, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    share = torch.tensor([0.0, 0.5, 0.9])
    noisy, timestep, target = noise_for_training(scheduler, clean, noise, share)
    for b in range(3):
        if "FlowMatch" in type(scheduler).__name__:
            level = torch.tensor([1 - share[b], share[b]])
        else:
            assert timestep[b] == int(share[b] * 1000)
            product = scheduler.alphas_cumprod[timestep[b]]
            level = torch.stack([product.sqrt(), (1 - product).sqrt()])
        torch.testing.assert_close(noisy[b], level[0] * clean[b] + level[1] * noise[b])
        torch.testing.assert_close(denoised(scheduler, level, target[b], noisy[b]), clean[b], rtol=1e-4, atol=1e-4)


def test_laplace_loss_is_a_likelihood_of_observed_values():
    values, observed = torch.tensor([[1.0, 2.0, float("nan")], [0.0, 0.0, 3.0]]), torch.tensor([[True, True, False]])
    predictions = torch.tensor([[0.0, 2.5, 7.0], [1.0, 0.0, 9.0]])
    log_variance = torch.tensor(0.5, requires_grad=True)
    loss = laplace_loss(predictions, values, observed, log_variance)
    assert loss.item() == pytest.approx((2.5 / np.exp(0.5) + 4 * 0.5) / 2)
    loss.backward()
    assert log_variance.grad.item() == pytest.approx((4 - 2.5 / np.exp(0.5)) / 2)


def test_the_discriminator_judges_patches():
    judge = PatchDiscriminator(1, channels=4)
    pictures = torch.rand(2, 1, 64, 64, requires_grad=True)
    (judgement,) = judge(pictures)
    assert judgement.shape == (2, 1, 6, 6)
    judge.eval()
    (grid,) = torch.autograd.grad(judge(pictures)[0][0, 0, 3, 3], pictures)
    touched = grid[0, 0].nonzero()
    assert (touched.max(0).values - touched.min(0).values < 70).all() and grid[1].abs().sum() == 0
    assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_763_585
    assert hinge_loss(torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0])).item() == pytest.approx(0.5 * (0.25 + 0.5))


def test_the_game_moves_the_last_layer_as_much_as_the_reconstruction():
    weight = torch.tensor([2.0, 1.0], requires_grad=True)
    reconstruction, game = (3 * weight).sum(), (weight * torch.tensor([0.0, 0.5])).sum()
    expected = np.sqrt(18) / (0.5 + 1e-4)
    assert adaptive_weight(reconstruction, game, weight).item() == pytest.approx(expected)
    assert adaptive_weight(reconstruction, 0 * game, weight).item() == 1e4


def train(folder, *options, script="train_earthformer", **further):
    command = [sys.executable, str(ROOT / f"examples/{script}.py"), "--recipe", str(folder / "recipe.yaml"), *options]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""} | further
    environment |= {"EARTHFORMER_HF_DATA": str(folder), "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stderr + result.stdout


def write_ocean_recipe(folder):
    """`recipe.yaml` of a tiny model, and the data that it learns from."""
    write_sst(folder / "sst.nc", "1968-06", 12 * 12, signal=lambda month: np.sin(month / 4))
    recipe = {
        "model": {
            "context_length": 4, "prediction_length": 3, "image_size": [24, 48], "hidden_sizes": [8],
            "encoder_depths": [1], "decoder_depths": [1], "num_attention_heads": 2, "num_global_vectors": 0,
            "stem_channels": [8], "stem_strides": [4], "stem_num_convs": 1, "head_num_convs": 1,
        },
        "feature_extractor": {"scale": 1.0, "fill_value": 0},
        "data": {"source": "open-sst", "options": {"file": "sst.nc"}, "gain": 1.5, "mix": True, "eval_stride": 20},
        "training": {
            "max_steps": 40, "batch_size": 2, "warmup_steps": 2, "eval_every": 20, "save_every": 5,
            "learning_rate": 5e-3, "ema_decay": 0.9,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    write_ocean_recipe(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    log = train(tmp_path, "--output_dir", str(whole))
    assert log.count("validation") == 2
    train(tmp_path, "--output_dir", str(parts), "--stop_at", "13")
    train(tmp_path, "--output_dir", str(parts), "--stop_at", "27")
    train(tmp_path, "--output_dir", str(parts))
    assert_same(whole, parts, "checkpoints/last/model.safetensors", "model.safetensors")  # the last, the best averaged


@pytest.mark.slow
def test_the_best_model_and_its_card_are_pushed(tmp_path):
    write_ocean_recipe(tmp_path)
    with LocalHub() as local_hub:
        environment = local_hub.environment(tmp_path / "home")
        options = ("--output_dir", str(tmp_path / "run"), "--max_steps", "20", "--push_to_hub", f"{USER}/ocean")
        train(tmp_path, *options, **environment)
        pushed = local_hub.commit_of("models", f"{USER}/ocean", "main").files
    assert {"model.safetensors", "config.json", "preprocessor_config.json"} < pushed.keys()
    for name in ("model.safetensors", "README.md"):
        assert pushed[name] == (tmp_path / "run" / name).read_bytes(), name
    assert b"Kept: step 20" in pushed["README.md"] and b"open-sst: " in pushed["README.md"]


def assert_same(whole, parts, *files):
    """Two output folders hold the same weights, bit for bit, and the same progress."""
    for file in files:
        one, other = (load_file(folder / file) for folder in (whole, parts))
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    one, other = ((folder / "checkpoints/last/progress.json").read_text() for folder in (whole, parts))
    assert one == other


@pytest.mark.slow
def test_a_diffusion_pipeline_is_trained_in_three_steps_that_resume(tmp_path):
    write_radar(tmp_path / "radar.h5", [(0, 0), (4, 6)])
    with h5py.File(tmp_path / "radar.h5", "a") as file:
        file["mrms_test/tiles_val"] = np.array([(8, 8)], "int32")
    steps = {"max_steps": 12, "batch_size": 2, "warmup_steps": 2, "eval_every": 6, "save_every": 3, "ema_decay": 0.9}
    recipe = {
        "vae": {
            "in_channels": 1, "out_channels": 1, "block_out_channels": [4, 8], "norm_num_groups": 2,
            "latent_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        },
        "unet": {
            "sample_size": [4, 4], "context_length": 2, "prediction_length": 1, "block_out_channels": [8],
            "layers_per_block": 1, "num_attention_heads": 2, "dropout": 0.1,
        },
        "alignment_network": {"block_out_channels": [8], "num_attention_heads": 2},
        "scheduler": {"class": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False},
        "feature_extractor": {"scale": 1 / 255, "missing_value": 255, "fill_value": 0, "thresholds": [20, 100]},
        "data": {
            "source": "open-radar", "options": {"file": "radar.h5"}, "turn": True, "frame_stride": 2, "eval_stride": 1,
            "heavy_threshold": 100,
        },
        "autoencoder": steps,
        "denoiser": steps | {"vae": str(tmp_path / "vae-parts")},
        "alignment": steps | {"guided_weight": 0.5},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for kind, stage, files in (
        ("vae", "train_autoencoder", ["diffusion_pytorch_model.safetensors"]),
        ("unet", "train_unet", ["unet/diffusion_pytorch_model.safetensors"]),
        ("alignment", "train_alignment", []),
    ):
        whole, parts = tmp_path / f"{kind}-whole", tmp_path / f"{kind}-parts"
        options = ["--pipeline", str(tmp_path / "unet-parts")] if kind == "alignment" else []
        train(tmp_path, "--output_dir", str(whole), *options, script=stage)
        train(tmp_path, "--output_dir", str(parts), *options, "--stop_at", "7", script=stage)
        train(tmp_path, "--output_dir", str(parts), *options, script=stage)
        assert_same(whole, parts, "checkpoints/last/model.safetensors", *files)
    figures = sorted(path.name for path in (tmp_path / "unet-parts/figures").iterdir())
    assert figures == ["step_000006.png", "step_000012.png"]
    pipeline = PreDiffPipeline.from_pretrained(tmp_path / "unet-parts")
    past_values = torch.rand(2, 2, 8, 8, 1)
    free = pipeline(past_values, ensemble_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert free.predictions.shape == (2, 2, 1, 8, 8, 1) and np.isfinite(free.predictions).all()
    latents = pipeline.vae.encode(torch.rand(64, 1, 8, 8)).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert pipeline.vae.config.scaling_factor != 0.18215 and 0.1 < latents.std() < 10
    guide = KnowledgeAlignmentCallback(0.9)
    guided = pipeline(past_values, ensemble_size=2, num_inference_steps=2, callback_on_step_end=guide)
    assert np.isfinite(guided.predictions).all()

    further = ["--output_dir", str(tmp_path / "further"), "--pretrained", str(tmp_path / "vae-parts")]
    train(tmp_path, *further, script="train_autoencoder")
    before, after = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("vae-parts", "further")
    )
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    scaling = json.loads((tmp_path / "further/config.json").read_text())["scaling_factor"]
    assert scaling == pipeline.vae.config.scaling_factor

    options = ["--pipeline", str(tmp_path / "unet-parts"), "--ensemble_size", "3"]
    train(tmp_path, *options, script="calibrate_prediff")
    found = PreDiffPipeline.from_pretrained(tmp_path / "unet-parts").config
    assert [len(row) for row in found.calibration] == [3, 3] and [len(row) for row in found.blend] == [2]
    np.testing.assert_allclose(found.calibration[0], [0, 20 / 255, 100 / 255], rtol=1e-6)


@pytest.mark.slow
def test_a_denoiser_is_told_what_a_forecaster_forecasts(tmp_path):
    write_radar(tmp_path / "radar.h5", [(0, 0), (4, 6)])
    with h5py.File(tmp_path / "radar.h5", "a") as file:
        file["mrms_test/tiles_val"] = np.array([(8, 8)], "int32")
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    forecaster = tiny_forecaster(context_length=3, prediction_length=1, image_size=(8, 8))
    forecaster.save_pretrained(tmp_path / "forecaster")
    steps = {"max_steps": 4, "batch_size": 2, "warmup_steps": 1, "eval_every": 2, "save_every": 2, "ema_decay": 0.9}
    steps |= {"encoded_windows": 4, "latents": str(tmp_path / "latents")}
    recipe = {
        "unet": {
            "sample_size": [4, 4], "context_length": 3, "prediction_length": 1, "block_out_channels": [8],
            "layers_per_block": 1, "num_attention_heads": 2, "dropout": 0.0, "condition_channels": 3,
        },
        "alignment_network": {"block_out_channels": [8], "num_attention_heads": 2},
        "scheduler": {"class": "DDPMScheduler", "prediction_type": "v_prediction", "beta_end": 0.01},
        "sampler": {"class": "UniPCMultistepScheduler", "solver_order": 3},
        "feature_extractor": {"scale": 1 / 255, "missing_value": 255, "fill_value": 0},
        "data": {"source": "open-radar", "options": {"file": "radar.h5"}, "eval_stride": 1},
        "denoiser": steps | {"vae": str(tmp_path / "vae"), "forecaster": str(tmp_path / "forecaster")},
        "alignment": steps | {"pipeline": str(tmp_path / "unet")},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(tmp_path, "--output_dir", str(tmp_path / "unet"), script="train_unet")
    folders = set((tmp_path / "latents").iterdir())
    for folder in folders:
        assert load_file(folder / "00000000.safetensors")["condition_latents"].shape[1:] == (1, 4, 4, 3)
    train(tmp_path, "--output_dir", str(tmp_path / "alignment"), script="train_alignment")
    for folder in set((tmp_path / "latents").iterdir()) - folders:  # alignment has no use for a condition
        assert "condition_latents" not in load_file(folder / "00000000.safetensors")
    pipeline = PreDiffPipeline.from_pretrained(tmp_path / "unet")
    assert type(pipeline.scheduler) is UniPCMultistepScheduler and pipeline.scheduler.config.solver_order == 3
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and pipeline.scheduler.config.beta_end == 0.01
    for name, tensor in pipeline.forecaster.state_dict().items():
        torch.testing.assert_close(tensor, forecaster.state_dict()[name], rtol=0, atol=0)
    assert np.isfinite(pipeline(torch.rand(1, 3, 8, 8, 1), num_inference_steps=2).predictions).all()
    assert pipeline.alignment is not None and (tmp_path / "unet/figures/step_000004.png").is_file()


@pytest.mark.slow
def test_an_autoencoder_that_plays_against_a_discriminator_resumes(tmp_path):
    write_radar(tmp_path / "radar.h5", [(0, 0)])
    with h5py.File(tmp_path / "radar.h5", "a") as file:
        group = file["mrms_test"]
        del group["code"]
        group["code"] = np.random.default_rng(0).integers(0, 200, (5, 64, 64)).astype("uint8")
        group["tiles_val"] = np.array([(32, 32)], "int32")
        group.attrs["tile_size"] = 32
    recipe = {
        "vae": {
            "in_channels": 1, "out_channels": 1, "block_out_channels": [4, 8], "norm_num_groups": 2,
            "latent_channels": 3, "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
        },
        "feature_extractor": {"scale": 1 / 255, "missing_value": 255, "fill_value": 0},
        "data": {"source": "open-radar", "options": {"file": "radar.h5"}, "eval_stride": 1},
        "autoencoder": {
            "max_steps": 8, "batch_size": 2, "warmup_steps": 2, "eval_every": 8, "save_every": 8, "ema_decay": None,
            "optimizer": "adamw", "betas": [0.5, 0.9], "loss": "laplace", "learn_log_variance": True,
            "discriminator_weight": 0.5, "discriminator_start": 4,
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def both(folder):
        return (load_file(folder / f"checkpoints/last/model{n}.safetensors") for n in ("", "_1"))

    whole, parts, start = tmp_path / "whole", tmp_path / "parts", tmp_path / "start"
    train(tmp_path, "--output_dir", str(whole), script="train_autoencoder")
    train(tmp_path, "--output_dir", str(start), "--stop_at", "4", script="train_autoencoder")
    train(tmp_path, "--output_dir", str(parts), "--stop_at", "6", script="train_autoencoder")
    train(tmp_path, "--output_dir", str(parts), script="train_autoencoder")
    assert_same(whole, parts, "checkpoints/last/model.safetensors", "checkpoints/last/model_1.safetensors")
    (autoencoder, judge), (_, untrained) = both(whole), both(start)
    assert autoencoder["log_variance"].abs() > 1e-4
    assert not untrained["layers.3.num_batches_tracked"] and judge["layers.3.num_batches_tracked"]
    assert not torch.equal(judge["layers.0.weight"], untrained["layers.0.weight"])
