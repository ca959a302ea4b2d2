"""Protocols: data that say what a score means."""

import json
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
    ],
)
def test_impossible_protocols_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PROTOCOLS["radar-open"], **changes)
