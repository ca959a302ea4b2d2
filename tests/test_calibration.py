"""Calibration: intensities as frequent as the observed ones."""

import sys

import numpy as np
import pytest
import torch
from tiny import ROOT, frames, tiny_config, tiny_model, tiny_pipeline

from earthformer_hf import EarthformerConfig, EarthformerForPrediction, PreDiffPipeline
from earthformer_hf.calibration import calibrated
from earthformer_hf.pipeline_prediff import decode_latents, forecast_latents
from earthformer_hf.training.calibration import correction_weights, crps_calibration, quantile_calibration


sys.path.insert(0, str(ROOT / "examples"))
from calibrate_earthformer import bounded  # noqa: E402


TABLE = [[0.0, 0.2, 0.6], [0.0, 0.2, 0.6], [0.0, 0.3, 0.5], [-0.1, 0.1, 0.7], [0.0, 0.1, 0.2]]  # 4 lead times


def test_values_between_knots_are_interpolated_and_shifted_beyond():
    predictions = torch.linspace(-1, 2, 61).repeat(2, 4, 1).view(2, 4, 61, 1, 1)
    found = calibrated(predictions, TABLE).numpy()
    for lead, said in enumerate(TABLE[1:]):
        x = predictions[0, lead, :, 0, 0].numpy()
        expected = np.interp(x, said, TABLE[0])
        expected = np.where(x < said[0], x - said[0] + TABLE[0][0], expected)
        expected = np.where(x > said[-1], x - said[-1] + TABLE[0][-1], expected)
        np.testing.assert_allclose(found[1, lead, :, 0, 0], expected, atol=1e-6)


def test_a_model_applies_its_calibration_and_keeps_it(tmp_path):
    model = tiny_model()
    inputs = {"past_values": frames(model.config)}
    plain = model(**inputs).predictions
    model.config.calibration = TABLE
    found = model(**inputs).predictions
    torch.testing.assert_close(found, calibrated(plain, TABLE))
    assert (found - plain).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    again = EarthformerForPrediction.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).predictions, found)


@pytest.mark.parametrize("table", [TABLE[:-1], [row[:1] for row in TABLE], [*TABLE[:-1], [0.0, 0.0, 1.0]]])
def test_a_table_that_cannot_be_is_refused(table):
    with pytest.raises(ValueError, match="`calibration` must be 5 rising rows of one length"):
        EarthformerConfig(**tiny_config().to_diff_dict() | {"calibration": table})


def test_calibrated_values_are_as_frequent_as_the_observed_ones():
    random = torch.Generator().manual_seed(0)
    future = torch.rand(40, 2, 16, 16, 1, generator=random) ** 2
    predictions = future.clone()
    predictions[:, 1] = 0.6 * future[:, 1].sqrt() ** 3 + 0.05  # too weak, and never dry
    predictions += 0.02 * torch.randn(future.shape, generator=random)
    observed = torch.rand(future.shape, generator=random) > 0.1
    values = [0.0, 0.1, 0.3, 0.8]
    table = quantile_calibration([(predictions[:20], future[:20], observed[:20])] * 2, values)
    assert table[0] == values and all(row[0] == 0 for row in table)
    found = calibrated(predictions, table)
    for lead in (0, 1):
        seen = observed[:20, lead]
        for value in values[1:]:
            expected = (future[:20, lead][seen] >= value).float().mean()
            share = (found[:20, lead][seen] >= value).float().mean()
            assert share.item() == pytest.approx(expected.item(), abs=0.01)
    assert (predictions[:, 1] >= 0.8).float().mean() < 0.01 < (future[:, 1] >= 0.8).float().mean()
    more = quantile_calibration([(predictions[:20], future[:20], observed[:20])], [*values, 1.5])  # never observed
    for row in more[1:]:
        assert row[-1] == pytest.approx(1.5 + row[-2] - 0.8)
    with pytest.raises(ValueError, match="nothing to calibrate from"):
        quantile_calibration([], values)


