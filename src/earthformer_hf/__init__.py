"""Earthformer and PreDiff for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForTimeSeriesPrediction

from .configuration_earthformer import EarthformerConfig
from .cuboid import Cuboid
from .modeling_earthformer import EarthformerForPrediction, EarthformerModel


AutoConfig.register("earthformer", EarthformerConfig)
AutoModel.register(EarthformerConfig, EarthformerModel)
AutoModelForTimeSeriesPrediction.register(EarthformerConfig, EarthformerForPrediction)
