"""What a configuration derives, refuses, and keeps through a file."""

import copy
import json

import pytest
from tiny import tiny_config
from transformers import AutoConfig, AutoModel

from earthformer_hf import CrossCuboid, Cuboid, EarthformerConfig, EarthformerForPrediction


def test_derived_sizes():
    config = EarthformerConfig(image_size=(50, 33), stem_strides=[3, 2, (1, 2)], hidden_sizes=[128, 256])
    assert config.stem_sizes == [(50, 33), (17, 11), (9, 6), (9, 3)]
    assert config.level_sizes == [(9, 3), (5, 2)]
    assert config.num_output_channels == config.num_channels == 1


def test_save_and_load(tmp_path):
    cuboids = [Cuboid((2, 4, 4), shift=(1, 2, 2)), Cuboid((2, 4, 4), ("dilated",) * 3)]
    config = tiny_config(self_attention_pattern=cuboids, cross_attention_pattern=["cross_2x2_lg", "cross_1x1"])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is EarthformerConfig
    for name in config.to_diff_dict():
        assert getattr(loaded, name) == getattr(config, name) or name == "transformers_version", name
    assert loaded.self_attention_cuboids() == [cuboids, cuboids]
    assert [len(level) for level in loaded.cross_attention_cuboids()] == [2, 1]


def test_explicit_cross_cuboids_are_kept_in_a_file(tmp_path):
    cuboid = CrossCuboid((8, 4), ("dilated", "local", "local"), shift=(4, 0), cuboids_along_time=2)
    tiny_config(cross_attention_pattern=[cuboid]).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["cross_attention_pattern"]
    in_a_file = {"size": [8, 4], "strategy": ["dilated", "local", "local"], "shift": [4, 0], "cuboids_along_time": 2}
    assert stored == [in_a_file]
    assert EarthformerConfig.from_pretrained(tmp_path).cross_attention_cuboids() == [[cuboid]] * 2
    assert (
        tiny_config(cross_attention_pattern=[{"size": [2, 2]}]).cross_attention_cuboids()
        == [[CrossCuboid((2, 2))]] * 2
    )


def test_a_typo_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="contxt_length.*context_length"):
        EarthformerConfig(contxt_length=3)
    with pytest.raises(ValueError, match="drop_path"):
        EarthformerConfig(drop_path=0.1)
    assert EarthformerConfig(_private=1)._private == 1
    assert EarthformerConfig(attn_implementation="eager")._attn_implementation == "eager"


def test_a_newer_file_only_warns(tmp_path, caplog):
    tiny_config().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"rotary": True}))
    loaded = EarthformerConfig.from_pretrained(tmp_path)
    assert loaded.hidden_sizes == [16, 32] and loaded.rotary is True
    assert "rotary" in caplog.text


def test_fields_given_on_loading_are_checked(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert EarthformerConfig.from_pretrained(tmp_path, image_size=24).level_sizes == [(12, 12), (6, 6)]
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        EarthformerConfig.from_pretrained(tmp_path, num_attention_heads=5)


def test_names_that_the_library_looks_for():
    config = tiny_config(encoder_depths=[1, 2])
    assert config.hidden_size == 16 and config.num_hidden_layers == 3
    with pytest.raises(NotImplementedError):
        config.hidden_size = 3


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"context_length": 0}, "context_length"),
        ({"prediction_length": -1}, "prediction_length"),
        ({"image_size": (20,)}, "image_size"),
        ({"image_size": (20, 0)}, "image_size"),
        ({"num_channels": 0}, "num_channels"),
        ({"hidden_sizes": [16, 30]}, "hidden_sizes"),
        ({"num_attention_heads": 3}, "hidden_sizes"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"encoder_depths": [1]}, "encoder_depths"),
        ({"decoder_depths": [1, 0]}, "decoder_depths"),
        ({"num_global_vectors": -1}, "num_global_vectors"),
        ({"num_covariates": -1}, "num_covariates"),
        ({"stem_channels": [4, 12]}, "stem_channels"),
        ({"stem_channels": []}, "stem_channels"),
        ({"stem_channels": [5, 16], "stem_norm_groups": 2}, "stem_norm_groups"),
        ({"stem_strides": [1]}, "stem_strides"),
        ({"stem_strides": [1, 0]}, "stem_strides"),
        ({"stem_strides": [1, (2, 2, 2)]}, "stem_strides"),
        ({"stem_num_convs": 0}, "stem_num_convs"),
        ({"dropout": 1.5}, "dropout"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
        ({"position_embedding_type": "sine"}, "position_embedding_type"),
        ({"hidden_act": "gelo"}, "hidden_act"),
        ({"self_attention_pattern": "axiel"}, "axiel"),
        ({"self_attention_pattern": ["axial"] * 3}, "self_attention_pattern"),
        ({"self_attention_pattern": [{"siz": (1, 1, 1)}]}, "self_attention_pattern"),
        ({"self_attention_pattern": [{"size": [2, 2, 2], "shift": [2, 0, 0]}]}, "self_attention_pattern"),
        ({"cross_attention_pattern": "cross_0x0"}, "cross_0x0"),
        ({"cross_attention_pattern": "axial"}, "cross_attention_pattern"),
        ({"cross_attention_pattern": [Cuboid((1, 2, 2))]}, "cross_attention_pattern.*height, width"),
        ({"cross_attention_pattern": [CrossCuboid((1, 1), cuboids_along_time=4)]}, "cross_attention_pattern"),
        ({"self_attention_pattern": [{"size": 4}]}, "size"),
    ],
)
def test_values_that_cannot_work_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(**changes)


