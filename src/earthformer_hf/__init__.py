"""Earthformer and PreDiff for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction

from .configuration_earthformer import EarthformerConfig
from .cuboid import Cuboid
from .feature_extraction_earthformer import EarthformerFeatureExtractor
from .modeling_earthformer import EarthformerForPrediction, EarthformerModel


__all__ = [
    "Cuboid",
    "EarthformerConfig",
    "EarthformerFeatureExtractor",
    "EarthformerForPrediction",
    "EarthformerModel",
]

AutoConfig.register("earthformer", EarthformerConfig)
AutoModel.register(EarthformerConfig, EarthformerModel)
AutoModelForTimeSeriesPrediction.register(EarthformerConfig, EarthformerForPrediction)
AutoFeatureExtractor.register(EarthformerConfig, EarthformerFeatureExtractor)
