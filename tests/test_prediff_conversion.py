"""Parity of PreDiff with outputs recorded from the original on random weights, and what its conversion refuses."""

import collections
import hashlib
import operator
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDPMScheduler
from test_conversion import FIXTURES, recorded, relative
from tiny import GOLDENS, ROOT

from earthformer_hf import (
    EarthformerAlignmentModel,
    EarthformerFeatureExtractor,
    EarthformerUNetModel,
    KnowledgeAlignmentCallback,
    PreDiffPipeline,
    sharing,
)
from earthformer_hf.guidance import energy_gradient
from earthformer_hf.schedules import denoised, noise_levels, posterior_deviation, use_float64_tables
from earthformer_hf.training.losses import denoising_loss
from earthformer_hf.unet_earthformer import TimeResidualBlock


sys.path.insert(0, str(ROOT / "conversion"))

import convert_prediff as convert  # noqa: E402


needs_recordings = pytest.mark.skipif(
    not GOLDENS.exists(), reason="the recorded outputs are not here: set EARTHFORMER_HF_GOLDENS"
)


def filled(model, tensors, part):
    model.load_state_dict(convert.convert_state_dict(tensors, model, part).tensors)
    return model.eval()


def check_gradients(parameters, names, groups):
    """Of the recorded parameters, under our names and in our shapes."""
    for name, gradient in groups["grad"].items():
        ours = parameters[names(name)].grad
        if names(name) == "pool.position_embedding":
            gradient = gradient.T
        assert relative(ours, gradient.view_as(ours) if gradient.ndim == 3 else gradient) < 5e-4, name


# -- networks ---------------------------------------------------------------------------------------------------------


def check_block(folder, case):
    options, groups = recorded(folder, case)
    block = TimeResidualBlock(
        options["channels"],
        options["out_channels"] or options["channels"],
        options["emb_channels"],
        options["dropout"],
        options["use_scale_shift_norm"],
    ).eval()
    names = {name: convert.rename("down_time_embed_blocks.0." + name, "unet") for name in groups["state_dict"]}
    names = {name: ours.removeprefix("down.residuals.0.") for name, ours in names.items()}
    block.load_state_dict({names[name]: tensor for name, tensor in groups["state_dict"].items()})
    x = groups["input"]["x"].requires_grad_()
    out = block(x.permute(0, 2, 3, 4, 1), groups["input"]["emb"]).permute(0, 4, 1, 2, 3)
    assert relative(out, groups["output"]["out"]) < 5e-5
    out.square().mean().backward()
    assert relative(x.grad, groups["grad_input"]["x"]) < 5e-4
    check_gradients(dict(block.named_parameters()), names.get, groups)


def check_unet(case):
    options, groups = recorded(GOLDENS, case)
    tensors = groups["state_dict"]
    names = convert.rename
    if not options.pop("use_inter_ffn"):
        # One feed-forward layer at the end of a block: ours has more, which zeros make the identity.
        model = EarthformerUNetModel(**convert.convert_network(options, "latent_model"))
        patterns = {"divided_st": 1, "axial": 2}  # its place among ours
        last = {i: patterns[name] for i, name in enumerate(options["block_attn_patterns"])}
        place = {f"{way}_self_blocks.{i}.": n for way in ("down", "up") for i, n in last.items()}

        def moved(name):
            for start, n in place.items():
                if name.startswith(start):
                    return name.replace(".ffn_l.0.", f".ffn_l.{n}.")
            return name

        converted = {convert.rename(moved(name), "unet"): tensor for name, tensor in tensors.items()}
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
        missing = set(zeros) - set(converted)
        assert all(".feed_forwards." in name for name in missing)
        model.load_state_dict({name: converted.get(name, zeros[name]) for name in zeros})
        model.eval()
    else:
        model = filled(EarthformerUNetModel(**convert.convert_network(options, "latent_model")), tensors, "unet")
    inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in groups["input"].items()}
    out = model(inputs["x"], inputs["t"], inputs["cond"]).sample
    assert relative(out, groups["output"]["out"]) < 5e-5
    out.square().mean().backward()
    for name, gradient in groups["grad_input"].items():
        assert relative(inputs[name].grad, gradient) < 5e-4
    check_gradients(dict(model.named_parameters()), lambda name: names(name, "unet"), groups)


