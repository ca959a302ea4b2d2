"""Evaluation: scores under named protocols, beside forecasts without a neural network."""

from .comparison import compare
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
from .own_protocol import load_protocol
from .protocols import PROTOCOLS, Protocol


__all__ = [
    "PROTOCOLS",
    "Protocol",
    "Window",
    "baseline_forecaster",
    "compare",
    "data_extractor",
    "evaluate",
    "load_protocol",
    "model_forecaster",
    "pipeline_forecaster",
    "protocol_windows",
    "run_protocol",
    "window_at",
]
