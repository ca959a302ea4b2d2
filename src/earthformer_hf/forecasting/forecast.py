"""Forecast any grid: from observations in a user's units, on a user's grid, to a dataset on the same or the model's.

```
observations -> mm/h -> means over areas -> the model's range -> tiles, hop by hop -> mm/h -> the user's grid
                                                                  with one field of noise
```
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..advection import advect, estimate_motion
from ..data.coarsening import area_means
from ..data.file_times import parsed_step
from ..data.measures import UNKNOWN, alike
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from .dataset import Products, forecast_dataset
from .grids import Grid, check_spacing, coarsening
from .mosaic import blended, cover, padded_to
from .nowcasters import Nowcaster, load_nowcaster
from .numbers import Numbers, numbers_of
from .observations import Observations, north_up, observe


logger = logging.get_logger(__name__)
MOTION_FRAMES = 3
MEMORY = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
OVERLAP = 0.25  # of a tile


@dataclass(frozen=True)
class Context:
    """What the model sees, on its own grid.

    Args:
        values: (T_in, h, w) float32, in the model's range.
        observed: of the same shape.
        missing: (H, W) of the data's own grid, where the last frame was not observed.
        grid: of the model's maps.
        factor: cells of the data's grid to one of the model's.
        dry: what no rain is in `values`; None of what is no rain.
        motion: (h, w, 2) of the last frames of rain, in pixels per frame, see [`~earthformer_hf.advection`]; or None.
        time: of the last frame, for a model that looks at the season; or None.
    """

    values: np.ndarray
    observed: np.ndarray
    missing: np.ndarray
    grid: Grid
    factor: float
    dry: float | None = None
    motion: torch.Tensor | None = None
    time: np.datetime64 | None = None


def forecast(
    model: Any,
    data: Any,
    *,
    lead: str | None = None,
    ensemble_size: int = 8,
    num_inference_steps: int | None = None,
    seed: int = 0,
    guide: str | None = None,
    coarsen_to: str | None = None,
    resample_time: str | None = None,
    grid: str = "input",
    members: bool = True,
    mean: bool = False,
    percentiles: Sequence[float] = (),
    thresholds: Sequence[float] = (),
    neighbourhood: str | None = None,
    overlap: int | None = None,
    max_memory: str = "4GB",
    max_batch_size: int | None = None,
    device: str | None = None,
    feature_extractor: EarthformerFeatureExtractor | None = None,
    **about_data: Any,
):
    """Forecast what follows the last frames of a user's data.

    Args:
        model: a folder, a hub id, an [`EarthformerForPrediction`] or a [`PreDiffPipeline`].
        data: see [`~earthformer_hf.forecasting.observe`]: an array, an xarray object, or files, of any grid size.
        lead: how far, such as "2h"; beyond the model's prediction length its forecasts are fed back to it. The
            prediction length if omitted.
        ensemble_size: members, of a pipeline.
        num_inference_steps: denoising steps, of a pipeline.
        seed: of a pipeline's noise. A member is the same whatever the number of members.
        guide: of a pipeline with an alignment network: "change=+2sigma" asks for a mean over each tile that changes
            by the usual change plus two standard deviations.
        coarsen_to: the model's grid spacing, such as "3 km", where that of the data is finer: means over areas.
        resample_time: the model's time step, such as "4m", where that of the data differs: frames between two
            observed ones are both of these, moved along the motion between them.
        grid: of what is returned: that of the "input", or the "model".
        members: whether the members themselves are returned.
        mean: whether the mean of the members is.
        percentiles: of the members, 0..100.
        thresholds: in mm/h, or the units of the model: the chance, 0..1, that each is reached, at each time and at
            any time of the forecast.
        neighbourhood: such as "10 km": of a pixel, the chance that the threshold is reached anywhere within this
            distance.
        overlap: of neighbouring tiles, in pixels of the model; a quarter of a tile if omitted.
        max_memory: for the arrays of the forecast, such as "4GB".
        max_batch_size: members in one call of a pipeline's networks.
        device: such as "cpu" or "cuda:1"; the best there is if omitted or "auto".
        feature_extractor: of a model that comes without one.
        about_data: `variable`, `units`, `time_step`, `grid_spacing`, `crs`, `start`, `until`, and options of files,
            see [`~earthformer_hf.forecasting.observe`].

    Returns:
        `xarray.Dataset` by the CF conventions, 1.11: the forecast (realization, lead_time, y, x), its products, and
        `quality_flag`. Missing where the last frame was not observed. Where no rain was observed in a whole tile, none
        is forecast. Rows and columns are in the order of the data, whichever it is: a model of rain sees the north
        above and the west on the left, as in the radar data that such models are trained on. Training and evaluation
        take the rows of files as they are: give them files whose first row is the northernmost.

    Raises:
        ValueError: an argument or data that cannot work; each names what would.
    """
    options = {"num_inference_steps": num_inference_steps, "guide": guide, "max_batch_size": max_batch_size}
    nowcaster = load_nowcaster(model, feature_extractor, device, **options)
    products = Products(members, mean, tuple(percentiles), tuple(thresholds), grid, neighbourhood)
    products.check(nowcaster.makes_ensembles, ensemble_size)
    observations = observe(data, **about_data)
    numbers = numbers_of(observations.facts, nowcaster.extractor)
    back: dict[str, slice] = {}
    if numbers.is_rain:
        observations, back = north_up(observations)
    context = context_of(observations, nowcaster, numbers, coarsen_to, resample_time)
    length = lead_frames(lead, nowcaster)
    size = ensemble_size if nowcaster.makes_ensembles else 1
    at_once = members_at_once(max_memory, size, length, context, products)
    parts = []
    for first in range(0, size, at_once):
        some = range(first, min(first + at_once, size))
        raw = roll_out(nowcaster, context, some, length, seed, _overlap(overlap, nowcaster))  # (n, T, h, w)
        parts.append(numbers.linear_of_raw(raw))
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    settings: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guide": guide}
    settings |= {"seed": seed if nowcaster.makes_ensembles else None}
    settings |= {"coarsen_to": coarsen_to, "resample_time": resample_time}
    told = {setting: value for setting, value in settings.items() if value is not None}
    inflow = _inflow(context, length)
    found = forecast_dataset(values, observations, context, numbers.units, nowcaster, products, inflow, told)
    return found.isel(back)


# ---------------------------------------------------------------------------------------------------------------------
# The context
# ---------------------------------------------------------------------------------------------------------------------


def context_of(
    observations: Observations,
    nowcaster: Nowcaster,
    numbers: Numbers,
    coarsen_to: str | None = None,
    resample_time: str | None = None,
) -> Context:
    """The last frames of the observations as the model takes them.

    Raises:
        ValueError: another grid spacing or time step than the model's and no argument that converts it, too few
            frames, or a last frame of which nothing was observed.
    """
    extractor = nowcaster.extractor
    if nowcaster.channels != 1 or getattr(nowcaster.config, "num_covariates", False):
        raise ValueError(f"`model` must be of one variable without covariates, got {nowcaster.channels} channels.")
    time = None
    if extractor.time_features is not None:
        if not observations.is_dated or extractor.time_step == UNKNOWN:
            raise ValueError("`data`: the model looks at the season, and needs dates; state the first by `start`.")
        time = observations.time[-1]
    factor = 1.0
    if coarsen_to is not None:
        factor = coarsening(observations.grid, coarsen_to)
        if alike("grid_spacing", coarsen_to, extractor.grid_spacing) is False:
            raise ValueError(f"`coarsen_to` must be the model's {extractor.grid_spacing}, got {coarsen_to!r}.")
    else:
        check_spacing(observations.grid, extractor.grid_spacing)
    places = context_places(observations, nowcaster, resample_time)
    first = math.floor(places[0])
    total = len(observations.time)
    linear = []
    missing = np.empty(0)
    for frame in range(first, total):  # one by one: frames of a fine grid are large
        values = numbers.linear_of(observations.read(slice(frame, frame + 1)))
        missing = ~np.isfinite(values[0])
        linear.append(area_means(values, factor)[0])
    encoded, observed = extractor.encode(numbers.raw_of(np.stack(linear)))
    _check_observed(np.any(observed, axis=(1, 2)), observations, first)
    values, observed = _at_places(encoded, observed, places - first)
    grid = observations.grid.coarser(factor)
    if not numbers.is_rain:
        return Context(values, observed, missing, grid, factor, time=time)
    dry = float(extractor.encode(numbers.raw_of(np.zeros(1)))[0][0])
    frames, seen = (torch.from_numpy(array[-MOTION_FRAMES:])[None] for array in (values, observed))
    motion = estimate_motion(frames, seen)[0] if frames.shape[1] > 1 else None
    return Context(values, observed, missing, grid, factor, dry, motion, time)


def _times(context: Context, nowcaster: Nowcaster, hop: int) -> np.ndarray | None:
    """(T_in,) datetime64 of the frames that the model sees in a hop, from 0; None if it does not look at them."""
    if context.time is None:
        return None
    step = parsed_step(nowcaster.extractor.time_step)
    frames = hop * nowcaster.prediction_length + np.arange(1 - nowcaster.context_length, 1)
    unit = np.datetime_data(step)[0]
    return (context.time.astype(f"datetime64[{unit}]") if unit in "MY" else context.time) + step * frames


def _check_observed(seen: np.ndarray, observations: Observations, first: int) -> None:
    """Refuse frames (n,), from the frame `first` on, of which nothing was observed in the last."""
    if not seen.any():
        raise ValueError("`data`: nothing was observed in the frames that the forecast needs.")
    if not seen[-1]:
        last = first + int(np.flatnonzero(seen)[-1])
        if observations.is_dated:
            end, time = observations.time[-1], observations.time[last]
            hint = f"of {end}; the last that was observed is of {time}: `until={str(time)!r}` forecasts from it."
        else:
            hint = f"frame {len(observations.time) - 1}; end the data at frame {last}, the last that was observed."
        raise ValueError(f"`data`: nothing was observed in the last frame, {hint}")


def context_places(observations: Observations, nowcaster: Nowcaster, resample_time: str | None) -> np.ndarray:
    """Where the frames of the context lie among those of the data, (T_in,), fractions between two.

    Raises:
        ValueError: another time step than the model's, or too few frames.
    """
    wanted, given = nowcaster.extractor.time_step, observations.facts.time_step
    total, length = len(observations.time), nowcaster.context_length
    if resample_time is not None and resample_time != wanted:
        raise ValueError(f"`resample_time` must be the model's {wanted}, got {resample_time!r}.")
    if given == UNKNOWN and wanted != UNKNOWN:
        raise ValueError(f"`data`: its time step is unknown, the model takes {wanted}; state it by `time_step`.")
    ratio = 1.0
    if wanted != UNKNOWN and not alike("time_step", given, wanted):
        step, own = parsed_step(wanted), parsed_step(given)
        calendar = any(np.datetime_data(each)[0] in "MY" for each in (step, own))
        if resample_time is None or calendar:
            raise ValueError(
                f"`data` has a frame every {given}, the model takes one every {wanted}"
                + ("." if calendar else f": `resample_time={wanted!r}` makes such frames.")
            )
        ratio = float(step / own)
    places = total - 1 - ratio * np.arange(length - 1, -1, -1)
    if places[0] < -1e-6:
        needed = math.ceil(ratio * (length - 1) - 1e-6) + 1
        since = f" from {observations.time[0]} to {observations.time[-1]}" if observations.is_dated else ""
        raise ValueError(
            f"`data`: {needed} frames without a hole are needed, there are {total}{since}; give more frames, or "
            "`until` a time with so many before it."
        )
    whole = np.abs(places - np.rint(places)) < 1e-6
    return np.where(whole, np.rint(places), places)


def _at_places(values: np.ndarray, observed: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames (T, h, w) at the places (n,): between two, both are moved along the motion between them."""
    frames, masks = [], []
    for place in places:
        before = math.floor(place)
        part = place - before
        if part == 0:
            frames.append(values[before])
            masks.append(observed[before])
            continue
        pair = torch.from_numpy(np.stack([values[before], values[before + 1]]))[None]
        seen = torch.from_numpy(np.stack([observed[before], observed[before + 1]]))[None]
        motion = estimate_motion(pair, seen)
        ahead, ahead_seen = advect(pair[:, 0], part * motion, 1, seen[:, 0])
        back, back_seen = advect(pair[:, 1], (part - 1) * motion, 1, seen[:, 1])
        weights = (1 - part) * ahead_seen, part * back_seen
        total = (weights[0] + weights[1])[0, 0]
        mixed = ((1 - part) * ahead + part * back)[0, 0] / total.clamp(min=1e-6)
        mask = total.numpy() >= 0.5
        frames.append(np.where(mask, mixed.numpy(), values[before]))
        masks.append(mask)
    return np.stack(frames).astype("float32"), np.stack(masks)