def check_alignment(folder, case):
    options, groups = recorded(folder, case)
    length = options.pop("out_len")  # the original reads its last frames, ours all
    model = EarthformerAlignmentModel(**convert.convert_network(options, "align"))
    filled(model, groups["state_dict"], "alignment")
    x = groups["input"]["x"].requires_grad_()
    out = model(x, groups["input"]["t"]).prediction[:, -length:]
    assert relative(out, groups["output"]["out"]) < 5e-5
    out.square().mean().backward()
    assert relative(x.grad, groups["grad_input"]["x"]) < 5e-4
    check_gradients(dict(model.named_parameters()), lambda name: convert.rename(name, "alignment"), groups)


def test_parity_of_a_residual_block():
    check_block(FIXTURES, "layer_timeres_scaleshift")


def test_parity_of_the_alignment_network():
    check_alignment(FIXTURES, "prediff_align_outlen")


# Left out: layer_timeres_noembed_v2 (a 3x3x3 shortcut), prediff_align_global (samples read others' global vectors).
@pytest.mark.slow
@needs_recordings
@pytest.mark.parametrize("case", ["layer_timeres_gn32", "layer_timeres_gn48"])
def test_full_parity_of_residual_blocks(case):
    check_block(GOLDENS, case)


@pytest.mark.slow
@needs_recordings
@pytest.mark.parametrize("case", ["prediff_unet", "prediff_unet_depth2", "prediff_unet_global", "prediff_unet_ss"])
def test_full_parity_of_the_denoiser(case):
    check_unet(case)


@pytest.mark.slow
@needs_recordings
def test_full_parity_of_the_alignment_network():
    check_alignment(GOLDENS, "prediff_align")


@pytest.mark.slow
@needs_recordings
def test_full_parity_of_the_autoencoder():
    options, groups = recorded(GOLDENS, "prediff_vae")
    vae = filled(AutoencoderKL(**convert.convert_vae(options)), groups["state_dict"], "vae")
    x = groups["input"]["x"].requires_grad_()
    posterior = vae.encode(x).latent_dist
    z = posterior.mean + posterior.std * groups["input"]["noise"]
    outputs = {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "z": z,
        "decoded": vae.decode(z).sample,
        "forward_mode": vae(x).sample,
        "kl": posterior.kl(),
    }
    for name, out in outputs.items():
        assert relative(out, groups["output"][name]) < 5e-5, name
    sum(out.square().mean() for out in outputs.values()).backward()
    assert relative(x.grad, groups["grad_input"]["x"]) < 5e-4
    check_gradients(dict(vae.named_parameters()), lambda name: convert.rename(name, "vae"), groups)


# -- the chain --------------------------------------------------------------------------------------------------------


def scheduler_of(diffusion, steps=None):
    scheduler = DDPMScheduler(**convert.convert_scheduler(diffusion))
    use_float64_tables(scheduler)
    scheduler.set_timesteps(steps or diffusion["timesteps"])
    return scheduler


def check_schedule(folder, case):
    diffusion, groups = recorded(folder, case)
    expected = groups["output"]
    if case == "sched_cosine":  # of the posterior's second form (v_posterior) only the schedule is ours
        diffusion["v_posterior"] = 0.0
    scheduler = scheduler_of(diffusion)
    torch.testing.assert_close(scheduler.betas.float(), expected["betas"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), expected["alphas_cumprod"], rtol=1e-6, atol=2e-7)
    if case != "sched_cosine":
        levels = noise_levels(scheduler)
        ours = torch.tensor([posterior_deviation(*pair) for pair in zip(levels, levels[1:])]).flip(0)
        expected_deviation = (0.5 * expected["posterior_log_variance_clipped"].double()).exp().float()
        torch.testing.assert_close(ours[1:], expected_deviation[1:], rtol=1e-5, atol=0)
        assert ours[0] < 1e-9


def test_parity_of_a_schedule():
    check_schedule(FIXTURES, "sched_linear10")


