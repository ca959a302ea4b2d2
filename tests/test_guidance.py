"""Guidance: its direction and size under every scheduler, what it refuses, and quantities that it holds on to."""

import pickle

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging as diffusers_logging
from test_pipeline import SCALED, SCHEDULERS, past, run, seeded
from tiny import tiny_pipeline

from earthformer_hf import EarthformerAlignmentModel, KnowledgeAlignmentCallback
from earthformer_hf.data.nbody_mnist import n_body_energy
from earthformer_hf.guidance import energy_of, frame_mean, intensity_change, mean_intensity, sizes_of_steps
from earthformer_hf.schedules import STEPWISE_SCHEDULERS, noise_levels, posterior_deviation, use_float64_tables


def gaussian_network(pipeline):
    """Of unit Gaussian data, the expected v is 0: let the network say so."""
    for parameter in pipeline.unet.out_proj.parameters():
        torch.nn.init.zeros_(parameter)
    return pipeline


def gaussian(name, **options):
    """A pipeline that knows its latents exactly."""
    scheduler = SCHEDULERS[name]
    if name != "flow":
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")
    return gaussian_network(tiny_pipeline(scheduler, **options))


# -- direction and size -----------------------------------------------------------------------------------------------

V = SCALED | {"prediction_type": "v_prediction"}
FLOW = SCALED | {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
GUIDED = {
    "DDPM": diffusers.DDPMScheduler(clip_sample=False, **V),
    "DDIM": diffusers.DDIMScheduler(clip_sample=False, **V),
    "DDIM trailing": diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **V),
    "DDIM linspace": diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="linspace", **V),
    "DDIM zero SNR": diffusers.DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", **V
    ),
    "DDIM stops short": diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **V),
    "DPM-Solver++ 1": diffusers.DPMSolverMultistepScheduler(solver_order=1, **V),
    "DPM-Solver++ 2": diffusers.DPMSolverMultistepScheduler(**V),
    "DPM-Solver++ 2 Heun": diffusers.DPMSolverMultistepScheduler(solver_type="heun", **V),
    "DPM-Solver++ 3": diffusers.DPMSolverMultistepScheduler(solver_order=3, **V),
    "DPM-Solver++ SDE": diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **V),
    "DPM-Solver++ Karras": diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **V),
    "DPM-Solver++ Lu": diffusers.DPMSolverMultistepScheduler(use_lu_lambdas=True, **V),
    "DPM-Solver++ beta": diffusers.DPMSolverMultistepScheduler(use_beta_sigmas=True, **V),
    "DPM-Solver++ Euler last": diffusers.DPMSolverMultistepScheduler(euler_at_final=True, **V),
    "DPM-Solver++ stops short": diffusers.DPMSolverMultistepScheduler(**SIGMA_MIN, **V),
    "DPM-Solver++ leading": diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading", **V),
    "DPM-Solver++ flow": diffusers.DPMSolverMultistepScheduler(**FLOW),
    "DPM-Solver": diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", **SIGMA_MIN, **V),
    "DEIS": diffusers.DEISMultistepScheduler(**V),
    "UniPC": diffusers.UniPCMultistepScheduler(**V),
    "UniPC 3": diffusers.UniPCMultistepScheduler(solver_order=3, **V),
    "UniPC bh1": diffusers.UniPCMultistepScheduler(solver_type="bh1", **SIGMA_MIN, **V),
    "UniPC of noise": diffusers.UniPCMultistepScheduler(predict_x0=False, **SIGMA_MIN, **V),
    "UniPC uncorrected": diffusers.UniPCMultistepScheduler(disable_corrector=[0, 1, 2], **V),
    "UniPC flow": diffusers.UniPCMultistepScheduler(**FLOW),
    "Euler": diffusers.EulerDiscreteScheduler(**V),
    "Euler Karras": diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **V),
    "Euler ancestral": diffusers.EulerAncestralDiscreteScheduler(**V),
    "Flow matching": diffusers.FlowMatchEulerDiscreteScheduler(),
    "Flow matching shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def test_every_scheduler_that_guidance_takes_is_tested():
    assert {type(scheduler) for scheduler in GUIDED.values()} == set(STEPWISE_SCHEDULERS)