@pytest.mark.parametrize("shift, strength", [(0.1, 1.0), (0.4, 0.25), (1.0, 0.0)])
def test_a_calibration_keeps_a_part_of_the_gain_in_squared_error(shift, strength):
    """Of a network with the error 0.01 and a guess with 0.04, three quarters may go: 0.0325 = 0.01 + shift^2."""
    random = torch.Generator().manual_seed(0)
    future = torch.rand(20, 1, 32, 32, 1, generator=random)
    sign = torch.randint(0, 2, future.shape, generator=random) * 2.0 - 1
    values, said = [-9.0, 9.0], [-9.0 - shift, 9.0 - shift]  # every value is raised by the shift
    table = bounded([values, said], future + 0.1 * sign, future, future + 0.2 * sign)
    np.testing.assert_allclose(table, [values, [value - strength * shift for value in values]], atol=1e-5)


def test_weights_of_the_correction_have_the_least_squared_error():
    random = torch.Generator().manual_seed(0)
    guess, signal, noise = torch.randn(3, 30, 4, 20, 28, 1, generator=random)
    future = guess + signal
    future[:5, :, :4] = torch.nan
    sure = torch.tensor([0.0, 0.5, 1.0, 2.0])[:, None, None, None]  # noise beside the signal
    weights = correction_weights(guess + signal + sure * noise, future, guess)
    np.testing.assert_allclose(weights, [1, 0.8, 0.5, 0.2], atol=0.02)  # 1 / (1 + sure^2)
    assert correction_weights(guess - signal, future, guess) == [0, 0, 0, 0]
    assert correction_weights(guess, future, guess) == [1, 1, 1, 1]  # of a network that adds nothing


def test_a_model_weighs_its_correction():
    torch.manual_seed(0)
    model = tiny_model(first_guess="persistence")
    torch.nn.init.normal_(model.head.out_proj.weight)
    inputs = {"past_values": frames(model.config)}
    with torch.no_grad():
        plain, guess = model(**inputs).predictions, model.model(**inputs).first_guess
        model.config.correction_weights = [0.0, 0.25, 0.5, 1.0]
        found = model(**inputs).predictions
    assert torch.equal(found[:, 0], guess[:, 0]) and torch.equal(found[:, 3], plain[:, 3])
    torch.testing.assert_close(found[:, 2], (guess[:, 2] + plain[:, 2]) / 2)
    for options in ({"first_guess": "persistence", "correction_weights": [1.0]}, {"correction_weights": [1.0] * 4}):
        with pytest.raises(ValueError, match="`correction_weights` must be 4 finite numbers, of a model with a first"):
            tiny_config(**options)


# -- ensembles --------------------------------------------------------------------------------------------------------


ENSEMBLE_TABLE = [[0.0, 0.2, 0.6], [0.0, 0.3, 0.5], [-0.1, 0.1, 0.7]]  # 2 lead times


def test_a_pipeline_applies_its_calibration_to_every_member_alone_and_keeps_it(tmp_path):
    pipeline = tiny_pipeline()
    past = torch.rand(1, 3, 12, 16, 1)
    latents = torch.randn(1, 3, 2, 6, 8, 4)
    plain = pipeline(past, 3, 2, latents=latents, output_type="pt").predictions
    pipeline.register_to_config(calibration=ENSEMBLE_TABLE)
    found = pipeline(past, 3, 2, latents=latents, output_type="pt").predictions
    torch.testing.assert_close(found[0], calibrated(plain[0], ENSEMBLE_TABLE))
    assert (found - plain).abs().max() > 0.01
    pipeline.save_pretrained(tmp_path)
    again = PreDiffPipeline.from_pretrained(tmp_path)
    alone = again(past, 1, 2, latents=latents[:, 1:2], output_type="pt").predictions
    torch.testing.assert_close(alone[:, 0], found[:, 1])


@pytest.mark.parametrize(
    "table", [ENSEMBLE_TABLE[:2], 3, [[0.0, 1.0]] * 2 + [[1.0, 0.0]], [["0", "1"]] * 3, [[0.0]] * 3]
)
def test_a_pipeline_refuses_what_was_not_fitted_for_it(table):
    with pytest.raises(ValueError, match="`calibration` must be 3 rising rows of one length"):
        PreDiffPipeline(**tiny_pipeline().components, calibration=table)


def test_guidance_with_decoded_frames_sees_what_is_returned():
    """A quantity that is read from frames is that of the calibrated ones."""
    pipeline = tiny_pipeline()
    pipeline.register_to_config(calibration=ENSEMBLE_TABLE)
    latents = torch.randn(4, 2, 6, 8, 4)
    found = pipeline.decode(latents)
    torch.testing.assert_close(found, calibrated(decode_latents(pipeline.vae, latents), ENSEMBLE_TABLE))