@pytest.mark.slow
@needs_recordings
@pytest.mark.parametrize("case", ["sched_linear1000", "sched_cosine"])
def test_full_parity_of_schedules(case):
    check_schedule(GOLDENS, case)


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def chain(case):
    """The recorded pipeline, its tensors, and its steps."""
    options, groups = recorded(GOLDENS, case)
    tensors = groups["state_dict"]
    unet = EarthformerUNetModel(**convert.convert_network(options["latent_model"], "latent_model"))
    filled(unet, part(tensors, "torch_nn_module."), "unet")
    vae = AutoencoderKL(**convert.convert_vae(options["vae"]), scaling_factor=1.0)
    filled(vae, part(tensors, "first_stage_model."), "vae")
    return options, groups, PreDiffPipeline(vae, unet, scheduler_of(options["diffusion"]))


# Left out: ddpm_clip_temp (clipped samples, a temperature, another posterior).
@pytest.mark.slow
@needs_recordings
@pytest.mark.parametrize("case", ["ddpm_chain10", "ddpm_chain10_v2", "ddpm_chain10_x0", "ddpm_steps1000"])
def test_full_parity_of_the_chain(case, monkeypatch):
    options, groups, pipeline = chain(case)
    inputs, expected, scheduler = groups["input"], groups["output"], pipeline.scheduler
    pipeline._max_batch_size = None
    with torch.no_grad():
        context = pipeline._encode(inputs["y"])
        assert relative(context, expected["zc"]) < 5e-5
        steps = {"ddpm_steps1000": [999, 998, 500, 2, 1, 0]}.get(case, list(range(9, -1, -1)))
        for k, step in enumerate(steps):
            noisy = expected["z_in"][k]
            output = pipeline.unet(noisy, step, context).sample
            level = noise_levels(scheduler)[scheduler.config.num_train_timesteps - 1 - step]
            assert relative(denoised(scheduler, level, output, noisy), expected["pred_x0"][k]) < 1e-4
            noise = inputs["noise"][k]
            monkeypatch.setattr(
                "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, noise=noise, **k: noise
            )
            after = scheduler.step(output, torch.tensor(step), noisy).prev_sample
            assert after.dtype == torch.float32
            assert relative(after, expected["z_out"][k]) < 1e-4, step
        assert relative(pipeline.decode(expected["z_out"][-1]), expected["decoded"]) < 1e-4 or case == "ddpm_steps1000"


@pytest.mark.slow
@needs_recordings
def test_full_parity_of_alignment():
    """Ours is one norm per sample, the original's one over the batch: they differ by the ratio of the norms."""
    options, groups, pipeline = chain("ddpm_chain10_aligned")
    network = EarthformerAlignmentModel(**convert.convert_network(options["align"]["model_args"], "align"))
    filled(network, part(groups["state_dict"], "alignment_model."), "alignment")
    target, scale = groups["input"]["avg_x_gt"][:, 0], options["align"]["guide_scale"]
    pipeline.register_modules(alignment=network)
    callback, levels = KnowledgeAlignmentCallback(target, guidance_scale=scale), noise_levels(pipeline.scheduler)
    pipeline._max_batch_size = None
    for k, step in enumerate(range(9, -1, -1)):
        noisy = groups["output"]["z_in"][k]
        with torch.no_grad():
            difference = network(noisy, step).prediction.mean((1, 2)) - target
        gradient = (
            groups["output"]["align_grad"][k] * (difference.norm() / difference.abs())[:, None, None, None, None]
        )
        tensors = {"latents": torch.zeros_like(noisy)[:, None], "noisy_latents": noisy[:, None], "past_values": noisy}
        shifted = callback(pipeline, k, torch.tensor(step), tensors)["latents"][:, 0]
        deviation = posterior_deviation(levels[k], levels[k + 1])
        assert relative(shifted, -deviation * gradient) < 5e-5
        assert deviation == pytest.approx(float((0.5 * groups["output"]["log_var"][k].double()).exp()), rel=1e-5)


@pytest.mark.slow
@needs_recordings
def test_full_parity_of_the_energy():
    options, groups = recorded(GOLDENS, "align_fn")
    network = EarthformerAlignmentModel(**convert.convert_network(options["model_args"], "align"))
    filled(network, groups["state_dict"], "alignment")
    z, t, target = (groups["input"][name] for name in ("zt", "t", "avg_x_gt"))
    with torch.no_grad():
        prediction = network(z, t).prediction
        assert relative(prediction, groups["output"]["pred"]) < 5e-5
    difference = prediction.mean((1, 2)) - target[:, 0]
    for b in range(len(z)):

        def quantity(part, step=t[b]):
            return network(part, step).prediction.mean((1, 2))

        ours = options["guide_scale"] * energy_gradient(quantity, z[b : b + 1], target[b])
        ratio = difference.norm() / difference[b].abs()
        assert relative(ours[0], groups["output"]["mean_shift"][b] * ratio) < 5e-4


