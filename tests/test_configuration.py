"""What a configuration derives, refuses, and keeps through a file."""

import json

import pytest
from tiny import tiny_config
from transformers import AutoConfig

from earthformer_hf import CrossCuboid, Cuboid, EarthformerConfig


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
