"""Earthformer and PreDiff for the Hugging Face ecosystem."""

from typing import Any

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction

from . import sharing
from .configuration_earthformer import EarthformerConfig
from .cuboid import CrossCuboid, Cuboid
from .data import load_dataset, windows
from .feature_extraction_earthformer import EarthformerFeatureExtractor
from .guidance import KnowledgeAlignmentCallback
from .modeling_earthformer import EarthformerForPrediction, EarthformerModel
from .pipeline_prediff import PreDiffPipeline, PreDiffPipelineOutput
from .unet_earthformer import EarthformerAlignmentModel, EarthformerUNetModel


__version__ = "0.1.0"
__all__ = [
    "CrossCuboid",
    "Cuboid",
    "EarthformerAlignmentModel",
    "EarthformerConfig",
    "EarthformerFeatureExtractor",
    "EarthformerForPrediction",
    "EarthformerModel",
    "EarthformerUNetModel",
    "KnowledgeAlignmentCallback",
    "PreDiffPipeline",
    "PreDiffPipelineOutput",
    "forecast",
    "load_dataset",
    "sharing",
    "windows",
]

AutoConfig.register("earthformer", EarthformerConfig)
AutoModel.register(EarthformerConfig, EarthformerModel)
AutoModelForTimeSeriesPrediction.register(EarthformerConfig, EarthformerForPrediction)
AutoFeatureExtractor.register(EarthformerConfig, EarthformerFeatureExtractor)


def __getattr__(name: str) -> Any:
    """`forecast` is imported when it is used, with what it needs."""
    if name != "forecast":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .forecasting import forecast

    return forecast
