"""Protocols: data that say what a score means."""

import json
import math
from dataclasses import asdict, fields, replace

import pytest

from earthformer_hf.data.events import SOURCES, builder_of, options_of
from earthformer_hf.evaluation import baseline_forecaster
from earthformer_hf.evaluation.protocols import PROTOCOLS, Protocol


CHANGES = {
    "options": {"sources": ["fmi"]},
    "feature_extractor": {"units": "mm/h"},
    "scores": ("errors",),
    "average": "per lead",
    "ensemble": "each",
    "max_windows": 7,
    "index_series": "nino34",
    "wet_threshold": 7.5,
    "thresholds": (16, 74),
    "physical_thresholds": (0.5,),
    "pools": (4,),
    "neighbourhoods": (1, 5),
    "baselines": ("persistence",),
}


@pytest.mark.parametrize("name", [field.name for field in fields(Protocol)])
def test_the_hash_is_of_every_field(name):
    protocol = PROTOCOLS["radar-open"]
    value = getattr(protocol, name)
    if isinstance(value, str):
        other = f"{value}, changed"
    elif isinstance(value, tuple):
        other = (*value, "changed")
    elif isinstance(value, bool):
        other = not value
    else:
        other = 1 + (value if isinstance(value, int | float) else 0)
    assert replace(protocol, **{name: CHANGES.get(name, other)}).hash != protocol.hash
    assert replace(protocol, **{name: value}).hash == protocol.hash


HASHES = {
    "sevir-earthformer": "d16c1160b4ad",
    "sevir-per-lead": "a9be414f70df",
    "sevir-lr-prediff": "3d879992e946",
    "radar-open": "6505d4d00f32",
    "radar-open-ensemble": "4cd6191e3833",
    "radar-open-10min": "e7392f080e0d",
    "radar-open-10min-ensemble": "9e4fca7d5bdd",
    "radar-open-10min-0006": "60e42c7472f2",
    "radar-open-10min-0007": "733e1f40d714",
    "icar-enso": "eb0682a600a2",
    "sst-kaplan": "c835b87dd38b",
    "nbody-mnist": "4e79b7f023bf",
    "moving-mnist": "90ea48ee15b5",
    "earthnet2021": "5d37e7b263e9",
    "earthnet2021-ood": "088463fa62f8",
    "nbody-mnist-drawn": "e212ad9b7872",
    "moving-mnist-drawn": "e1eb4ed52d02",
}


def test_the_hashes_of_named_protocols_are_the_recorded_ones():
    """Score files carry them: a hash that changes makes every score file of its protocol incomparable."""
    assert {name: protocol.hash[:12] for name, protocol in PROTOCOLS.items()} == HASHES


def test_protocols_are_data():
    """What is written to a score file is the whole protocol, and every name in it exists."""
    hashes = set()
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and len(protocol.source) > 20
        stored = json.loads(json.dumps(asdict(protocol)))
        tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
        assert Protocol(**tuples) == protocol and Protocol(**tuples).hash == protocol.hash
        hashes.add(protocol.hash)
        assert protocol.dataset in SOURCES
        with pytest.raises(ValueError, match="persistence"):
            baseline_forecaster("no such baseline", protocol, lambda split: None)
    assert len(hashes) == len(PROTOCOLS)


def test_splits_and_options_are_those_of_the_data():
    for protocol in PROTOCOLS.values():
        builder = builder_of(protocol.dataset)
        splits = {protocol.split, protocol.training_split, protocol.validation_split}
        assert splits <= set(builder.SPLITS) and set(protocol.options) <= options_of(builder), protocol.name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": ("csi",)}, "`scores` must be of"),
        ({"average": "mean"}, "`average` must be one of"),
        ({"ensemble": "median"}, "`ensemble` must be one of"),
        ({"prediction_length": 0}, "`prediction_length` must be at least 1"),
        ({"scores": ()}, "`scores` must be of .* one or more, got none"),
        ({"scores": ("ranks",)}, "`scores` must hold one of maps, which the baseline 'persistence' forecasts"),
        ({"baselines": ("foo",)}, "`baselines` must be of"),
        (
            {"baselines": ("seasonal ridge",)},
            "one of the Nino3.4 index, which the baseline 'seasonal ridge' forecasts",
        ),
        ({"scores": ("nino34",), "baselines": ("steps",)}, "one of ensembles, which the baseline 'steps' forecasts"),
        ({"scores": ("nino34",), "baselines": (), "prediction_length": 2}, "`prediction_length` must be at least 3"),
        ({"scores": ("earthnet",), "prediction_length": 41}, "`prediction_length` must be at most 40"),
        ({"value_range": 0}, "`value_range` must be finite and above 0"),
        ({"value_range": math.nan}, "`value_range` must be finite and above 0"),
        ({"wet_threshold": math.inf}, "`wet_threshold` must be finite"),
        ({"thresholds": ()}, "`thresholds` must be one or more ascending values"),
        ({"thresholds": (1, math.nan)}, "`thresholds` must be one or more ascending values, all finite"),
        ({"physical_thresholds": (2, 1)}, "`physical_thresholds` must be one or more ascending values"),
        ({"pools": (4, 0)}, "`pools` must be at least 1"),
        ({"neighbourhoods": (2,)}, "`neighbourhoods` must be odd"),
        ({"neighbourhoods": (-1,)}, "`neighbourhoods` must be odd"),
        ({"neighbourhoods": ()}, "`neighbourhoods` must be odd numbers of pixels, of 'fss' one or more"),
        ({"independent": "1 day"}, "`independent` must be such as .*'1D'.*got '1 day'"),
        ({"feature_extractor": {"time_step": "5 minutes"}}, "`time_step` must be such as '5m'"),
    ],
)
def test_impossible_protocols_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PROTOCOLS["radar-open"], **changes)
