"""The files of a model folder: which of them are published, and how a file is written whole or not at all."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import constants

from .card_text import read_card, shown_pictures


COMPONENTS = ("vae", "unet", "alignment", "scheduler", "feature_extractor", "forecaster")

# Names of the files that a model folder consists of, besides the pictures of its card.
MODEL_FILES = re.compile(
    rf"README\.md|scores\.json|(({'|'.join(COMPONENTS)})/)?"
    r"(((preprocessor_|scheduler_)?config|model_index)\.json"
    r"|(diffusion_pytorch_)?model(\.\w+)?(-\d+-of-\d+)?\.safetensors(\.index(\.\w+)?\.json)?"
    r"|((configuration|loading|stem|modeling|feature_extraction|unet)_earthformer|pipeline_(prediff|checks|hub)"
    r"|advection|calibration|cuboid|folding|guidance|linear_forecast|schedules|winograd)\.py)"
)

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


# -- what is published ------------------------------------------------------------------------------------------------


def model_files(folder: str | Path) -> tuple[list[str], list[str]]:
    """The files of a folder that are published with its model, and what else lies in it.

    Returns:
        Names of files, relative to the folder: those of [`MODEL_FILES`] and the pictures that the card shows; and the
        names of all other files and folders.

    Raises:
        ValueError: one of these files is a link out of the folder.
    """
    folder = Path(folder)
    card = folder / "README.md"
    shown: list[str] = []
    if card.is_file():
        refuse_link_out(card)
        shown = [name for name in shown_pictures(read_card(card)) if is_picture_beside(card, name)]
    published, left_behind = [], []
    for path in sorted(folder.iterdir()):
        inside = sorted(path.iterdir()) if path.name in COMPONENTS and path.is_dir() else [path]
        for file in inside:
            name = f"{path.name}/{file.name}" if file is not path else path.name
            if file.is_file() and (MODEL_FILES.fullmatch(name) or name in shown):
                refuse_link_out(file, folder)
                published.append(name)
            else:
                left_behind.append(f"{name}/" if file.is_dir() else name)
    return published, left_behind


def refuse_link_out(path: Path, folder: Path | None = None):
    """Raise if a file is a link out of its folder; in the cache of the hub, all files are links within the cache.

    Args:
        folder: that the file belongs to, directly or not; that which it lies in if omitted.

    Raises:
        ValueError: names the link and where it leads.
    """
    folder = (folder or path.parent).resolve()
    cache = Path(constants.HF_HUB_CACHE).resolve()
    home = cache if folder.is_relative_to(cache) else folder
    if not path.resolve().is_relative_to(home):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, which is not in the folder and would be published with it; "
            "put a copy in its place."
        )


def is_file_beside(card: Path, name: str) -> bool:
    """Whether what a card names is a file in its folder."""
    return Path(name).name == name and (card.parent / name).is_file()


def is_picture_beside(card: Path, name: str) -> bool:
    """Whether a picture that a card names is one, and lies in its folder."""
    return is_file_beside(card, name) and not name.startswith(".") and Path(name).suffix.lower() in PICTURES


def digests(folder: Path) -> dict[str, str]:
    """File of weights -> SHA-256."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


# -- writing ----------------------------------------------------------------------------------------------------------


def write_file(path: str | Path, content: bytes | str):
    """Write a file whole or not at all: whatever fails, a file of this name is there as it was before.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    path = Path(path).resolve()
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(folder: str | Path):
    """Make a folder, and raise if no file can be written into it.

    Raises:
        ValueError: names the folder and the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
    except OSError as reason:
        raise ValueError(f"{folder} cannot be written: {reason.strerror or reason}.") from reason


__all__ = [
    "COMPONENTS",
    "MODEL_FILES",
    "check_writable",
    "digests",
    "is_file_beside",
    "is_picture_beside",
    "model_files",
    "refuse_link_out",
    "write_file",
]
