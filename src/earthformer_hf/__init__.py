"""Earthformer and PreDiff for the Hugging Face ecosystem."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from . import sharing
    from .configuration_earthformer import EarthformerConfig
    from .cuboid import CrossCuboid, Cuboid
    from .data import load_dataset, windows
    from .feature_extraction_earthformer import EarthformerFeatureExtractor
    from .forecasting import forecast
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

MODULES = {
    "CrossCuboid": "cuboid",
    "Cuboid": "cuboid",
    "EarthformerAlignmentModel": "unet_earthformer",
    "EarthformerConfig": "configuration_earthformer",
    "EarthformerFeatureExtractor": "feature_extraction_earthformer",
    "EarthformerForPrediction": "modeling_earthformer",
    "EarthformerModel": "modeling_earthformer",
    "EarthformerUNetModel": "unet_earthformer",
    "KnowledgeAlignmentCallback": "guidance",
    "PreDiffPipeline": "pipeline_prediff",
    "PreDiffPipelineOutput": "pipeline_prediff",
    "forecast": "forecasting",
    "load_dataset": "data",
    "windows": "data",
}

if Path(sys.argv[0] if sys.argv else "").stem != "earthformer-hf":  # which starts at once, and uses no Auto class
    import_module(".registration", __name__)


def __getattr__(name: str) -> Any:
    """Each name is imported when it is used, with what it needs."""
    if name == "sharing":
        return import_module(".sharing", __name__)
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