def linear(scheduler, steps: int, target: float | None, ends: bool = False):
    """Latents of a call on Gaussian data that the network knows exactly, pulled along a mean; and the mean's slope.

    `ends`: after the first step.
    """
    pipeline = gaussian_network(tiny_pipeline(type(scheduler).from_config(scheduler.config)))
    pipeline.decode = lambda latents: latents  # a linear quantity: its gradient is the same everywhere
    callbacks = [] if target is None else [KnowledgeAlignmentCallback(target, frame_mean, guidance_scale=1.0)]
    if ends:
        callbacks.append(FirstStep())
    noise = torch.randn(1, 2, 2, 6, 8, 4, generator=seeded(1))
    options = {"callback_on_step_end": MultiPipelineCallbacks(callbacks)} if callbacks else {}
    latents = run(
        pipeline, past(1), ensemble_size=2, num_inference_steps=steps, latents=noise, output_type="latent", **options
    ).latents
    use_float64_tables(pipeline.scheduler)
    pipeline.scheduler.set_timesteps(steps)
    return latents.double(), noise_levels(pipeline.scheduler)


class FirstStep(PipelineCallback):
    """Ends a call after its first step."""

    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        pipeline._interrupt = True
        return callback_kwargs


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_goes_where_it_is_asked_to(name):
    """Down for less and up for more, by the same amount where all is linear, and a step by exactly what is written."""
    steps, slope = 8, 1 / (2 * 6 * 8 * 4)
    (free, levels), (up, _), (down, _) = (linear(GUIDED[name], steps, target) for target in (None, 1e6, -1e6))
    deviations = torch.tensor([posterior_deviation(*pair) for pair in zip(levels, levels[1:])], dtype=torch.float64)
    torch.testing.assert_close(up - free, free - down, rtol=1e-3, atol=1e-6)
    size = (up - free).mean() / (deviations.sum() * slope)  # of a sample of variance 1 where the noise is gone
    assert 0.3 < size < 1.3

    free, up = (linear(GUIDED[name], steps, target, ends=True)[0] for target in (None, 1e6))
    written = torch.full_like(free, float(deviations[0] * levels[1].norm() * slope))
    torch.testing.assert_close(up - free, written, rtol=1e-3, atol=1e-6 * float(levels[1].norm()))


def test_noise_between_two_steps_is_that_of_the_scheduler():
    """The true noise takes a true sample of one noise level to a true sample of the next."""
    clean, noise = torch.randn(2, 4, 3, 3, generator=seeded())
    for name, scheduler in GUIDED.items():
        if name in ("DDPM", "Euler ancestral", "DPM-Solver++ SDE", "DDIM linspace"):
            continue  # which add noise; which numbers its timesteps otherwise than it computes with them
        scheduler = type(scheduler).from_config(scheduler.config)
        flow = "flow" in name.lower()
        scheduler.set_timesteps(8)
        levels = noise_levels(scheduler).tolist()
        for step, timestep in enumerate(scheduler.timesteps):
            alpha, sigma = levels[step]
            variance = (alpha**2 + sigma**2) ** 0.5
            noisy, output = alpha * clean + sigma * noise, noise - clean
            if not flow:
                output = (alpha * noise - sigma * clean) / variance  # of v_prediction
            if name.startswith("Euler"):
                scheduler.scale_model_input(noisy, timestep)
            after = scheduler.step(output, timestep, noisy).prev_sample
            alpha, sigma = levels[step + 1]
            torch.testing.assert_close(after, alpha * clean + sigma * noise, rtol=2e-3, atol=2e-3 * (1 + sigma))