@pytest.mark.slow
@needs_recordings
def test_full_parity_of_the_loss():  # left out: ddpm_loss_elbo, whose second term no published setting has
    options, groups = recorded(GOLDENS, "ddpm_loss")
    tensors, inputs = groups["state_dict"], groups["input"]
    unet = EarthformerUNetModel(**convert.convert_network(options["latent_model"], "latent_model"))
    filled(unet, part(tensors, "torch_nn_module."), "unet")
    scheduler = scheduler_of(options["diffusion"])
    start = inputs["x_start"].requires_grad_()
    noisy = scheduler.add_noise(start, inputs["noise"], inputs["t"]).float()
    assert relative(noisy, groups["output"]["x_noisy"]) < 5e-5
    output = unet(noisy, inputs["t"], inputs["zc"]).sample
    assert relative(output, groups["output"]["model_output"]) < 5e-5
    table = tensors["logvar"].clone().requires_grad_()
    loss = denoising_loss(output, inputs["noise"], table[inputs["t"]])
    torch.testing.assert_close(loss, groups["output"]["loss"], rtol=5e-5, atol=0)
    loss.backward()
    assert relative(table.grad, groups["grad"].pop("logvar")) < 5e-4
    names = lambda name: convert.rename(name.removeprefix("torch_nn_module."), "unet")  # noqa: E731
    check_gradients(dict(unet.named_parameters()), names, groups)


def test_denoising_loss_without_a_variance_is_the_mean_squared_error():
    output, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(denoising_loss(output, target, torch.zeros(2)), (output - target).square().mean())


@pytest.mark.slow
@needs_recordings
def test_every_recorded_case_is_compared_or_left_out_by_name():
    kinds = ("prediff", "ddpm", "sched", "align_fn", "layer_timeres")
    cases = {path.stem for kind in kinds for path in GOLDENS.glob(f"{kind}*.safetensors")}
    left_out = {
        "layer_timeres_noembed_v2",  # a 3x3x3 shortcut
        "prediff_align_global",  # samples read others' global vectors
        "ddpm_clip_temp",  # clipped samples, a temperature, another posterior
        "ddpm_loss_elbo",  # a second term that no published setting has
        "sched_sqrt",  # a schedule that no published setting has
    }
    text = Path(__file__).read_text()
    assert all(f'"{case}"' in text for case in cases)
    assert left_out < cases


# -- the command ------------------------------------------------------------------------------------------------------

LATENT = {
    "input_shape": [3, 6, 8, 4], "target_shape": [2, 6, 8, 4], "base_units": 16, "depth": [1, 1], "num_heads": 4,
    "attn_drop": 0.1, "proj_drop": 0.1, "ffn_drop": 0.1, "padding_type": "zeros", "pos_embed_type": "t+h+w",
    "self_pattern": "axial", "unet_res_connect": True, "use_dec_cross_global": False, "num_global_vectors": 0,
}  # fmt: skip
ALIGN = {
    "input_shape": [2, 6, 8, 4], "base_units": 16, "depth": [1, 1], "block_attn_patterns": "axial", "num_heads": 4,
    "attn_drop": 0.1, "proj_drop": 0.1, "ffn_drop": 0.1, "padding_type": "zeros", "out_channels": 1, "out_len": 2,
}  # fmt: skip
AUTOENCODER = {
    "in_channels": 1, "out_channels": 1, "data_channels": 1, "block_out_channels": [8, 16], "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4,
    "layers_per_block": 1, "act_fn": "silu", "pretrained_ckpt_path": "vae.pt",
}  # fmt: skip
DOCUMENT = {
    "optim": {"lr": 1},
    "model": {
        "diffusion": {"beta_schedule": "linear", "linear_start": "1e-4", "linear_end": "2e-2", "use_ema": True},
        "align": {"alignment_type": "avg_x", "guide_scale": 50.0, "model_type": "cuboid", "model_args": ALIGN},
        "latent_model": LATENT,
        "vae": AUTOENCODER,
    },
}


