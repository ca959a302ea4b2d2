"""Traced with a batch of 2, torch.export and ONNX give for other batches what the network itself gives."""

import json
import sys

import pytest
import torch
from tiny import ROOT, tiny_model, tiny_pipeline
from torch.export import Dim


pytest.importorskip("onnxruntime", reason="ONNX needs the extra `export`")
sys.path.insert(0, str(ROOT / "examples"))

import export_onnx as example  # noqa: E402

from earthformer_hf import EarthformerFeatureExtractor, cuboid  # noqa: E402


# One level of 10 x 14 tokens, which cuboids of 4 x 4 do not divide; tracing takes time for every layer.
SMALL = {"hidden_sizes": [16], "encoder_depths": [1], "decoder_depths": [1], "cross_attention_pattern": "cross_4x4"}
SHIFTED = {"self_attention_pattern": "video_swin_2x4"}
DIVIDED = {"self_attention_pattern": "divided_st"}
LATENT = {"block_out_channels": (16,), "attention_pattern": "video_swin_2x4"}
NETWORKS = {
    "shifted": lambda: tiny_model(**SMALL, **SHIFTED),
    "visible padding": lambda: tiny_model(**SMALL, **SHIFTED, num_global_vectors=0, mask_padding=False),
    "covariates": lambda: tiny_model(**SMALL, **DIVIDED, num_covariates=2, separate_global_qkv=True),
    "first guess": lambda: tiny_model(**SMALL, **DIVIDED, first_guess="advection", image_size=(7, 10)),
    "linear forecast": lambda: tiny_model(**SMALL, **DIVIDED, linear_components=2, num_time_features=2),
    "two levels": lambda: tiny_model(cross_attention_pattern="cross_4x4_heter"),
    "denoiser": lambda: tiny_pipeline(**LATENT).unet,
    "denoiser with a condition": lambda: tiny_pipeline(**LATENT, forecaster=True).unet,
    "denoiser, two levels": lambda: tiny_pipeline(num_global_vectors=2, mask_padding=False).unet,
}


def networks(*fast: str):
    """All of them, but by default only those named."""
    cases = [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in NETWORKS]
    return pytest.mark.parametrize("name", cases)


@networks("shifted", "denoiser with a condition")
def test_torch_export(name, monkeypatch):
    monkeypatch.setattr(cuboid, "MAX_WINDOWS", 7)  # which the network keeps to; the program takes any batch
    network = NETWORKS[name]()
    inputs = example.random_inputs(network, 2)
    program = torch.export.export(network, (), inputs, dynamic_shapes={key: {0: Dim.DYNAMIC} for key in inputs})
    for batch in (1, 3):
        inputs = example.random_inputs(network, batch)
        torch.testing.assert_close(program.module()(**inputs)[0], network(**inputs)[0], rtol=0, atol=1e-5)


@networks()
def test_onnx(name, tmp_path):
    network, extractor = NETWORKS[name](), EarthformerFeatureExtractor(scale=1 / 255, units="dBZ", missing_value=255)
    example.export(network, tmp_path / "model.onnx", extractor)
    session = example.onnxruntime.InferenceSession(tmp_path / "model.onnx")
    told = json.loads(session.get_modelmeta().custom_metadata_map["feature_extractor"])
    assert EarthformerFeatureExtractor.from_dict(told).to_dict() == extractor.to_dict()
    for batch in (1, 3):
        assert example.difference(network, tmp_path / "model.onnx", batch) < example.TOLERANCE
