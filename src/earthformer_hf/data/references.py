"""References of a table to files of this machine, which nobody but this machine can make.

A row of a table may refer to local files, and a table may come from anyone, with a description that says anything. So
a reference carries a code (HMAC-SHA256, RFC 2104) under a key that never leaves the machine: of a table that someone
else made, no reference is followed.
"""

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants

from .guards import open_npy


def signed(reference: dict[str, Any]) -> str:
    """A reference as text for a row: its code, a blank, and JSON."""
    text = json.dumps(reference)
    return f"{_code(text)} {text}"


def verified(text: str | None) -> dict[str, Any]:
    """The inverse of [`signed`].

    Raises:
        ValueError: the text is not of this machine.
    """
    code, _, reference = str(text).partition(" ")
    if not hmac.compare_digest(code.encode(errors="replace"), _code(reference).encode()):
        raise ValueError(
            "refers to files, and was not made on this machine; a table of others must hold its frames, not refer to "
            "files; not read"
        )
    return json.loads(reference)


def _code(text: str) -> str:
    return hmac.new(key(), text.encode(errors="replace"), hashlib.sha256).hexdigest()


@lru_cache(1)
def key() -> bytes:
    """The key of this machine and user, made when it is first needed.

    Raises:
        ValueError: its file holds something else.
    """
    path = Path(constants.HF_HOME) / "earthformer_hf" / "reference_key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        file, part = tempfile.mkstemp(dir=path.parent)  # which only its owner may read
        with os.fdopen(file, "wb") as output:
            output.write(secrets.token_bytes(32))
        try:
            os.link(part, path)  # whole, and of the first of several processes
        except FileExistsError:
            pass
        finally:
            os.unlink(part)
    content = path.read_bytes()
    if len(content) != 32:
        raise ValueError(f"{path} must hold a key of 32 bytes, got {len(content)}; delete it, and a new one is made.")
    return content


def read_cache(reference: dict[str, Any]) -> dict[str, Any]:
    """The fields of an event of [`~earthformer_hf.data.hosted.cached`], views of memory maps."""
    part = slice(reference["first"], reference["first"] + reference["length"])
    event: dict[str, Any] = {}
    for name, array in _memory_maps(reference["path"]).items():
        field, _, series = name.partition(".")
        if series:
            event.setdefault(field, {})[series] = array[part]
        else:
            event[name] = array[part]
    return event


@lru_cache(None)
def _memory_maps(folder: str) -> dict[str, np.ndarray]:
    return {path.stem: open_npy(path) for path in sorted(Path(folder).glob("*.npy"))}


__all__ = ["key", "read_cache", "signed", "verified"]