def others() -> list[type]:
    """The schedulers of diffusers that no guidance is tested with, as far as they are made without arguments."""
    found = {getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    found -= {diffusers.AmusedScheduler, diffusers.VQDiffusionScheduler, diffusers.RFD4ProteinaScheduler}
    schedulers = [one for one in found if isinstance(one, type) and issubclass(one, SchedulerMixin)]
    return sorted(set(schedulers) - set(STEPWISE_SCHEDULERS), key=lambda one: one.__name__)


@pytest.mark.parametrize("scheduler", others())
def test_any_other_scheduler_is_refused_by_name(scheduler):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler()
    pipeline.vae.encode = None  # would fail
    for quantity in (frame_mean, None):
        guide = KnowledgeAlignmentCallback(1.0, quantity)
        with pytest.raises(ValueError, match=f"between two steps of {scheduler.__name__} is not known"):
            run(pipeline, past(1), callback_on_step_end=guide)
    options = {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["denoised_latents"]}
    with pytest.raises(ValueError, match=f"between two steps of {scheduler.__name__} is not known"):
        run(pipeline, past(1), **options)


@pytest.mark.parametrize(
    "scheduler, option, value",
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, "stochastic_sampling", True),
        (diffusers.FlowMatchEulerDiscreteScheduler, "invert_sigmas", True),
        (diffusers.UniPCMultistepScheduler, "solver_p", diffusers.DDIMScheduler()),
    ],
)
def test_options_that_lose_a_shift_are_refused(scheduler, option, value):
    pipeline = tiny_pipeline(scheduler(**{option: value}))
    pipeline.vae.encode = None  # would fail
    with pytest.raises(ValueError, match=f"guidance does not work with {option}="):
        run(pipeline, past(1), callback_on_step_end=KnowledgeAlignmentCallback(1.0, frame_mean))


def test_guidance_that_changes_nothing_says_so(caplog, monkeypatch):
    monkeypatch.setattr(diffusers_logging.get_logger("diffusers"), "propagate", True)
    pipeline = tiny_pipeline(SCHEDULERS["ddpm"])
    for steps, scale, said in ((1, 50.0, True), (3, 0.0, True), (3, 50.0, False)):
        caplog.clear()
        guide = KnowledgeAlignmentCallback(5.0, frame_mean, guidance_scale=scale)
        run(pipeline, past(1), ensemble_size=1, num_inference_steps=steps, callback_on_step_end=guide)
        assert ("guidance changed nothing" in caplog.text) == said


def test_a_call_within_a_call_changes_nothing_of_what_guidance_says(caplog, monkeypatch):
    monkeypatch.setattr(diffusers_logging.get_logger("diffusers"), "propagate", True)
    pipeline, x = tiny_pipeline(SCHEDULERS["ddpm"]), past(1)
    guide = KnowledgeAlignmentCallback(5.0, frame_mean, guidance_scale=50.0)

    class OneStepMore(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipe, step_index, timesteps, callback_kwargs):
            run(pipeline, x, ensemble_size=1, num_inference_steps=1, callback_on_step_end=guide)
            assert pipe.num_timesteps == 2 and len(pipe.scheduler.timesteps) == 2
            return callback_kwargs

    both = MultiPipelineCallbacks([guide, OneStepMore()])
    run(pipeline, x, ensemble_size=1, num_inference_steps=2, callback_on_step_end=both)
    assert caplog.text.count("guidance changed nothing in 1 step(s)") == 2
    assert caplog.text.count("guidance changed nothing") == 2
    assert pickle.loads(pickle.dumps(guide)).target == 5.0


# -- energies and targets ---------------------------------------------------------------------------------------------


def test_energy_and_its_gradient_are_per_member():
    weight, latents, target = torch.randn(5, generator=seeded()), torch.randn(3, 5), torch.tensor([9.0, -9, 9])
    energy, gradient = energy_of(lambda x: x @ weight, latents, target)
    torch.testing.assert_close(energy, (latents @ weight - target).abs())
    torch.testing.assert_close(gradient, torch.stack([-weight, weight, -weight]))