BLEND = [[1.1, -0.4, 0.3], [0.9, -0.2, 0.3]]  # member, control, forecast


def test_a_pipeline_blends_each_member_with_its_control_and_its_forecast(tmp_path):
    pipeline = tiny_pipeline(forecaster=True)
    pipeline.set_progress_bar_config(disable=True)
    past = torch.rand(2, 3, 12, 16, 1)
    latents = torch.randn(2, 3, 2, 6, 8, 4)
    plain = pipeline(past, 3, 3, latents=latents, output_type="latent").latents
    control = pipeline(past, 1, 3, latents=torch.zeros(2, 1, 2, 6, 8, 4), output_type="latent").latents
    with torch.no_grad():
        forecast = forecast_latents(pipeline.forecaster, pipeline.vae, past)[:, None]
    own, calm, told = (torch.tensor(BLEND)[:, k, None, None, None] for k in range(3))
    expected = own * plain + calm * control + told * forecast
    pipeline.register_to_config(blend=BLEND)
    pipeline.save_pretrained(tmp_path)
    again = PreDiffPipeline.from_pretrained(tmp_path)
    found = again(past, 3, 3, latents=latents, output_type="pt", max_batch_size=2)
    torch.testing.assert_close(found.latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.predictions[1], decode_latents(again.vae, found.latents[1]))
    alone = again(past[1:], 1, 3, latents=latents[1:, 2:], output_type="pt").predictions
    torch.testing.assert_close(alone[0, 0], found.predictions[1, 2], rtol=1e-4, atol=1e-5)


def test_a_callback_sees_the_clean_latents_that_are_decoded():
    """After the last step of DDIM, what the network saw is what remains."""
    pipeline, seen = tiny_pipeline(), []
    pipeline.register_to_config(blend=[[0.5, 0.5], [1.0, -0.1]])  # without a forecaster

    def note(pipeline, step, timestep, tensors):
        seen.append(tensors["denoised_latents"])
        return {}

    options = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["denoised_latents"]}
    latents = pipeline(torch.rand(1, 3, 12, 16, 1), 2, 3, **options).latents
    torch.testing.assert_close(seen[-1], latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blend", [BLEND[:1], [[1.0, 0.0]] * 2, [[1.0, 0.0, float("nan")]] * 2, 1, [["1"] * 3] * 2])
def test_a_blend_of_something_else_is_refused(blend):
    message = "`blend` must be 2 rows of finite weights of member, control, forecast"
    with pytest.raises(ValueError, match=message):
        PreDiffPipeline(**tiny_pipeline(forecaster=True).components, blend=blend)


def test_the_least_crps_finds_what_an_ensemble_is_made_of():
    """Members scatter about a control, what follows about a forecast; twice as much at the second lead time."""
    random = torch.Generator().manual_seed(0)
    control, forecast = 0.4 + 0.1 * torch.randn(2, 40, 2, 16, 16, 1, generator=random)
    noise = 0.05 * torch.randn(9, 40, 2, 16, 16, 1, generator=random)
    members, future = control + noise[1:], forecast + noise[0]
    future[:, 1] += noise[0, :, 1]
    observed = torch.rand(future.shape, generator=random) > 0.1
    future = torch.where(observed, future, torch.nan)
    blend, table = crps_calibration([members, control, forecast], future, observed, [-1.0, 0.0, 1.0])
    np.testing.assert_allclose(blend, [[1, -1, 1], [2, -2, 1]], atol=0.05)
    np.testing.assert_allclose(table, [[-1, 0, 1]] * 3, atol=0.1)


def test_without_anything_in_common_members_keep_their_weight():
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(6, 30, 1, 16, 16, 1, generator=random)
    future, members = 0.4 + 0.1 * noise[0], 0.5 + 0.05 * noise[1:]
    observed = torch.ones_like(future, dtype=torch.bool)
    blend, table = crps_calibration([members], future, observed, [0.0, 1.0])
    assert blend == [[1.0]] and table[0] == [0.0, 1.0]
    found = calibrated(members.flatten(0, 1), table)
    assert found.mean() == pytest.approx(0.4, abs=0.01) and found.std() == pytest.approx(0.1, abs=0.01)
