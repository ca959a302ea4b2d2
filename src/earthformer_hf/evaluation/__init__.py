"""Evaluation: scores under named protocols, beside forecasts without a neural network."""

from .evaluate import evaluate, run_protocol
from .forecasters import (
    Window,
    baseline_forecaster,
    data_extractor,
    model_forecaster,
    pipeline_forecaster,
    protocol_windows,
    window_at,
)
from .protocols import PROTOCOLS, Protocol
from .reports import compare


__all__ = [
    "PROTOCOLS",
    "Protocol",
    "Window",
    "baseline_forecaster",
    "compare",
    "data_extractor",
    "evaluate",
    "model_forecaster",
    "pipeline_forecaster",
    "protocol_windows",
    "run_protocol",
    "window_at",
]