def original_name(name, part):
    """The inverse of `rename`, for names that occur in the tiny networks."""
    plain = {"out_proj": "final_proj"} if part == "unet" else {}
    rules = convert.VAE_NAMES if part == "vae" else convert.MODULE_NAMES + convert.RESIDUAL_BLOCK_NAMES
    rules = [(a, b) for a, b in rules if "pool" not in b and "norm_out" not in b]
    pool = {"norm_out.": "out.0.", "pool.position_embedding": "out.2.positional_embedding"}
    pool |= {"pool.qkv.": "out.2.qkv_proj.", "pool.out_proj.": "out.2.c_proj."}
    layers = {
        ".attentions.": ".attn_l.", ".feed_forwards.": ".ffn_l.", ".up.": ".ffn_1.", ".down.": ".ffn_2.",
        ".relative_position_bias": ".relative_position_bias_table", ".out_proj.": ".proj.", ".time.": ".T_embed.",
        ".height.": ".H_embed.", ".width.": ".W_embed.",
    }  # fmt: skip
    if part != "vae":
        for ours, theirs in pool.items():
            if name.startswith(ours):
                return name.replace(ours, theirs)
        if ".feed_forwards." in name:
            name = name.replace(".norm.", ".layer_norm.")
    for ours, theirs in plain.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs)
    if part != "vae":
        for ours, theirs in layers.items():
            name = name.replace(ours, theirs) if not name.startswith("down.t") else name
    for pattern, ours in rules:
        theirs = pattern.lstrip("^").rstrip("$").replace("\\", "")
        if name.startswith(ours) if pattern.startswith("^") else ours in name:
            name = name.replace(ours, theirs, 1)
    return name


@pytest.fixture
def originals(tmp_path):
    """Three checkpoints in the original's names, one of each kind of file, and the networks they came from."""
    torch.manual_seed(1)
    networks = {
        "vae": AutoencoderKL(**convert.convert_vae(AUTOENCODER), scaling_factor=1.0),
        "unet": EarthformerUNetModel(**convert.convert_network(LATENT, "latent_model")),
        "alignment": EarthformerAlignmentModel(**convert.convert_network(ALIGN, "align")),
    }
    tensors = {}
    for name, network in networks.items():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        tensors[name] = {original_name(key, name): value for key, value in network.state_dict().items()}
    place = tensors["alignment"]["out.2.positional_embedding"]
    tensors["alignment"]["out.2.positional_embedding"] = place.T.contiguous()
    for key in ("out.2.qkv_proj.weight", "out.2.c_proj.weight"):
        tensors["alignment"][key] = tensors["alignment"][key][:, :, None]
    prefixed = {"torch_nn_module." + key: value for key, value in tensors["unet"].items()}
    prefixed |= {"first_stage_model." + key: value for key, value in tensors["vae"].items()}
    prefixed |= {"cond_stage_model." + key: value for key, value in tensors["vae"].items()}
    averaged = {"model_ema." + key.replace(".", ""): value for key, value in tensors["unet"].items()}
    beside = {"model_ema.decay": torch.tensor(0.9), "logvar": torch.zeros(1000), "sqrt_alphas_cumprod": torch.zeros(9)}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(DOCUMENT))
    torch.save(tensors["vae"], tmp_path / "vae.pt")
    torch.save({"state_dict": prefixed | averaged | beside, "epoch": 3}, tmp_path / "unet.pt")
    prefixed = {"torch_nn_module." + key: value for key, value in tensors["alignment"].items()}
    torch.save({"state_dict": prefixed | beside}, tmp_path / "alignment.pt")
    return tmp_path, networks


def command(folder):
    options = [
        option
        for name in ("vae", "unet", "alignment")
        for option in (f"--{name}_checkpoint_path", str(folder / f"{name}.pt"))
    ]
    options += ["--config_path", str(folder / "x.yaml"), "--output_dir", str(folder / "out")]
    script = str(ROOT / "conversion/convert_prediff.py")
    return subprocess.run([sys.executable, script, *options], capture_output=True, text=True)


