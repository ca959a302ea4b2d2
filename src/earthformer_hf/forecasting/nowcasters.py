"""A model or a pipeline as one thing that forecasts tiles in the model's range."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ..data.measures import canonical_units
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..guidance import KnowledgeAlignmentCallback, frame_mean, intensity_change
from ..modeling_earthformer import EarthformerForPrediction
from ..pipeline_prediff import PreDiffPipeline
from ..sharing.files import digests
from ..sharing.loading import load, to_single_precision


GUIDE = r"change=([+-]?\d+(?:\.\d+)?)sigma"


class Nowcaster:
    """An [`EarthformerForPrediction`] on one device.

    Args:
        model: it.
        extractor: of its numbers.
        identity: what a forecast says of it: `model_id`, `model_revision`, `weights_sha256`, as far as is known.
    """

    latent_pixels = 1  # rows and columns of one latent
    makes_ensembles = False

    def __init__(self, model: Any, extractor: EarthformerFeatureExtractor, identity: dict[str, str]):
        self.model, self.extractor, self.identity = model, extractor, identity
        config = self.config
        self.context_length, self.prediction_length = config.context_length, config.prediction_length

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the maps that it takes."""
        rows, columns = self.config.image_size
        return rows, columns

    @property
    def channels(self) -> int:
        return self.config.num_channels

    def noise(self, members: range, hop: int, seed: int, shape: tuple[int, int]) -> torch.Tensor | None:
        """Noise of a whole map of (H, W) pixels, (E, T_out, h, w, c); None of a model that draws none."""
        return None

    @torch.inference_mode()
    def predict(
        self,
        past: torch.Tensor,
        observed: torch.Tensor,
        noise: torch.Tensor | None = None,
        time: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Forecasts (N, T_out, H, W, C) of contexts (M, T_in, H, W, C) in the model's range.

        Args:
            observed: bool, of the shape of `past`.
            noise: (N, T_out, h, w, c), of ensembles. With one context, N members of it; else one of each.
            time: dates of the context, (T_in,) datetime64, of a model that looks at the season.
        """
        inputs = {"past_values": past, "past_observed_mask": observed}
        if time is not None:
            features = torch.from_numpy(self.extractor.time_features_of(time))
            inputs["past_time_features"] = features.expand(len(past), *features.shape)
        return self.model(**{name: tensor.to(self.model.device) for name, tensor in inputs.items()}).predictions


class EnsembleNowcaster(Nowcaster):
    """A [`PreDiffPipeline`] on one device.

    Args:
        num_inference_steps: denoising steps; the pipeline's default if omitted.
        guide: such as "change=+2sigma": the mean over each tile changes by the usual change plus so many deviations.
        max_batch_size: members in one call of the networks.

    Raises:
        ValueError: another text, or a pipeline whose alignment network does not know the usual change.
    """

    makes_ensembles = True

    def __init__(
        self,
        model: PreDiffPipeline,
        extractor: EarthformerFeatureExtractor,
        identity: dict[str, str],
        num_inference_steps: int | None = None,
        guide: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__(model, extractor, identity)
        self.options: dict[str, Any] = {"max_batch_size": max_batch_size}
        if num_inference_steps is not None:
            self.options["num_inference_steps"] = num_inference_steps
        self.deviations = None if guide is None else _deviations(guide, model)
        self.latent_pixels = 2 ** (len(model.vae.config.block_out_channels) - 1)
        model.set_progress_bar_config(disable=True)

    @property
    def config(self) -> Any:
        return self.model.unet.config

    @property
    def tile(self) -> tuple[int, int]:
        rows, columns = (self.latent_pixels * length for length in self.config.sample_size)
        return rows, columns

    @property
    def channels(self) -> int:
        return self.model.vae.config.in_channels

    def noise(self, members: range, hop: int, seed: int, shape: tuple[int, int]) -> torch.Tensor | None:
        """A member's noise follows from the seed, its number and the hop alone."""
        size = (self.prediction_length, *(length // self.latent_pixels for length in shape), self.config.in_channels)
        draws = []
        for member in members:
            text = f"{seed} {member} {hop}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
            draws.append(torch.randn(size, generator=generator))
        return torch.stack(draws)

    def predict(
        self,
        past: torch.Tensor,
        observed: torch.Tensor,
        noise: torch.Tensor | None = None,
        time: np.ndarray | None = None,
    ) -> torch.Tensor:
        if noise is None:
            raise ValueError("`noise` of ensembles is needed.")
        grid = (len(past), len(noise) // len(past))
        guide = {}
        if self.deviations is not None:
            usual = self.model.alignment.config.statistics
            target = intensity_change(usual["change_mean"], usual["change_deviation"], self.deviations)
            guide = {"callback_on_step_end": KnowledgeAlignmentCallback(target, frame_mean)}
        generator = torch.Generator().manual_seed(0)  # for schedulers that add noise at each step
        options = {"latents": noise.unflatten(0, grid), "generator": generator, "output_type": "pt"}
        found = self.model(past, ensemble_size=grid[1], **options, **self.options, **guide)
        return found.predictions.flatten(0, 1)


def _deviations(guide: str, pipeline: PreDiffPipeline) -> float:
    match = re.fullmatch(GUIDE, guide.replace(" ", ""))
    if match is None:
        raise ValueError(f"`guide` must be such as 'change=+2sigma', got {guide!r}.")
    statistics = getattr(getattr(pipeline.alignment, "config", None), "statistics", None) or {}
    if not {"change_mean", "change_deviation"} <= set(statistics):
        raise ValueError("`guide`: the alignment network of this pipeline does not know the usual change.")
    return float(match[1])


def load_nowcaster(
    model: Any,
    feature_extractor: EarthformerFeatureExtractor | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Nowcaster:
    """A nowcaster of a model.

    Args:
        model: a folder, a hub id, an [`EarthformerForPrediction`], a [`PreDiffPipeline`], or a nowcaster, of which
            another one with these options is made.
        feature_extractor: of the model; its own if omitted.
        device: where it computes; the best there is if omitted or "auto". A model that is given stays where it is if
            omitted.
        options: of [`EnsembleNowcaster`], for pipelines alone.

    Raises:
        ValueError: no such model, one without a feature extractor, or options that it does not take.
    """
    identity: dict[str, str] = {}
    if isinstance(model, str | Path):
        folder, loaded, found = load(model)
        parts = sorted(digests(folder).items())
        digest = parts[0][1] if len(parts) == 1 else hashlib.sha256(repr(parts).encode()).hexdigest()
        identity = {"model_id": str(model) if not Path(model).is_dir() else Path(model).resolve().name}
        identity["weights_sha256"] = digest
        if folder.parent.name == "snapshots":  # of the hub's cache
            identity["model_revision"] = folder.name
        device = device or "auto"
    elif isinstance(model, Nowcaster):
        loaded, found, identity = model.model, model.extractor, model.identity
    else:
        loaded, found = model, None
    if not isinstance(loaded, EarthformerForPrediction | PreDiffPipeline):
        raise ValueError(
            f"`model` must be a folder, a hub id, a PreDiffPipeline or an EarthformerForPrediction, got "
            f"{type(loaded).__name__}."
        )
    extractor = feature_extractor or found or getattr(loaded, "feature_extractor", None)
    if extractor is None:
        raise ValueError(
            "`feature_extractor`: the model has none, so that its units, time step and spacing are unknown; give one."
        )
    where = PartialState().device if device == "auto" else _known_device(device)  # None: where the model is
    if isinstance(model, str | Path):
        to_single_precision(loaded, where or PartialState().device)
    elif where is not None:  # in the precision that its owner chose
        loaded.to(where)  # type: ignore[arg-type]
    if isinstance(loaded, PreDiffPipeline):
        return EnsembleNowcaster(loaded, extractor, identity, **options)
    if given := sorted(name for name, value in options.items() if value is not None):
        raise ValueError(f"`{given[0]}` is for ensembles: {type(loaded).__name__} makes one forecast.")
    return Nowcaster(loaded.eval(), extractor, identity)


def _known_device(device: str | torch.device | None) -> str | torch.device | None:
    """
    Raises:
        ValueError: a device that this machine, or this build of PyTorch, does not have.
    """
    if device is None:
        return None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as reason:
        words = str(reason).strip().split("\n")[0]
        raise ValueError(f"`device`: {device} cannot be used here: {words}") from None
    return device


def describe(model: Any) -> dict[str, str]:
    """What a model takes and gives, in words.

    Args:
        model: see [`load_nowcaster`].

    Raises:
        ValueError: no such model, or one without a feature extractor.
    """
    nowcaster = model if isinstance(model, Nowcaster) else load_nowcaster(model, device="cpu")
    extractor, config = nowcaster.extractor, nowcaster.config
    rows, columns = nowcaster.tile
    network = nowcaster.model
    parts = [network]
    if isinstance(network, PreDiffPipeline):
        parts = [part for part in (network.vae, network.unet, network.forecaster) if part is not None]
    is_rain = canonical_units(extractor.physical_units or extractor.units or "") == "mm/h"
    found = {
        "model": nowcaster.identity.get("model_id", type(network).__name__),
        "forecasts": "rain rate" if is_rain else extractor.variable,
        "units": "mm/h, from rain in mm/h, mm, mm/day or dBZ" if is_rain else extractor.units,
        "takes": f"{nowcaster.context_length} frames, {extractor.time_step} apart, of {rows} x {columns} pixels of "
        f"{extractor.grid_spacing}; larger maps in tiles",
        "gives": f"{nowcaster.prediction_length} frames" + (", ensembles" if nowcaster.makes_ensembles else ""),
        "parameters": f"{sum(part.num_parameters() for part in parts):,}",
    }
    if extractor.thresholds or extractor.physical_thresholds:
        known = extractor.physical_thresholds or extractor.thresholds
        unit = extractor.physical_units if extractor.physical_thresholds else extractor.units
        found["scored at"] = f"{', '.join(f'{threshold:g}' for threshold in known)} {unit}"
    if getattr(config, "first_guess", None):
        found["first guess"] = config.first_guess
    if getattr(config, "linear_components", 0):
        season = "; looks at the calendar month" if config.num_time_features else ""
        found["linear forecast"] = f"of {config.linear_components} patterns in {config.linear_lags} frames{season}"
    if extractor.protocol:
        found["protocol"] = extractor.protocol
    return found | {"weights": nowcaster.identity.get("weights_sha256", "not of a folder")}


__all__ = ["EnsembleNowcaster", "Nowcaster", "describe", "load_nowcaster"]
