"""Motion and extrapolation: fields moved by a known amount, what was not observed, gradients, and the model on top."""

import math

import pytest
import torch
from tiny import inputs_of, tiny_config, tiny_model

from earthformer_hf import EarthformerForPrediction
from earthformer_hf.advection import advect, estimate_motion, first_guess


SIZE = (61, 83)  # odd: no grid of the pyramid is half of the next


def positions(size=SIZE) -> torch.Tensor:
    """(H, W, 2) columns and rows from the centre, in pixels."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in size), indexing="ij")
    return torch.stack([columns, rows], dim=-1)


def field(places: torch.Tensor) -> torch.Tensor:
    """A smooth field of showers, 0..1, at any places (..., 2)."""
    x, y = places.unbind(-1)
    waves = torch.sin(0.31 * x + 0.11 * y) + torch.sin(0.13 * x - 0.27 * y + 1) + torch.sin(0.05 * x + 0.23 * y + 2)
    return (waves / 6 + 0.5) ** 2


def moving(matrix, shift=(0.0, 0.0), steps: int = 3, size=SIZE) -> torch.Tensor:
    """Frames (1, steps, H, W) of a field under the flow places -> matrix @ places + shift of a frame."""
    places, frames = positions(size), []
    back = torch.linalg.inv(torch.tensor(matrix))
    for _ in range(steps):
        frames.append(field(places))
        places = (places - torch.tensor(shift)) @ back.T
    return torch.stack(frames)[None]


def turn(angle: float) -> list[list[float]]:
    return [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]


STILL = [[1.0, 0.0], [0.0, 1.0]]
FLOWS = {
    "sub-pixel": (STILL, (0.4, -0.3)),
    "fast": (STILL, (-6.3, 4.6)),
    "rotation": (turn(0.04), (0.0, 0.0)),
    "divergence": ([[1.03, 0.0], [0.0, 1.03]], (0.0, 0.0)),
    "rotation and shift": (turn(-0.03), (1.7, 0.6)),
}


def inner(tensor: torch.Tensor, border: int = 10) -> torch.Tensor:
    """Rows and columns away from the edges, of a tensor (..., H, W)."""
    return tensor[..., border:-border, border:-border]


@pytest.mark.parametrize("name", FLOWS)
def test_known_flows(name):
    matrix, shift = FLOWS[name]
    frames = moving(matrix, shift, steps=7)
    expected = positions() @ torch.tensor(matrix).T + torch.tensor(shift) - positions()
    motion = estimate_motion(frames[:, :3])[0]
    error = inner((motion - expected).norm(dim=-1))
    assert error.mean() < 0.1 and error.max() < 0.35, (error.mean(), error.max())

    forecast, reach = advect(frames[:, 2], motion[None], 4)
    miss, stay = (forecast - frames[:, 3:]).abs(), (frames[:, 2:3] - frames[:, 3:]).abs()
    assert inner(miss)[inner(reach) == 1].mean() < 0.12 * inner(stay).mean()


def test_displacements_are_composed_and_the_field_is_interpolated_once():
    """Along the true flow of a rotation, the last of 20 frames is nearly as exact as one interpolation."""
    matrix = turn(0.05)
    frames = moving(matrix, steps=21)
    motion = (positions() - positions() @ torch.linalg.inv(torch.tensor(matrix)).T)[None]  # the exact way back
    forecast, reach = advect(frames[:, 0], motion, 20)
    error = (forecast - frames[:, 1:]).abs() * (reach == 1)
    assert inner(error[:, -1]).max() < 0.02
    repeated = frames[:, 0]
    for _ in range(20):
        repeated = advect(repeated, motion, 1)[0][:, 0]
    assert inner((repeated - frames[:, 20]).abs() * (reach[:, -1] == 1)).max() > 0.1
    whole = advect(frames[:, 0], torch.full((1, *SIZE, 2), 3.0), 2)[0]  # whole pixels are copied
    torch.testing.assert_close(whole[0, 1, 6:, 6:], frames[0, 0, :-6, :-6], rtol=0, atol=1e-5)


def test_reach_is_what_came_from_observed_pixels():
    last, mask = torch.ones(1, 8, 10), torch.ones(1, 8, 10, dtype=torch.bool)
    mask[:, 3, 4] = False
    motion = torch.tensor([1.5, 0.0]).expand(1, 8, 10, 2)
    forecast, reach = advect(last, motion, 2, mask)
    expected = torch.ones(2, 8, 10)
    expected[0, :, 0], expected[0, :, 1] = 0, 0.5
    expected[1, :, :3] = 0
    expected[0, 3, 5:7] = 0.5  # half of the missing pixel came along
    expected[1, 3, 7] = 0
    torch.testing.assert_close(reach[0], expected)
    torch.testing.assert_close(forecast, reach)  # a field of ones, 0 elsewhere
    nowhere = advect(last.masked_fill(~mask, float("nan")), motion, 2, mask)[0]
    assert torch.equal(nowhere, forecast)


@pytest.mark.parametrize("filled", [0.0, 5.0, float("nan")])
def test_missing_pixels_make_no_motion(filled):
    frames = moving(STILL, (1.3, -0.7))
    mask = torch.ones(frames.shape, dtype=torch.bool)
    mask[:, :, :, 30:42] = False  # a beam that stays
    for frame in range(3):
        mask[:, frame, 12 + 8 * frame : 20 + 8 * frame, 50:70] = False  # a hole that moves
    motion = estimate_motion(frames.masked_fill(~mask, filled), mask)
    expected = torch.tensor([1.3, -0.7])
    assert inner((motion[0] - expected).norm(dim=-1)).max() < 0.3
    if filled == 5.0:
        assert inner((estimate_motion(frames.masked_fill(~mask, filled))[0] - expected).norm(dim=-1)).max() > 1
    nothing = estimate_motion(frames, torch.zeros_like(mask))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_dry_fields_do_not_move_and_small_ones_work():
    assert torch.equal(estimate_motion(torch.zeros(2, 3, 20, 28)), torch.zeros(2, 20, 28, 2))
    for size in ((1, 1), (3, 9), (8, 8)):
        assert torch.isfinite(estimate_motion(torch.rand(1, 2, *size))).all()


def test_gradients():
    torch.manual_seed(0)
    frames = moving(STILL, (0.6, 0.2), size=(9, 11)).double().requires_grad_()

    def forecast(frames):
        return advect(frames[:, -1], estimate_motion(frames, iterations=1, levels=2), 2)[0]

    assert torch.autograd.gradcheck(forecast, frames, fast_mode=True)


def test_half_precision_and_autocast_move_as_single_precision_does():
    frames = moving(STILL, (2.3, -1.2))
    motion = estimate_motion(frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(estimate_motion(frames), motion)
    half = frames.bfloat16()
    assert inner((estimate_motion(half) - motion)[0].norm(dim=-1)).max() < 0.2
    assert advect(half[:, -1], motion, 2)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda: estimate_motion(torch.rand(1, 1, 8, 8)), "`frames` must be floating point.*two frames"),
        (lambda: estimate_motion(torch.rand(1, 3, 8, 8), torch.ones(1, 3, 8, 8)), "`mask` must be boolean"),
        (lambda: advect(torch.rand(1, 1, 8, 8), torch.zeros(1, 8, 8, 2), 1), "`last` must be"),
        (lambda: advect(torch.rand(1, 8, 8), torch.zeros(1, 2, 8, 8), 1), "`motion` must have shape"),
        (lambda: tiny_config(first_guess="optical flow"), "`first_guess` must be one of"),
        (lambda: tiny_config(first_guess="advection", context_length=2), "`context_length` must be at least 3"),
        (
            lambda: tiny_config(first_guess="persistence", num_output_channels=2),
            "`num_output_channels` must be at most",
        ),
    ],
)
def test_bad_input_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        function()


# -- the model --------------------------------------------------------------------------------------------------------


def guessing_model(kind: str = "advection", trained: bool = True, **changes) -> EarthformerForPrediction:
    """A model whose last map is not 0, as after training."""
    model = tiny_model(first_guess=kind, num_channels=2, **changes)
    if trained:
        torch.nn.init.normal_(model.head.out_proj.weight, std=0.1)
    return model


@pytest.mark.parametrize("kind", ["persistence", "advection"])
def test_an_untrained_model_forecasts_the_first_guess(kind, tmp_path):
    model = guessing_model(kind, trained=False, num_output_channels=1, num_covariates=2)
    inputs = inputs_of(model.config)
    past = inputs["past_values"] = moving(STILL, (1.2, 0.4), size=(20, 28))[..., None].repeat(2, 1, 1, 1, 2)
    mask = torch.ones(past.shape, dtype=torch.bool)
    mask[:, :, 5:9, 3:8] = False
    if kind == "persistence":
        expected = past[:, -1:, ..., :1].repeat(1, 4, 1, 1, 1) * mask[:, -1:, ..., :1]
    else:
        seen = mask[..., 0]
        motion = estimate_motion(past[..., 0], seen)
        expected = advect(past[:, -1, ..., 0], motion, 4, seen[:, -1])[0][..., None]
    assert torch.equal(model(**inputs, past_observed_mask=mask).predictions, expected)
    model.save_pretrained(tmp_path)
    loaded = EarthformerForPrediction.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs, past_observed_mask=mask).predictions, expected)
    assert not torch.equal(loaded(**inputs).predictions, expected)
    elsewhere = EarthformerForPrediction.from_pretrained(tmp_path, image_size=[17, 30], prediction_length=5)
    inputs = inputs_of(elsewhere.config)
    guess, _ = first_guess(kind, inputs["past_values"], 5, 1)
    assert torch.equal(elsewhere(**inputs).predictions, guess)
    with pytest.raises(ValueError, match="`past_observed_mask` must be boolean"):
        model(**inputs_of(model.config), past_observed_mask=mask.float())


def test_a_trained_model_adds_to_the_first_guess(tmp_path):
    """Each predicted channel has a guess of its own; what is added depends on the guess, and learns."""
    model = guessing_model()
    inputs = inputs_of(model.config)
    guess, reach = first_guess("advection", inputs["past_values"], 4, 2)
    alone = [first_guess("advection", inputs["past_values"][..., [i]], 4, 1)[0] for i in (0, 1)]
    torch.testing.assert_close(guess, torch.cat(alone, dim=-1))
    start = model.model.guess_stem(torch.cat([guess, reach], dim=-1))
    decoded = model.model.decoder(model.model.encoder(model.model.stem(inputs["past_values"])).memories, start)
    added = model.head(decoded.last_hidden_state, torch.cat([guess, reach], dim=-1))
    torch.testing.assert_close(model(**inputs).predictions, guess + added)
    model.save_pretrained(tmp_path)
    loaded = EarthformerForPrediction.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).predictions, model(**inputs).predictions)
    model.train()(**inputs, future_values=torch.randn_like(guess)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_model_without_a_first_guess_has_the_published_parameters():
    plain, guessing = tiny_model(), tiny_model(first_guess="persistence")
    names = {name for name, _ in guessing.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert names and all("guess_stem" in n or "decoder.down_" in n or "decoder." in n for n in names)
    assert plain.head.out_proj.weight.any() and not guessing.head.out_proj.weight.any()
    assert "first_guess" not in plain(**inputs_of(plain.config))


class Guess(torch.nn.Module):
    def forward(self, past: torch.Tensor, mask: torch.Tensor):
        return first_guess("advection", past, 2, 1, mask)


def test_the_first_guess_compiles_as_one_graph():
    """Export with any batch is in `test_export.py`."""
    past = torch.rand(2, 3, 7, 6, 1)
    mask = torch.rand(past.shape) < 0.8
    torch._dynamo.reset()
    compiled = torch.compile(Guess(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(past, mask), Guess()(past, mask))