def test_the_command_makes_a_pipeline(originals):
    folder, networks = originals
    result = command(folder)
    assert result.returncode == 0, result.stderr[-1500:]
    assert "reloaded and compared" in result.stdout
    pipeline = PreDiffPipeline.from_pretrained(folder / "out")
    for name, network in networks.items():
        converted = getattr(pipeline, name).state_dict()
        assert all(torch.equal(converted[key], value) for key, value in network.state_dict().items())
    assert pipeline.vae.config.scaling_factor == 1.0 and not pipeline.unet.config.mask_padding
    assert type(pipeline.scheduler) is DDPMScheduler and pipeline.scheduler.config.beta_schedule == "scaled_linear"
    card = (folder / "out/README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "diffusers" and metadata["license"] == "other"
    assert "pipeline_tag" not in metadata  # as in the cards of the released pipelines
    for name in networks:
        assert hashlib.sha256((folder / f"{name}.pt").read_bytes()).hexdigest() in card
    assert "| `logvar` | dropped: not of this network |" in card and str(folder) not in card
    assert "as the original was trained on" in card and pipeline.feature_extractor is None
    assert sharing.check(folder / "out") == []
    sharing.export(pipeline, folder / "out", card=folder / "out/README.md")  # the same bytes: nothing to replace
    assert {"pipeline_prediff.py", "guidance.py"} < {path.name for path in (folder / "out").iterdir()}


def test_overwriting_leaves_nothing_of_before(originals):
    folder, _ = originals
    files = (folder / "vae.pt", folder / "unet.pt", folder / "out")
    convert.convert(*files, config_path=folder / "x.yaml")
    assert not (folder / "out/alignment").exists()  # which no file was given for
    first = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    (folder / "out/unet/diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"of an earlier conversion")
    with pytest.raises(ValueError, match="holds something else"):
        convert.convert(*files, config_path=folder / "x.yaml")
    convert.convert(*files, config_path=folder / "x.yaml", overwrite=True)
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()} == first


def test_the_preset_is_the_released_setting():
    with torch.device("meta"):
        parts = convert.preset_parts("sevir-lr", aligned=True)
        assert "alignment" not in convert.preset_parts("sevir-lr", aligned=False)
    folder = ROOT / "model_cards/prediff-sevir-lr"
    for name in ("vae", "unet", "alignment", "scheduler"):
        stored, built = type(parts[name]).load_config(folder / name), dict(parts[name].config)
        assert {key: list(x) if isinstance(x := built[key], tuple) else x for key in stored if key[0] != "_"} == {
            key: value for key, value in stored.items() if key[0] != "_"
        }
    stored = EarthformerFeatureExtractor.from_pretrained(folder / "feature_extractor")
    assert parts["feature_extractor"].to_dict() == stored.to_dict()
    card = convert.released_card("prediff-sevir-lr", "as follows")
    assert card.startswith((folder / "README.md").read_text()) and "it was not checked" in card


def test_a_folder_that_holds_something_is_left_alone(originals):
    folder, _ = originals
    (folder / "out").mkdir()
    (folder / "out/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else.*--overwrite"):
        convert.convert(folder / "vae.pt", folder / "unet.pt", folder / "out", config_path=folder / "x.yaml")
    assert [path.name for path in (folder / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("block", "change", "named"),
    [
        ("latent_model", {"gated_ffn": True}, "latent_model.gated_ffn"),
        ("latent_model", {"frobnicate": 1}, "latent_model.frobnicate"),
        ("latent_model", {"self_pattern": None}, "block_attn_patterns"),
        ("latent_model", {"target_shape": [2, 6, 6, 4]}, "target_shape"),
        ("latent_model", {"attn_drop": 0.3}, "attn_drop"),
        ("latent_model", {"padding_type": "nearest"}, "padding_type"),
        ("latent_model", {"self_pattern": "foo"}, "self_pattern.*foo"),
        ("latent_model", {"self_pattern": 3}, "self_pattern.*3"),
        ("latent_model", {"input_shape": 3}, "latent_model.input_shape=3"),
        ("latent_model", {"depth": 1}, "latent_model.depth=1"),
        ("latent_model", {"attn_drop": [1]}, "latent_model.attn_drop"),
        ("latent_model", {"attn_drop": None}, "latent_model.attn_drop"),
        ("latent_model", {"base_units": "a"}, "latent_model.base_units"),
        ("latent_model", {"num_global_vectors": "a"}, "latent_model.num_global_vectors"),
        ("vae", {"block_out_channels": 3}, "vae.block_out_channels"),
        ("align", {"pool": "adaptive"}, "align.pool"),
        ("align", {"out_len": 1}, "align.out_len"),
        ("align", {"num_global_vectors": 2}, "align.num_global_vectors"),
        ("diffusion", {"beta_schedule": "sqrt"}, "beta_schedule"),
        ("diffusion", {"v_posterior": 0.3}, "v_posterior"),
        ("diffusion", {"clip_denoised": True}, "clip_denoised"),
        ("diffusion", {"beta_schedul": "cosine"}, "beta_schedul"),
        ("vae", {"attention": 1}, "vae.attention"),
    ],
)
def test_unsupported_options_are_refused(block, change, named):
    options = {"latent_model": LATENT, "align": ALIGN, "diffusion": {}, "vae": AUTOENCODER}[block] | change
    functions = {"diffusion": convert.convert_scheduler, "vae": convert.convert_vae}
    with pytest.raises(ValueError, match=named):
        functions[block](options) if block in functions else convert.convert_network(options, block)


def library_objects(monkeypatch):
    """Objects of libraries that are not installed here, as a training script leaves them in a checkpoint."""
    for name in ("omegaconf", "omegaconf.dictconfig", "lightning", "lightning.fabric"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    config = type("DictConfig", (dict,), {"__module__": "omegaconf.dictconfig"})
    attributes = type("AttributeDict", (), {"__module__": "lightning.fabric"})
    sys.modules["omegaconf.dictconfig"].DictConfig = config
    sys.modules["lightning.fabric"].AttributeDict = attributes
    one, other = config(), attributes()
    one.flags, other.lr = {"struct": True}, 1e-3
    default = collections.defaultdict(dict)
    default["a"] = 1
    one.ref_type = typing.Tuple[typing.Any, ...]  # noqa: UP006
    one.queue = collections.deque([1, 2], maxlen=2)
    return {"hyper_parameters": one, "callbacks": [other, default], "kind": dict, "path": (ROOT,)}


def test_objects_of_other_libraries_become_placeholders(tmp_path, monkeypatch):
    import argparse

    objects = library_objects(monkeypatch)
    objects["arguments"] = argparse.Namespace(lr=1, nested=objects["hyper_parameters"])
    torch.save({"state_dict": {"a.b": torch.ones(2)}, **objects}, tmp_path / "x.pt")
    for name in ("omegaconf", "omegaconf.dictconfig", "lightning", "lightning.fabric"):
        monkeypatch.delitem(sys.modules, name)
    tensors = convert.load_tensors(tmp_path / "x.pt")
    assert list(tensors) == ["a.b"] and torch.equal(tensors["a.b"], torch.ones(2))
    assert "omegaconf" not in sys.modules and "lightning" not in sys.modules


class Called:
    def __reduce__(self):
        return operator.getitem, ((), 0)  # an IndexError, if it is called


def test_a_placeholder_is_never_called_in_its_real_form(tmp_path):
    torch.save({"a": torch.ones(1), "x": Called()}, tmp_path / "x.pt")
    assert list(convert.load_tensors(tmp_path / "x.pt")) == ["a"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_file_is_refused_and_named(tmp_path, protocol, legacy):
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "posix": "system", "x": Malicious(tmp_path / "ran")},
        tmp_path / "x.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(ValueError, match="nothing was executed") as reason:
        convert.load_tensors(tmp_path / "x.pt")
    assert "posix.system" in str(reason.value)
    assert not (tmp_path / "ran").exists()


def test_tensors_without_names_are_refused(tmp_path):
    torch.save({1: torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a tensor under 1"):
        convert.load_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("blocks", [{"align": 5}, {"align": {"alignment_type": "avg_x", "model_args": 5}}])
def test_a_block_that_is_none_is_refused(tmp_path, blocks):
    document = {"model": DOCUMENT["model"] | blocks}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ValueError, match="align"):
        convert.read_config(tmp_path / "x.yaml", aligned=True)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="nothing was executed"):
        convert.load_tensors(tmp_path / "x.pt")


def test_a_checkpoint_of_another_model_is_refused(originals):
    folder, _ = originals
    torch.save({"something.weight": torch.ones(1)}, folder / "unet.pt")
    with pytest.raises(ValueError, match="something.weight"):
        convert.convert(folder / "vae.pt", folder / "unet.pt", folder / "out", config_path=folder / "x.yaml")
    assert not (folder / "out").exists()
