"""Protocols: data that say what a score means."""

import json
from dataclasses import asdict, fields, replace

import pytest

from earthformer_hf.data.events import SOURCES, builder_of
from earthformer_hf.evaluation import baseline_forecaster
from earthformer_hf.protocols import PROTOCOLS, Protocol


OTHER = {
    "options": {"sources": ["fmi"]},
    "scores": ("errors",),
    "baselines": (),
    "average": "per lead",
    "ensemble": "each",
    "max_windows": 7,
    "wet_threshold": 7.5,
}


@pytest.mark.parametrize("field", [field.name for field in fields(Protocol)])
def test_the_hash_is_of_every_field(field):
    protocol = PROTOCOLS["radar-open"]
    value = getattr(protocol, field)
    changed = OTHER.get(field, (*value, 99) if isinstance(value, tuple) else None)
    if changed is None:
        changed = (
            f"{value}?" if isinstance(value, str) or value is None else not value if value is False else value + 1
        )
    assert replace(protocol, **{field: changed}).hash != protocol.hash
    assert replace(protocol, **{field: value}).hash == protocol.hash


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


def test_splits_are_those_of_the_data():
    for protocol in PROTOCOLS.values():
        splits = builder_of(protocol.dataset).SPLITS
        assert {protocol.split, protocol.training_split, protocol.validation_split} <= set(splits), protocol.name


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
