"""Reading checkpoints of the originals: nothing in one is ever run."""

import contextlib
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch


# Globals of a pickle beside the state dict in the originals' files, for which [`Inert`] stands. `_operator.getitem` is
# among them since OmegaConf pickles the type of a tuple as getitem(Tuple, (Any, Ellipsis)).
INERT = re.compile(
    r"(omegaconf|pytorch_lightning|lightning|collections|typing|pathlib)(\.\w+)*\.\w+|argparse\.Namespace"
    r"|(builtins|__builtin__)\.(dict|list|tuple|str|int|float|bool|NoneType|Ellipsis)|_operator\.getitem"
)
# Globals that torch needs to rebuild tensors.
TENSOR = re.compile(r"torch\.(\w+\._rebuild_\w+|.*Storage|.*Parameter|Size|device|bool|[a-z]+\d+\w*)|_codecs\.encode")
# Tensors of a checkpoint may share their numbers, but declare no more than so many times what its file holds.
MOST_SHARED = 16


class Inert:
    """Stands for a class of another library, so that nothing of that library is imported or called.

    An instance is an empty dict that takes items and attributes, or an empty list for a deque.
    """

    def __new__(cls, *args, **kwargs):
        return [] if cls.__name__ == "deque" else OrderedDict()


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint.

    Raises:
        ValueError: the file asks for a global that is neither a tensor's nor of a known library, or holds no tensors,
            or one without a name, or unpacks to more than it stores.
    """
    if problem := _packing_problem(path):
        raise ValueError(f"{path}: refused, {problem}; nothing was executed.")
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # a file of before 2020, no zip archive: only plain state dicts are loaded
        unknown = []
    except Exception as error:
        raise ValueError(f"{path}: refused, {reason_of_failure(path, error)}; nothing was executed.") from None
    for name in unknown:
        if not INERT.fullmatch(name):
            raise ValueError(f"{path}: refused, it asks for {name!r}; nothing was executed.")
    placeholders = [(type(name.rpartition(".")[2], (Inert,), {}), name) for name in unknown]
    try:
        with torch.serialization.safe_globals(placeholders):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: refused, {reason_of_failure(path, error)}; nothing was executed.") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    tensors = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise ValueError(f"{path}: holds no state dict (name -> tensor).")
    for name in tensors:
        if not isinstance(name, str):
            raise ValueError(f"{path}: holds a tensor under {name!r}, which is no name.")
    declared, stored = (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        Path(path).stat().st_size,
    )
    if declared > MOST_SHARED * stored:
        raise ValueError(f"{path}: its tensors declare {declared} bytes, and it stores {stored}.")
    return tensors


def _packing_problem(path: Path) -> str | None:
    """Whether a zip archive may unpack to more than it stores: torch writes none that is compressed."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return None
        try:
            members = zipfile.ZipFile(file).infolist()
        except zipfile.BadZipFile:
            return "it is cut off, as by a download that stopped"
        size = Path(path).stat().st_size
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                return f"its {member.filename!r} is compressed, as torch never saves it"
        if (total := sum(member.file_size for member in members)) > size:
            return f"its members declare {total} bytes, and it has {size}"
    return None


def reason_of_failure(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch did not load; for pickle protocol 4 and later torch does not say."""
    if not Path(path).is_file():
        return "there is no such file"
    names = re.findall(r"GLOBAL (\S+)", str(error))
    names = names or [name for name in named_globals(path) if not (INERT.fullmatch(name) or TENSOR.fullmatch(name))]
    if names:
        return f"it asks for {names[0]!r}"
    with open(path, "rb") as file:
        broken_zip = file.read(2) == b"PK" and not zipfile.is_zipfile(file)
    if broken_zip or isinstance(error, EOFError) or "unexpected EOF" in str(error):
        return "it is cut off, as by a download that stopped"
    return "it is no checkpoint of tensors in pickle protocol 2"


def named_globals(path: Path) -> list[str]:
    """The globals that a checkpoint of any pickle protocol asks for: its opcodes are read, not run."""
    names: list[str] = []
    with open(path, "rb") as file, contextlib.suppress(Exception):  # as far as it can be read
        pickles = file
        if zipfile.is_zipfile(file):
            archive = zipfile.ZipFile(file)
            pickles = archive.open(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        else:
            file.seek(0)
        for _ in range(5):  # that many lie one after the other in a file that is no zip archive
            pushed, memo = [], {}
            for opcode, argument, _ in pickletools.genops(pickles):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(f"{pushed[-2]}.{pushed[-1]}")
                if opcode.name == "MEMOIZE" or "PUT" in opcode.name:
                    memo[len(memo) if argument is None else argument] = pushed[-1]
                elif opcode.name not in ("PROTO", "FRAME"):
                    pushed.append(memo.get(argument) if "GET" in opcode.name else argument)
    return names


__all__ = ["load_tensors", "named_globals"]