def test_a_step_without_a_scale_meets_a_linear_target_and_is_no_longer_than_the_latents():
    weight, target = torch.randn(5, generator=seeded()), torch.tensor([0.2, -0.3, 100.0])
    latents = torch.randn(3, 5, generator=seeded(1))
    energy, gradient = energy_of(lambda x: x @ weight, latents, target)
    shift = -sizes_of_steps(energy, gradient)[:, None] * gradient
    torch.testing.assert_close(((latents + shift) @ weight)[:2], target[:2])
    torch.testing.assert_close(shift[2].norm(), torch.tensor(5**0.5))
    assert (sizes_of_steps(energy, torch.zeros(3, 5)) * 0 == 0).all()  # a constant quantity: finite


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [8, 25])
def test_a_target_is_met_without_a_scale_whatever_the_schedule(name, steps):
    pipeline, x = gaussian(name), past(2)
    pipeline.decode = lambda latents: 3 + latents.sigmoid()
    free = run(pipeline, x, ensemble_size=3, num_inference_steps=steps).predictions
    for change in (-0.2, 0.2):
        target = frame_mean(free.flatten(0, 1)).view(2, 3) + change
        guide = KnowledgeAlignmentCallback(target, frame_mean)
        guided = run(pipeline, x, ensemble_size=3, num_inference_steps=steps, callback_on_step_end=guide).predictions
        moved = frame_mean(guided.flatten(0, 1)).view(2, 3)
        assert ((moved - target).abs() < abs(change) * 0.1).all(), (moved - target).abs().max()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_constraint_on_decoded_frames_is_met_better(name):
    pipeline, x = gaussian(name), past(2)
    free = run(pipeline, x, ensemble_size=3, num_inference_steps=8).predictions
    for change in (-0.5, 0.5):
        target = frame_mean(free.flatten(0, 1)).view(2, 3) + change
        guide = KnowledgeAlignmentCallback(target, frame_mean, guidance_scale=40.0)
        guided = run(pipeline, x, ensemble_size=3, num_inference_steps=8, callback_on_step_end=guide).predictions
        moved = frame_mean(guided.flatten(0, 1)).view(2, 3)
        assert ((moved - target).abs() < abs(change) * 0.97).all(), (moved - target).abs().max()


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "flow"])
def test_the_alignment_networks_reading_follows_the_target(name):
    pipeline, x = gaussian(name, alignment=True), past(2)

    def reading(output):
        latents = output.latents.flatten(0, 1)
        return pipeline.alignment(latents, 0).prediction.mean((1, 2)).view(2, 2)

    free = reading(run(pipeline, x, ensemble_size=2, num_inference_steps=8))
    target = free.detach() + 0.3
    guide = KnowledgeAlignmentCallback(target, guidance_scale=2.0)
    guided = reading(run(pipeline, x, ensemble_size=2, num_inference_steps=8, callback_on_step_end=guide))
    assert ((guided - target).abs() < (free - target).abs()).all()
    bounded = run(pipeline, x, ensemble_size=2, num_inference_steps=8, callback_on_step_end=guide, max_batch_size=3)
    torch.testing.assert_close(reading(bounded), guided, rtol=1e-4, atol=1e-4)


def test_the_network_says_which_way_and_decoded_frames_say_how_far():
    """Without a scale, a network that reads too much everywhere guides like one that does not."""
    pipeline, x = gaussian("ddim", alignment=True), past(1)
    guide = KnowledgeAlignmentCallback(0.4)
    options = {"ensemble_size": 2, "num_inference_steps": 6, "callback_on_step_end": guide}
    guided = run(pipeline, x, **options).latents
    assert (guided - run(pipeline, x, **options | {"callback_on_step_end": None}).latents).abs().max() > 0.01
    with torch.no_grad():
        pipeline.alignment.pool.out_proj.bias += 0.5
    torch.testing.assert_close(run(pipeline, x, **options).latents, guided, rtol=1e-3, atol=1e-3)