# ---------------------------------------------------------------------------------------------------------------------
# The forecast
# ---------------------------------------------------------------------------------------------------------------------


def lead_frames(lead: str | None, nowcaster: Nowcaster) -> int:
    """How many frames reach a lead time; the model's own length if it is omitted.

    Raises:
        ValueError: no lead time, or none that is whole frames.
    """
    if lead is None:
        return nowcaster.prediction_length
    step, wanted = parsed_step(nowcaster.extractor.time_step), parsed_step(lead, "lead")
    of_calendar = {np.datetime_data(each)[0] in "MY" for each in (step, wanted)}
    frames = float(wanted / step) if len(of_calendar) == 1 else 0.0
    if frames < 1 or abs(frames - round(frames)) > 1e-6:
        text = nowcaster.extractor.time_step
        raise ValueError(f"`lead` must be a multiple of the model's time step, {text}, got {lead!r}.")
    return round(frames)


def _overlap(overlap: int | None, nowcaster: Nowcaster) -> int:
    return int(OVERLAP * min(nowcaster.tile)) if overlap is None else overlap


def roll_out(
    nowcaster: Nowcaster, context: Context, members: range, length: int, seed: int, overlap: int
) -> np.ndarray:
    """Forecasts (E, T, h, w) in the model's raw values: beyond the prediction length from the forecasts themselves.

    Each member goes on from its own forecast, of the whole map, so that tiles see what their neighbours forecast. A
    tile in which it rained nowhere stays dry, without a forecast.
    """
    extractor, pixels = nowcaster.extractor, nowcaster.latent_pixels
    tiles = cover(context.grid.shape, nowcaster.tile, overlap, pixels)
    past = torch.from_numpy(context.values)[None, ..., None]  # (1, T_in, h, w, 1)
    seen = torch.from_numpy(context.observed)[None, ..., None]
    fill = 0.0 if tiles.padded == tiles.shape else float(extractor.encode(np.array(np.nan))[0])
    motion = None
    if context.motion is not None and len(tiles.corners) > 1:
        motion = padded_to(context.motion[None, None], tiles, 0.0)[0, 0]
    hops, found = math.ceil(length / nowcaster.prediction_length), []
    bar = logging.tqdm(total=hops * len(tiles.corners), desc="tiles", disable=hops * len(tiles.corners) == 1)
    for hop in range(hops):
        noise = nowcaster.noise(members, hop, seed, tiles.padded)
        inputs = padded_to(past, tiles, fill), padded_to(seen, tiles, 0)
        time = _times(context, nowcaster, hop)

        def predict(place: tuple[slice, slice], inputs=inputs, noise=noise, time=time) -> torch.Tensor:
            bar.update()
            part, observed = (tensor[:, :, *place] for tensor in inputs)
            if context.dry is not None and not (observed & (part != context.dry)).any():
                return torch.full((len(members), nowcaster.prediction_length, *part.shape[2:]), context.dry)
            latents = (slice(side.start // pixels, side.stop // pixels) for side in place)
            return nowcaster.predict(part, observed, None if noise is None else noise[:, :, *latents], time)

        def reach(place: tuple[slice, slice], motion=motion) -> torch.Tensor:
            return _reach(motion[place], torch.ones(tiles.tile, dtype=torch.bool), nowcaster.prediction_length)

        raw = extractor.decode(blended(predict, tiles, None if motion is None else reach))  # (E, T_out, h, w, 1)
        if not np.isfinite(raw).all():
            raise ValueError("`model` forecast values that are not finite.")
        found.append(raw[..., 0])
        if hop + 1 < hops:
            again = torch.from_numpy(extractor.encode(raw)[0])
            past = _gone_on(past, again, nowcaster.context_length)
            seen = _gone_on(seen, seen[:, -1:].expand(*again.shape), nowcaster.context_length)
    bar.close()
    return np.concatenate(found, axis=1)[:, :length]


def _gone_on(past: torch.Tensor, future: torch.Tensor, length: int) -> torch.Tensor:
    """The last frames of contexts (1 or E, T, ...) followed by what came after (E, T_out, ...)."""
    return torch.cat([past.expand(len(future), *past.shape[1:]), future], dim=1)[:, -length:]


def _inflow(context: Context, length: int) -> np.ndarray | None:
    """(T, h, w), where what arrives along the motion was not observed, for half of it or more; None without motion."""
    if context.motion is None:
        return None
    seen = torch.from_numpy(context.observed[-1])
    return (_reach(context.motion, seen, length) < 0.5).numpy()


def _reach(motion: torch.Tensor, observed: torch.Tensor, length: int) -> torch.Tensor:
    """(T, h, w), 0..1: how much of what arrives along the motion (h, w, 2) was observed (h, w)."""
    return advect(torch.zeros(1, *observed.shape), motion[None], length, observed[None])[1][0]


def members_at_once(max_memory: str, size: int, length: int, context: Context, products: Any) -> int:
    """How many members are forecast together, so that all arrays of the forecast fit.

    Raises:
        ValueError: no amount of memory, or one that the results alone exceed.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", max_memory.strip().upper())
    if match is None:
        raise ValueError(f"`max_memory` must be such as '4GB', got {max_memory!r}.")
    limit = float(match[1]) * MEMORY[match[2]]
    model_map, user_map = 4 * context.values[0].size, 4 * context.missing.size
    maps = user_map if products.grid == "input" else model_map
    result = size * length * model_map + products.count(size, length) * maps
    working = 4 * length * model_map  # of one member: sum, weights, raw and linear values
    if result + working > limit:
        raise ValueError(
            f"`max_memory`: the forecast alone takes {(result + working) / 1e9:.2g} GB, {max_memory} are allowed; "
            "`members=False` keeps products alone, `grid='model'` is smaller than the data's grid."
        )
    return max(1, min(size, int((limit - result) // working)))


__all__ = ["Context", "context_of", "context_places", "forecast", "lead_frames", "members_at_once", "roll_out"]
