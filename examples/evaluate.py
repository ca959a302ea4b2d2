"""Score a model under the protocol that its feature extractor names, beside forecasts without a neural network.

python examples/evaluate.py --model model_cards/earthformer-radar-tiny
python examples/evaluate.py --model model_cards/earthformer-sst-small
python examples/evaluate.py --model model_cards/prediff-radar-tiny     # ensembles: half an hour on two cores
"""

import argparse
import json
import os
from pathlib import Path

from transformers import AutoFeatureExtractor, AutoModelForTimeSeriesPrediction
from transformers.utils import cached_file

from earthformer_hf import PreDiffPipeline
from earthformer_hf.baselines import has_extrapolation
from earthformer_hf.benchmark_metrics import correlation_by_lead, rmse_by_lead
from earthformer_hf.data import open_radar, open_sst
from earthformer_hf.data.windows import Windows
from earthformer_hf.evaluation import (
    dressed_ensembles,
    ensemble_table,
    forecast_ensembles,
    index_table,
    rain_table,
    score_ensembles,
    score_index,
    score_rain,
    steps_ensembles,
)
from earthformer_hf.protocols import PROTOCOLS, IndexProtocol, RainProtocol


def data_file(name: str) -> Path:
    """A file of the folder EARTHFORMER_HF_DATA (default ../shared/data)."""
    path = Path(os.environ.get("EARTHFORMER_HF_DATA", "../shared/data")) / name
    if not path.exists():
        raise SystemExit(f"{path} does not exist: set EARTHFORMER_HF_DATA to the folder that holds {name}.")
    return path


def evaluate_rain(protocol: RainProtocol, model, extractor) -> dict:
    events = open_radar.load_events(data_file(protocol.file), protocol.split, protocol.sources)
    lengths = model.config.context_length, model.config.prediction_length
    windows = Windows(events, extractor.encode, *lengths, stride=protocol.window_stride)
    systems = score_rain(model, extractor, windows, has_extrapolation())
    print(rain_table(systems, extractor, protocol.score_name, events[0]["geo"]["minutes"]))
    if not has_extrapolation():
        print("extrapolation: not installed")
    return {
        system: {
            "csi_mean": kinds["code"]["csi"].mean(),
            "csi": kinds["code"]["csi"].tolist(),
            "mse": float(kinds["errors"]["mse"]),
            "windows": int(kinds["errors"]["windows"]),
            "pixels": int(kinds["errors"]["pixels"].sum()),
            "counts": _counts(kinds["code"], extractor.thresholds),
            "counts_physical": _counts(kinds["physical"], extractor.physical_thresholds),
        }
        for system, kinds in systems.items()
    }


def ensemble_windows(protocol: RainProtocol, pipeline, split: str | None = None) -> Windows:
    """The protocol's windows as the pipeline takes them; of another split if one is named."""
    events = open_radar.load_events(data_file(protocol.file), split or protocol.split, protocol.sources)
    lengths = pipeline.unet.config.context_length, pipeline.unet.config.prediction_length
    extractor = pipeline.feature_extractor
    return Windows(events, extractor.encode, *lengths, protocol.window_stride, protocol.frame_stride)


def evaluate_ensembles(protocol: RainProtocol, pipeline, ensemble_size: int, num_inference_steps: int) -> dict:
    windows, train_windows = (ensemble_windows(protocol, pipeline, split) for split in (None, "train"))
    extractor = pipeline.feature_extractor
    systems = {
        "dressed persistence": dressed_ensembles(windows, train_windows, ensemble_size, extractor),
        "PreDiff": forecast_ensembles(pipeline, windows, ensemble_size, num_inference_steps),
    }
    if has_extrapolation():
        systems["STEPS"] = steps_ensembles(windows, ensemble_size, extractor)
    scores = score_ensembles(systems, windows, extractor)
    minutes = windows.events[0]["geo"]["minutes"] * protocol.frame_stride
    print(f"{ensemble_size} members, {num_inference_steps} steps of {type(pipeline.scheduler).__name__}")
    print(ensemble_table(scores, protocol.score_name, minutes))
    if not has_extrapolation():
        print("STEPS: not installed")
    return {
        system: {
            "ensemble_size": ensemble_size,
            "fair_crps": float(score["ensemble"]["fair_crps"]),
            "fair_crps_by_lead": score["ensemble"]["fair_crps_by_lead"].tolist(),
            "csi_mean": score["code"]["csi"].mean(),
            "mse": float(score["errors"]["mse"]),
            "windows": int(score["errors"]["windows"]),
            "pixels": int(score["errors"]["pixels"].sum()),
            "counts": _counts(score["code"], extractor.thresholds),
        }
        for system, score in scores.items()
    }


def _counts(scores: dict, thresholds: list[float]) -> dict:
    """Name -> (thresholds, leads), with the thresholds they were counted at."""
    names = ("hits", "misses", "false_alarms", "correct_negatives")
    return {"thresholds": thresholds} | {name: scores[name].tolist() for name in names}


def evaluate_index(protocol: IndexProtocol, model, extractor) -> dict:
    path = data_file(protocol.file)
    (train_event,), (event,) = (open_sst.load_events(path, s) for s in (protocol.train_split, protocol.split))
    systems, targets = score_index(model, extractor, event, train_event)
    print(index_table(systems, targets, protocol.score_name))
    return {
        system: {
            "skill": float(correlation_by_lead(forecast, targets).mean()),
            "rmse": float(rmse_by_lead(forecast, targets).mean()),
            "windows": len(targets),
        }
        for system, forecast in systems.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder, or <your-namespace>/<name>")
    parser.add_argument("--output", type=Path, help="write the scores and their counts to this JSON file")
    parser.add_argument("--ensemble_size", type=int, default=8, help="of a pipeline")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="of a pipeline")
    arguments = parser.parse_args()
    if cached_file(arguments.model, "model_index.json", _raise_exceptions_for_missing_entries=False):
        pipeline = PreDiffPipeline.from_pretrained(arguments.model)
        extractor = pipeline.feature_extractor
    else:
        pipeline = None
        model = AutoModelForTimeSeriesPrediction.from_pretrained(arguments.model).eval()
        extractor = AutoFeatureExtractor.from_pretrained(arguments.model)
    protocol = PROTOCOLS.get(extractor.protocol)
    if protocol is None:
        raise SystemExit(f"{arguments.model}: unknown protocol {extractor.protocol!r}; known are {sorted(PROTOCOLS)}.")
    print(f"protocol {protocol.name}: {protocol.description}", flush=True)
    if pipeline is not None:
        scores = evaluate_ensembles(protocol, pipeline, arguments.ensemble_size, arguments.num_inference_steps)
    elif isinstance(protocol, RainProtocol):
        scores = evaluate_rain(protocol, model, extractor)
    else:
        scores = evaluate_index(protocol, model, extractor)
    if arguments.output:
        arguments.output.write_text(json.dumps({"protocol": protocol.name, "scores": scores}, indent=1))


if __name__ == "__main__":
    main()
