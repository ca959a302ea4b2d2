"""Reading checkpoints of the originals: only tensors are read, and nothing in a file is run."""

import argparse
import collections
import operator
import os
import sys
import types
import typing

import pytest
import torch
from tiny import ROOT


sys.path.insert(0, str(ROOT / "conversion"))

from checkpoints import load_tensors  # noqa: E402


def library_objects(monkeypatch):
    """Objects of libraries that are not installed here, as a training script leaves them in a checkpoint."""
    for name in ("omegaconf", "omegaconf.dictconfig", "lightning", "lightning.fabric"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    config = type("DictConfig", (dict,), {"__module__": "omegaconf.dictconfig"})
    attributes = type("AttributeDict", (), {"__module__": "lightning.fabric"})
    sys.modules["omegaconf.dictconfig"].DictConfig = config
    sys.modules["lightning.fabric"].AttributeDict = attributes
    one, other = config(), attributes()
    one.flags, other.lr = {"struct": True}, 1e-3
    default = collections.defaultdict(dict)
    default["a"] = 1
    one.ref_type = typing.Tuple[typing.Any, ...]  # noqa: UP006
    one.queue = collections.deque([1, 2], maxlen=2)
    return {"hyper_parameters": one, "callbacks": [other, default], "kind": dict, "path": (ROOT,)}


def test_objects_of_other_libraries_become_placeholders(tmp_path, monkeypatch):
    objects = library_objects(monkeypatch)
    objects["arguments"] = argparse.Namespace(lr=1, nested=objects["hyper_parameters"])
    torch.save({"state_dict": {"a.b": torch.ones(2)}, **objects}, tmp_path / "x.pt")
    for name in ("omegaconf", "omegaconf.dictconfig", "lightning", "lightning.fabric"):
        monkeypatch.delitem(sys.modules, name)
    tensors = load_tensors(tmp_path / "x.pt")
    assert list(tensors) == ["a.b"] and torch.equal(tensors["a.b"], torch.ones(2))
    assert "omegaconf" not in sys.modules and "lightning" not in sys.modules


class Called:
    def __reduce__(self):
        return operator.getitem, ((), 0)  # an IndexError, if it is called


def test_a_placeholder_is_never_called_in_its_real_form(tmp_path):
    torch.save({"a": torch.ones(1), "x": Called()}, tmp_path / "x.pt")
    assert list(load_tensors(tmp_path / "x.pt")) == ["a"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_file_is_refused_and_named(tmp_path, protocol, legacy):
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "posix": "system", "x": Malicious(tmp_path / "ran")},
        tmp_path / "x.pt",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(ValueError, match="nothing was executed") as reason:
        load_tensors(tmp_path / "x.pt")
    assert "posix.system" in str(reason.value)
    assert not (tmp_path / "ran").exists()


def test_tensors_without_names_are_refused(tmp_path):
    torch.save({1: torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds a tensor under 1"):
        load_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04broken"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="nothing was executed"):
        load_tensors(tmp_path / "x.pt")
