"""What transformers' Auto classes are told of our classes."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForTimeSeriesPrediction

from .configuration_earthformer import EarthformerConfig
from .feature_extraction_earthformer import EarthformerFeatureExtractor
from .modeling_earthformer import EarthformerForPrediction, EarthformerModel


AutoConfig.register("earthformer", EarthformerConfig)
AutoModel.register(EarthformerConfig, EarthformerModel)
AutoModelForTimeSeriesPrediction.register(EarthformerConfig, EarthformerForPrediction)
AutoFeatureExtractor.register(EarthformerConfig, EarthformerFeatureExtractor)

__all__: list[str] = []