# -- keywords and entries that no field takes -------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [EarthformerConfig, AutoConfig, EarthformerForPrediction, AutoModel])
def test_a_typo_on_loading_is_refused_with_the_nearest_name(tmp_path, loader):
    EarthformerForPrediction(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'contxt_length'; did you mean 'context_length'"):
        loader.from_pretrained(tmp_path, contxt_length=1)


def test_keywords_of_other_parts_of_the_library_only_warn(tmp_path, caplog):
    """As `transformers.pipeline` hands those of the model to configuration and feature extractor."""
    tiny_config().save_pretrained(tmp_path)
    keywords = {"device_map": "cpu", "low_cpu_mem_usage": True, "torch_dtype": "float32", "variant": None}
    keywords |= {"num_workers": 1, "state_dict": None, "trust_remote_code": False, "_from_pipeline": "x"}
    assert EarthformerConfig.from_pretrained(tmp_path, **keywords).hidden_sizes == [16, 32]
    assert "'device_map' has no effect" in caplog.text
    config, unused = EarthformerConfig.from_pretrained(tmp_path, return_unused_kwargs=True, device_map="cpu")
    assert config.context_length == 3 and unused["device_map"] == "cpu"


def test_keywords_that_the_library_takes():
    options = {"name_or_path": "somewhere", "output_attentions": True, "num_labels": 1, "attn_implementation": "eager"}
    options |= {"use_cache": False, "pad_token_id": 0, "torch_dtype": "float16", "model_type": "earthformer"}
    config = tiny_config(**options, return_dict=False, architectures=["EarthformerModel"])
    assert config.name_or_path == "somewhere" and config.output_attentions and config.num_labels == 1
    assert str(config.dtype) == "torch.float16" and config.return_dict is False
    assert EarthformerConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_what_the_library_stores_is_no_unknown_entry(tmp_path, caplog):
    config = tiny_config()
    config.auto_map = {"AutoModel": "modeling_earthformer.EarthformerModel"}
    config.quantization_config = {"quant_method": "torchao"}
    config.custom_pipelines = {"forecast": {"impl": "forecast.Pipeline"}}
    config.save_pretrained(tmp_path)
    loaded = EarthformerConfig.from_pretrained(tmp_path)
    assert loaded.auto_map == config.auto_map and loaded.quantization_config == config.quantization_config
    assert caplog.text == ""


# -- assignment -------------------------------------------------------------------------------------------------------


def test_an_assigned_field_takes_its_stored_form():
    config = tiny_config()
    config.image_size = 64
    assert config.image_size == [64, 64] and config.level_sizes == [(32, 32), (16, 16)]
    config.stem_strides = ((1, 2), 2)
    assert config.stem_strides == [[1, 2], 2] and config.level_sizes == [(32, 16), (16, 8)]
    config.self_attention_pattern = [Cuboid((2, 4, 4))]
    assert config.self_attention_pattern[0]["size"] == [2, 4, 4]
    config.num_output_channels = None
    assert config.num_output_channels == 1
    assert copy.deepcopy(config) == config
    assert EarthformerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "name, value, refused",
    [
        ("image_size", -1, "image_size"),
        ("image_size", [20], "image_size"),
        ("context_length", 0, "context_length"),
        ("hidden_sizes", (16, 30), "hidden_sizes"),
        ("self_attention_pattern", "axiel", "axiel"),
        ("stem_strides", [1], "stem_strides"),
    ],
)
def test_an_assignment_that_cannot_work_is_refused_and_undone(name, value, refused):
    config = tiny_config()
    before = config.to_dict()
    with pytest.raises(ValueError, match=refused):
        setattr(config, name, value)
    assert config.to_dict() == before
