"""Motion of a field from frame to frame, and the field carried along it: the extrapolation that a nowcast starts from.

```
frames (B, T, H, W) -> estimate_motion -> motion (B, H, W, 2)                       pixels per frame: columns, rows
last frame (B, H, W), motion -> advect -> forecast (B, T_out, H, W), reach (B, T_out, H, W)
past_values (B, T_in, H, W, C) -> first_guess -> guess, reach (B, T_out, H, W, C_out)     for Earthformer's decoder
```

All are tensor operations without a branch that depends on values: they are differentiable, compile and export.

Sources: Lucas and Kanade, "An iterative image registration technique with an application to stereo vision", IJCAI
1981; Bouguet, "Pyramidal implementation of the Lucas Kanade feature tracker", Intel, 2000, here with a flow vector in
every pixel; Germann and Zawadzki, "Scale-dependence of the predictability of precipitation from continental radar
images, part I", Monthly Weather Review 130, 2002, the semi-Lagrangian scheme of section 3.
"""

import math

import torch
import torch.nn.functional as F


SMALLEST = 4  # pixels of the shorter side, below which a level of the pyramid is not halved further
MAX_STEP = 2.0  # pixels of a level by which one iteration may change the motion

# What is forecast from the past alone -> frames of the past that it looks at.
FIRST_GUESSES = {"persistence": 1, "advection": 3}


def estimate_motion(
    frames: torch.Tensor,
    mask: torch.Tensor | None = None,
    levels: int = 4,
    iterations: int = 3,
    window: float = 5.0,
    ridge: float = 1e-4,
) -> torch.Tensor:
    """The motion common to all pairs of neighbouring frames, by Lucas and Kanade's method on a pyramid of grids.

    On each grid, from the coarsest to the finest, each pair is brought together half-way along the motion found so
    far. The change of motion in a pixel is the one that best explains what difference is left around it: the least
    squares of gradient . change + difference, weighted by a Gaussian. Where nothing has a gradient, the motion is that
    of the nearest places that have one.

    Args:
        frames: (B, T, H, W) values of about 0..1, oldest first; at least two frames of any size.
        mask: bool, (B, T, H, W), true where a value was observed; everywhere if omitted. Other values, NaN as well,
            have no influence.
        levels: grids at most; each has half the resolution of the one before.
        iterations: changes of the motion on each grid.
        window: standard deviation in pixels of the Gaussian, on each grid.
        ridge: added to the mean squared gradients, in units of `frames` squared; weaker structure does not move.

    Returns:
        (B, H, W, 2) pixels per frame to the right and downwards, float32 or that of more precise frames.

    Raises:
        ValueError: `frames` or `mask` has another shape or type.
    """
    if frames.ndim != 4 or frames.shape[1] < 2 or not frames.is_floating_point():
        raise ValueError(
            "`frames` must be floating point of shape (batch, time, height, width) with two frames or more, got "
            f"{frames.dtype} of shape {tuple(frames.shape)}."
        )
    frames, observed = _observed_values("frames", frames, mask)
    with torch.autocast(frames.device.type, enabled=False):
        pyramid = [(frames, observed)]
        while len(pyramid) < levels and min(pyramid[-1][0].shape[-2:]) >= 2 * SMALLEST:
            pyramid.append(_halved(*pyramid[-1]))
        motion = torch.zeros_like(pyramid[-1][0][:, :2])  # (B, 2, h, w)
        for i, (values, seen) in enumerate(reversed(pyramid)):
            if i > 0:
                height, width = values.shape[-2:]
                motion = 2 * F.interpolate(motion, scale_factor=2.0, mode="bilinear")[..., :height, :width]
            values = _blurred(values, 0.7) / _blurred(seen, 0.7).clamp(min=1e-6)
            for _ in range(iterations):
                motion = _improved(motion, values, seen, window, ridge)
    return motion.permute(0, 2, 3, 1)


