"""Loading a folder or hub repository, and pushing one."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from safetensors import safe_open

from ..configuration_earthformer import EarthformerConfig
from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from ..modeling_earthformer import EarthformerForPrediction, EarthformerModel
from ..pipeline_prediff import PreDiffPipeline
from .export import NETWORKS, Shareable, export


def load(source: str | Path, revision: str | None = None, token: str | bool | None = None) -> tuple[Path, Any, Any]:
    """What a folder or hub repository holds, by the classes of this package, in the precision that it is stored in.

    Args:
        source: a folder or a hub id.
        revision, token: of a hub id.

    Returns:
        The folder (of the cache for a hub id), the model or pipeline, and the model's feature extractor or None.

    Raises:
        ValueError: the folder holds no weights or no model.
    """
    folder = Path(source)
    if not folder.is_dir():
        patterns = ["*.json", "*.safetensors", "README.md"]
        folder = Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=patterns))
    if not has_weights(folder):
        raise ValueError(f"{source}: no weights (*.safetensors).")
    if (folder / "model_index.json").is_file():
        dtypes = {name: _stored_dtype(folder / name) for name in NETWORKS if (folder / name).is_dir()}
        return folder, PreDiffPipeline.from_pretrained(folder, torch_dtype=dtypes), None
    extractor = None
    if (folder / "preprocessor_config.json").is_file():
        extractor = EarthformerFeatureExtractor.from_pretrained(folder)
    named = EarthformerConfig.from_pretrained(folder).architectures or []
    kind = EarthformerModel if named == ["EarthformerModel"] else EarthformerForPrediction
    return folder, kind.from_pretrained(folder), extractor


def has_weights(folder: Path) -> bool:
    """Whether weights lie in a folder or one below it."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*/*.safetensors"))


def _stored_dtype(folder: Path) -> torch.dtype:
    """The one of the first tensor in a network's folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                return file.get_tensor(name).dtype
    return torch.float32


def push(
    model_or_pipeline: Shareable,
    repo_id: str,
    feature_extractor: EarthformerFeatureExtractor | None = None,
    card: str | Path | None = None,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    max_shard_size: int | str = "5GB",
) -> CommitInfo:
    """Export to a hub repository, which is created if need be: the card first, then all else in one commit.

    A repository's card is kept if none is given. An interrupted upload leaves the repository's files as they were.

    Args:
        model_or_pipeline, feature_extractor, card, max_shard_size: as for [`export`].
        repo_id: "name" or "namespace/name".
        commit_message, private, token: as everywhere on the hub.
        revision: a branch, created if need be; the main one if omitted.
        tag: a name for the resulting commit.

    Returns:
        The commit.

    Raises:
        ValueError: as for [`export`].
        huggingface_hub.errors.HfHubHTTPError: what the hub refuses.
    """
    with TemporaryDirectory() as place:
        folder = export(model_or_pipeline, Path(place) / "export", feature_extractor, card, False, max_shard_size)
        message = commit_message or f"Upload {type(model_or_pipeline).__name__}"
        keep = card is None
        return upload(folder, repo_id, message, private, token, revision, tag, keep_card=keep)


def upload(
    folder: Path,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    keep_card: bool = False,
) -> CommitInfo:
    """Upload a model folder as it is; arguments and result as for [`push`].

    Args:
        keep_card: leave a card that the repository has.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if not (keep_card and api.file_exists(repo_id, "README.md", revision=revision)):
        api.upload_file(
            path_or_fileobj=folder / "README.md", path_in_repo="README.md", repo_id=repo_id, revision=revision,
            commit_message="Upload the model card",
        )  # fmt: skip
    stale = ["*.safetensors", "*.safetensors.index.json"] if has_weights(folder) else None
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, ignore_patterns="README.md", delete_patterns=stale,
        commit_message=commit_message, revision=revision,
    )  # fmt: skip
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


# Code that travels to the hub cannot import this file, so its classes get their `push_to_hub` here.
kind: Any
for kind in (EarthformerModel, EarthformerForPrediction, EarthformerFeatureExtractor, PreDiffPipeline):
    kind.push_to_hub = push
