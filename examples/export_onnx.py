"""Export a model, or one denoising step of PreDiff, to ONNX for batches of any size, and compare it with torch.

    python examples/export_onnx.py --model model_cards/earthformer-radar-tiny
    python examples/export_onnx.py --model model_cards/prediff-radar-small    # its unet

The file runs in onnxruntime without torch and without this package. What its numbers are is told by the entry
"feature_extractor" of its metadata, as in preprocessor_config.json: values are (raw - offset) x scale, and units, time
step, spacing, missing value and tables are those of the raw ones. Needs `pip install -e '.[export]'`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from earthformer_hf import EarthformerFeatureExtractor, EarthformerForPrediction, EarthformerUNetModel, sharing
from earthformer_hf.errors import ends_in_one_line


try:
    import onnxruntime
except ModuleNotFoundError as reason:
    raise SystemExit(f"error: {reason}; install it with: pip install -e '.[export]'") from None


Network = EarthformerForPrediction | EarthformerUNetModel
TOLERANCE = 1e-4  # between the two runtimes, in the model's range


def random_inputs(network: Network, batch: int) -> dict[str, torch.Tensor]:
    """Everything that `network` takes, by name, each with the batch as first axis."""
    config, random = network.config, torch.Generator().manual_seed(batch)

    def frames(time: int, size, channels: int) -> torch.Tensor:
        return torch.rand(batch, time, *size, channels, generator=random)

    if isinstance(network, EarthformerUNetModel):
        size, channels = config.sample_size, config.in_channels
        inputs = {
            "sample": frames(config.prediction_length, size, channels),
            "timestep": torch.randint(1000, (batch,), generator=random),
            "context": frames(config.context_length, size, channels),
        }
        if config.condition_channels:
            inputs["condition"] = frames(config.prediction_length, size, config.condition_channels)
        return inputs
    inputs = {"past_values": frames(config.context_length, config.image_size, config.num_channels)}
    if config.num_covariates:
        inputs["past_covariates"] = frames(config.context_length, config.image_size, config.num_covariates)
        inputs["future_covariates"] = frames(config.prediction_length, config.image_size, config.num_covariates)
    if config.num_time_features:
        inputs["past_time_features"] = frames(config.context_length, (), config.num_time_features)
    return inputs


def export(network: Network, path: Path, extractor: EarthformerFeatureExtractor | None = None):
    """Write `network` as ONNX: inputs as it names them, one output, the batch free, the scaling as metadata."""
    inputs = random_inputs(network, batch=2)  # a traced batch of 1 would stay 1
    output = "prediction" if isinstance(network, EarthformerUNetModel) else "predictions"
    # Fused kernels lay their results out in another order, which ONNX has no name for.
    with sdpa_kernel(SDPBackend.MATH):
        program = torch.onnx.export(
            network.eval(), kwargs=inputs, dynamic_shapes={name: {0: "batch"} for name in inputs},
            output_names=[output], dynamo=True, verbose=False,
        )  # fmt: skip
    if extractor is not None:
        program.model.metadata_props["feature_extractor"] = json.dumps(extractor.to_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path)


@torch.no_grad()
def difference(network: Network, path: Path, batch: int) -> float:
    """The largest difference between the outputs of the file in onnxruntime and of `network` in torch, on the CPU."""
    inputs = random_inputs(network, batch)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return float(np.abs(output - network(**inputs, return_dict=False)[0].numpy()).max())


@ends_in_one_line
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="model_cards/earthformer-radar-tiny", help="a model folder, or a hub id")
    parser.add_argument("--output", type=Path, default=Path("outputs/model.onnx"), help="file to write")
    arguments = parser.parse_args()
    _, model, extractor = sharing.load(arguments.model)
    network = getattr(model, "unet", model).float()
    export(network, arguments.output, extractor or getattr(model, "feature_extractor", None))
    for batch in (1, 3):
        found = difference(network, arguments.output, batch)
        print(f"batch of {batch}: onnxruntime and torch differ by at most {found:.1e}")
        if found > TOLERANCE:
            raise ValueError(f"that is more than {TOLERANCE}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
