"""Windows in the latents of an autoencoder, encoded once and kept on disk."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset, Subset
from transformers.utils import logging

from ..modeling_earthformer import EarthformerForPrediction
from ..pipeline_prediff import encode_frames, forecast_latents


logger = logging.get_logger(__name__)
WINDOWS_PER_FILE = 64


def own_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen of a model's configuration, without what its library adds.

    Args:
        config: a transformers `to_dict()` or a diffusers `config`.
    """
    of_library = ("architectures", "dtype", "transformers_version", "name_or_path")
    return {name: value for name, value in config.items() if name not in of_library and name[0] != "_"}


class EncodedWindows(Dataset):
    """Latents of the first windows of a data set, encoded once, so that training need not run the encoder.

    Item n is a function of n alone, for every n: each pass over the windows has an order of its own. It is a dict of
    tensors: `context_latents` (T_in, h, w, c) and `future_latents` (T_out, h, w, c) float32, the posterior's mode,
    stored in half precision; `context_mean` (T_in,) and `future_mean` (T_out,), the mean of each frame in the model's
    range, of the future over observed values only, NaN where nothing was observed; and, with a `forecaster`,
    `condition_latents` (T_out, h, w, c), of what it forecasts from `past_values` alone. Windows without observed
    context or future are left out.

    Args:
        windows: items as of [`~earthformer_hf.data.windows.Windows`].
        vae: encodes the frames, on the device where it is.
        num_windows: how many windows.
        folder: where files of windows are kept, below a name that follows from `vae`, `forecaster` and `description`;
            what is there already is not encoded again. On several processes the first one writes.
        description: all that the windows follow from.
        seed: of the order.
        forecaster: whose forecasts are encoded too, on the device where it is; none if omitted.
    """

    def __init__(
        self,
        windows: Dataset,
        vae: AutoencoderKL,
        num_windows: int,
        folder: str | Path,
        description: str,
        seed: int = 0,
        forecaster: EarthformerForPrediction | None = None,
    ):
        made_of = f"{description} {vae.config.scaling_factor} {vae.config.shift_factor}".encode() + _weights(vae)
        if forecaster is not None:
            made_of += json.dumps(own_entries(forecaster.config.to_dict()), sort_keys=True).encode()
            made_of += _weights(forecaster)
        name = hashlib.sha256(made_of).hexdigest()[:16]
        self.windows, self.folder, self.seed = windows, Path(folder) / name, seed
        self.order: tuple[int, np.ndarray] | None = None
        self.paths = [self.folder / f"{start:08d}.safetensors" for start in range(0, num_windows, WINDOWS_PER_FILE)]
        with PartialState().main_process_first():
            self._encode(windows, vae, forecaster, num_windows)
        self.files = [safetensors.safe_open(path, "pt") for path in self.paths]
        futures = torch.cat([file.get_tensor("future_mean") for file in self.files])
        self.rows = futures.isfinite().any(1).nonzero()[:, 0].tolist()  # those with an observed context and future
        if not self.rows:
            raise ValueError(f"EncodedWindows: none of {num_windows} windows has an observed context and future.")
        if left_out := num_windows - len(self.rows):
            logger.warning(f"{left_out} of {num_windows} windows without observed context or future are left out.")

    @torch.no_grad()
    def _encode(
        self, windows: Dataset, vae: AutoencoderKL, forecaster: EarthformerForPrediction | None, num_windows: int
    ):
        self.folder.mkdir(parents=True, exist_ok=True)
        for start, path in logging.tqdm(
            list(zip(range(0, num_windows, WINDOWS_PER_FILE), self.paths)), desc="encode windows"
        ):
            if path.exists():
                continue
            positions = range(start, min(start + WINDOWS_PER_FILE, num_windows))
            parts: list[dict[str, torch.Tensor]] = []
            for batch in DataLoader(Subset(windows, positions), 8):
                future, observed = batch["future_values"], batch["future_observed_mask"]
                mean = torch.where(observed, future, torch.nan).flatten(2).nanmean(2)
                part = {"context_mean": batch["past_values"].flatten(2).mean(2), "future_mean": mean}
                for name, frames in (("context_latents", batch["past_values"]), ("future_latents", future)):
                    part[name] = encode_frames(vae, frames.to(vae.device)).half()
                if forecaster is not None:
                    past_values = batch["past_values"].to(forecaster.device)
                    part["condition_latents"] = forecast_latents(forecaster, vae, past_values).half()
                parts.append(part)
            tensors = {name: torch.cat([part[name].cpu() for part in parts]).contiguous() for name in parts[0]}
            safetensors.torch.save_file(tensors, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def digest(self) -> str:
        """What the latents follow from: windows, networks and description."""
        return self.folder.name

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        epoch, within_epoch = divmod(position, len(self.rows))
        if self.order is None or self.order[0] != epoch:  # drawn once an epoch
            # a spawn key: [seed, epoch] would be what TrainingWindows draws from, for numpy fills up with zeros
            random = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
            self.order = epoch, random.permutation(self.rows)
        file, row = divmod(int(self.order[1][within_epoch]), WINDOWS_PER_FILE)
        return {name: self.files[file].get_slice(name)[row].float() for name in self.files[file].keys()}

    def stacked(self, name: str) -> torch.Tensor:
        """One entry of all items, (windows, ...), in the order in which the windows were encoded."""
        return torch.cat([file.get_tensor(name) for file in self.files])[self.rows]


def _weights(network: torch.nn.Module) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in network.state_dict().items()})


__all__ = ["EncodedWindows", "own_entries"]