def test_several_constraints_add_their_shifts():
    pipeline, x = tiny_pipeline(SCHEDULERS["ddpm"], alignment=True), past(1)
    mean = KnowledgeAlignmentCallback(5.0, frame_mean, guidance_scale=20.0)
    network = KnowledgeAlignmentCallback(intensity_change(0.1, 0.2, 2), guidance_scale=1.0)
    free, first, second, both = (
        run(pipeline, x, ensemble_size=1, callback_on_step_end=MultiPipelineCallbacks([*guides, FirstStep()])).latents
        for guides in ([], [mean], [network], [mean, network])
    )
    assert (first - free).abs().max() > 1e-4 and (second - free).abs().max() > 1e-4
    torch.testing.assert_close(both - free, (first - free) + (second - free), rtol=1e-3, atol=1e-6)


def test_targets_from_the_context():
    x = past(2)
    last = x[:, -1].mean((1, 2, 3))
    torch.testing.assert_close(intensity_change(0.1, 0.2, -1)(x), last - 0.1)
    assert (intensity_change(0.0, 0.3, -2)(x * 0.1) >= 0).all()
    assert mean_intensity(0.1, 0.2, 2) == 0.5
    conserving = KnowledgeAlignmentCallback(frame_mean, frame_mean)
    torch.testing.assert_close(conserving._target(x, 2), frame_mean(x)[:, None].expand(-1, 2))


def test_the_observed_future_only_as_an_oracle():
    future = past(2)[:, :2]
    with pytest.raises(ValueError, match="oracle=True"):
        KnowledgeAlignmentCallback(future_values=future)
    guide = KnowledgeAlignmentCallback(future_values=future, oracle=True)
    torch.testing.assert_close(guide.target, future.mean((1, 2, 3, 4)))
    with pytest.raises(ValueError, match="not both"):
        KnowledgeAlignmentCallback(1.0, future_values=future, oracle=True)


@pytest.mark.parametrize(
    ("callback", "scheduler", "message"),
    [
        (KnowledgeAlignmentCallback(torch.zeros(3)), "ddpm", r"\(B, E\) = \(2, 4\), got \(3,\)"),
        (KnowledgeAlignmentCallback(torch.zeros(4)), "ddpm", r"got \(4,\)"),
        (KnowledgeAlignmentCallback(torch.zeros(2, 1)), "ddpm", r"got \(2, 1\)"),
        (KnowledgeAlignmentCallback(1.0), "flow", "trained on the noise of DDPM"),
        (KnowledgeAlignmentCallback(1.0), "unipc flow", "trained on the noise of DDPM"),
        (KnowledgeAlignmentCallback(1.0), "dpm-solver++ flow", "trained on the noise of DDPM"),
        (KnowledgeAlignmentCallback(1.0, guidance_scale=float("nan")), "ddpm", "`guidance_scale` must be a finite"),
        (KnowledgeAlignmentCallback(1.0, guidance_scale="much"), "ddpm", "`guidance_scale` must be a finite"),
        (MultiPipelineCallbacks([KnowledgeAlignmentCallback(torch.zeros(5))]), "ddpm", r"got \(5,\)"),
    ],
)
def test_guidance_that_cannot_work_is_refused_before_any_computation(callback, scheduler, message):
    flows = {"unipc flow": GUIDED["UniPC flow"], "dpm-solver++ flow": GUIDED["DPM-Solver++ flow"]}
    pipeline = tiny_pipeline((SCHEDULERS | flows)[scheduler], alignment=True)
    pipeline.vae.encode = None  # would fail
    with pytest.raises(ValueError, match=message):
        run(pipeline, past(2), ensemble_size=4, callback_on_step_end=callback)