def advect(
    last: torch.Tensor, motion: torch.Tensor, steps: int, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A field carried along a motion that stays as it is.

    The way back from each pixel is followed frame by frame, and the field is interpolated once, at its end, so that
    later frames are not smoother than earlier ones.

    Args:
        last: (B, H, W) the field.
        motion: (B, H, W, 2) pixels per frame to the right and downwards, of [`estimate_motion`].
        steps: frames to forecast.
        mask: bool, (B, H, W), true where `last` was observed; everywhere if omitted.

    Returns:
        (B, steps, H, W) the forecast, in the type of `last`; 0 where it would come from outside or from where nothing
        was observed. And of the same shape its reach, 0..1: how much of a value came from observed pixels.

    Raises:
        ValueError: an argument has another shape or type.
    """
    if last.ndim != 3 or not last.is_floating_point():
        raise ValueError(
            f"`last` must be floating point of shape (batch, height, width), got {last.dtype} of shape "
            f"{tuple(last.shape)}."
        )
    if motion.shape != (*last.shape, 2):
        raise ValueError(f"`motion` must have shape {(*last.shape, 2)}, got {tuple(motion.shape)}.")
    dtype = last.dtype
    last, observed = _observed_values("last", last, mask)
    with torch.autocast(last.device.type, enabled=False):
        velocity = motion.to(last.dtype).permute(0, 3, 1, 2)  # (B, 2, H, W)
        sources = torch.stack([last, observed], dim=1)
        displacement, carried = torch.zeros_like(velocity), []
        for _ in range(steps):
            displacement = velocity + _sampled(displacement, -velocity, "border")
            carried.append(_sampled(sources, -displacement, "zeros"))
        forecast, reach = torch.stack(carried, dim=2).unbind(1)  # (B, steps, H, W) each
    return forecast.to(dtype), reach.to(dtype)


def first_guess(
    kind: str,
    past_values: torch.Tensor,
    prediction_length: int,
    num_output_channels: int,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A forecast of the first channels of the past, each by itself.

    Args:
        kind: "persistence", the last frame repeated; or "advection", the last frame carried along the motion of the
            last three.
        past_values: (B, T_in, H, W, C); for the motion, of about 0..1.
        prediction_length, num_output_channels: frames and channels to forecast.
        mask: bool, (B, T_in, H, W, C), true where a value was observed; everywhere if omitted.

    Returns:
        (B, T_out, H, W, C_out) the forecast, 0 where it would come from outside or from where nothing was observed;
        and its reach, 0..1, of the same shape: how much of a value came from observed pixels.
    """
    past = past_values[:, -FIRST_GUESSES[kind] :, ..., :num_output_channels]
    mask = None if mask is None else mask[:, -FIRST_GUESSES[kind] :, ..., :num_output_channels]
    if kind == "persistence":
        last = past if mask is None else torch.where(mask, past, 0.0)
        reach = torch.ones_like(last) if mask is None else mask.to(last.dtype)
        last, reach = (x.expand(-1, prediction_length, -1, -1, -1) for x in (last, reach))
        return last, reach
    past = past.movedim(-1, 1).flatten(0, 1)  # (B * C_out, 3, H, W)
    mask = None if mask is None else mask.movedim(-1, 1).flatten(0, 1)
    motion = estimate_motion(past, mask)
    carried = advect(past[:, -1], motion, prediction_length, None if mask is None else mask[:, -1])
    guess, reach = (x.unflatten(0, (-1, num_output_channels)).movedim(1, -1) for x in carried)
    return guess, reach


def _observed_values(name: str, values: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The values in single precision or more, 0 where they were not observed, and 1 where they were."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if mask is None:
        return values, torch.ones_like(values)
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise ValueError(
            f"`mask` must be boolean of the shape of `{name}`, {tuple(values.shape)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}."
        )
    return torch.where(mask, values, 0.0), mask.to(values.dtype)


def _halved(values: torch.Tensor, observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the observed ones of 2 x 2 pixels, 0 if there are none, and their share; an odd edge is repeated."""
    edge = (0, values.shape[-1] % 2, 0, values.shape[-2] % 2)
    values, observed = (F.avg_pool2d(F.pad(x, edge, mode="replicate"), 2) for x in (values, observed))
    return values / observed.clamp(min=0.25), observed


def _improved(
    motion: torch.Tensor, values: torch.Tensor, observed: torch.Tensor, window: float, ridge: float
) -> torch.Tensor:
    """One iteration of Lucas and Kanade's method in every pixel.

    motion (B, 2, h, w), values and observed (B, T, h, w) -> motion (B, 2, h, w).
    """
    earlier, later = (torch.cat([values[:, part], observed[:, part]], 1) for part in (slice(-1), slice(1, None)))
    first, first_seen = _sampled(earlier, -motion / 2, "border").chunk(2, 1)
    second, second_seen = _sampled(later, motion / 2, "border").chunk(2, 1)
    middle, change, weight = (first + second) / 2, second - first, first_seen * second_seen
    x, y = _slope(middle), _slope(middle.mT).mT
    products = torch.stack([x * x, x * y, y * y, x * change, y * change], dim=1)  # (B, 5, pairs, h, w)
    xx, xy, yy, xt, yt = _blurred((products * weight[:, None]).sum(2), window).unbind(1)
    structure = (xx + yy)[:, None] + 1e-6
    xx, yy = xx + ridge, yy + ridge
    step = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / (xx * yy - xy * xy)[:, None]
    motion = motion + step.clamp(-MAX_STEP, MAX_STEP)
    return _blurred(motion * structure, window) / _blurred(structure, window).clamp(min=1e-12)


def _slope(image: torch.Tensor) -> torch.Tensor:
    """Half the difference of the right and the left neighbour, (B, C, h, w); 0 at the edges."""
    slope = (image[..., 2:] - image[..., :-2]) / 2
    before, after = image[..., :1], image[..., 1:][..., -1:]  # of a width of 1, nothing is after
    return torch.cat([torch.zeros_like(before), slope, torch.zeros_like(after)], dim=-1)


def _sampled(image: torch.Tensor, offset: torch.Tensor, outside: str) -> torch.Tensor:
    """The image (B, C, h, w) at each pixel plus its offset (B, 2, h, w), bilinear; outside "border" or "zeros"."""
    height, width = image.shape[-2:]
    columns = torch.arange(width, dtype=offset.dtype, device=offset.device)
    rows = torch.arange(height, dtype=offset.dtype, device=offset.device)[:, None]
    x, y = columns + offset[:, 0], rows + offset[:, 1]
    places = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)  # -1..1, edge to edge
    return F.grid_sample(image, places, padding_mode=outside, align_corners=False)


def _blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """The image (B, C, h, w) under a Gaussian of so many pixels, cut at three times that; beyond it is 0."""
    across_rows, across_columns = (_gaussian_matrix(image, size, sigma) for size in image.shape[-2:])
    return across_rows @ (image @ across_columns)


def _gaussian_matrix(image: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """The blur along an axis as a symmetric matrix (size, size), which costs a third of a convolution with 31 taps."""
    places = torch.arange(size, dtype=image.dtype, device=image.device)
    distance, radius = (places[:, None] - places).abs(), int(3 * sigma)
    total = sum(math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1))
    return torch.where(distance <= radius, torch.exp(-0.5 * (distance / sigma) ** 2) / total, 0.0)


__all__ = ["FIRST_GUESSES", "advect", "estimate_motion", "first_guess"]