def test_a_target_must_be_finite_and_given():
    for target in (float("nan"), "much", None):
        with pytest.raises(ValueError, match="target"):
            run(tiny_pipeline(alignment=True), past(1), callback_on_step_end=KnowledgeAlignmentCallback(target))


def test_guidance_moves_alike_under_all_schedulers():
    """The same pull on exact Gaussian latents, in long schedules: within a factor of two of DDIM."""
    moved = {}
    for name in ("ddim", "dpm-solver++", "unipc", "euler"):
        pipeline, x = gaussian(name), past(1)
        guide = KnowledgeAlignmentCallback(9.0, lambda frames: 3 * frame_mean(frames), guidance_scale=30.0)
        options = {"ensemble_size": 2, "num_inference_steps": 20, "latents": torch.randn(1, 2, 2, 6, 8, 4)}
        free, guided = (run(pipeline, x, **options, callback_on_step_end=c).predictions for c in (None, guide))
        moved[name] = float((guided - free).mean())
    assert all(0.5 < move / moved["ddim"] < 2 for move in moved.values()), moved


def test_half_precision_guidance_and_inference_mode():
    pipeline, x = gaussian("ddim", alignment=True), past(1)
    options = {"ensemble_size": 1, "num_inference_steps": 4, "generator": None}
    options["latents"] = torch.randn(1, 1, 2, 6, 8, 4)
    callbacks = [KnowledgeAlignmentCallback(2.0, frame_mean), KnowledgeAlignmentCallback(2.0, guidance_scale=2.0)]
    for guide in callbacks:
        exact = run(pipeline, x, **options, callback_on_step_end=guide).latents
        with torch.inference_mode():
            torch.testing.assert_close(run(pipeline, x, **options, callback_on_step_end=guide).latents, exact)
        half = gaussian("ddim", alignment=True)
        half.unet.to(torch.bfloat16)
        close = run(half, x, **options, callback_on_step_end=guide).latents
        assert (
            half.unet.dtype == torch.bfloat16
            and close.dtype == torch.float32
            and half.alignment.dtype == torch.float32
        )
        torch.testing.assert_close(close.float(), exact, rtol=0.1, atol=0.1)


def test_guidance_needs_its_network():
    with pytest.raises(ValueError, match="alignment"):
        run(tiny_pipeline(), past(1), callback_on_step_end=KnowledgeAlignmentCallback(1.0))
    shape = {"sample_size": (6, 8), "prediction_length": 5, "in_channels": 4, "block_out_channels": (16,)}
    guide = KnowledgeAlignmentCallback(1.0, alignment=EarthformerAlignmentModel(**shape))
    with pytest.raises(ValueError, match="prediction_length is 5, that of the latents is 2"):
        run(tiny_pipeline(), past(1), callback_on_step_end=guide)


# -- quantities -------------------------------------------------------------------------------------------------------


def test_the_energy_of_n_bodies_belongs_to_their_force_and_is_kept():
    torch.manual_seed(0)
    positions = (100 * torch.rand(2, 3, 2, dtype=torch.float64)).requires_grad_()
    velocities = torch.randn(2, 3, 2, dtype=torch.float64)

    def force(positions):
        pulls = torch.zeros_like(positions)
        for i in range(3):
            for j in range(3):
                difference = positions[:, j] - positions[:, i]
                size = (difference.square().sum(-1, keepdim=True) + 100).sqrt()
                pulls[:, i] += 0.05 * difference / size
        return pulls

    energy = n_body_energy(positions, velocities)
    (slope,) = torch.autograd.grad(energy.sum(), positions)
    torch.testing.assert_close(-slope, force(positions))
    assert energy.shape == (2,)
    here, there = positions.detach(), velocities
    for _ in range(500):  # leapfrog
        there = there + 0.05 * force(here)
        here = here + 0.1 * there
        there = there + 0.05 * force(here)
    assert (here - positions).abs().mean() > 5
    torch.testing.assert_close(n_body_energy(here, there), energy.detach(), rtol=1e-5, atol=0)
