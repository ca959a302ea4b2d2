"""Loading a folder or hub repository, and pushing one."""

import dataclasses
import glob
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
from .cards import Shareable, shown_pictures, with_tags
from .export import NETWORKS, export


# -- loading ----------------------------------------------------------------------------------------------------------


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
        folder = _download(str(source), revision, token)
    if not has_weights(folder):
        raise ValueError(f"{source}: no weights (*.safetensors).")
    if (folder / "model_index.json").is_file():
        dtypes = {name: _stored_dtype(folder / name) for name in NETWORKS if (folder / name).is_dir()}
        return folder, PreDiffPipeline.from_pretrained(folder, torch_dtype=dtypes), None
    extractor = None
    if (folder / "preprocessor_config.json").is_file():
        extractor = EarthformerFeatureExtractor.from_pretrained(folder)
    architectures = EarthformerConfig.from_pretrained(folder).architectures or []
    model_class = EarthformerModel if architectures == ["EarthformerModel"] else EarthformerForPrediction
    return folder, model_class.from_pretrained(folder), extractor


def has_weights(folder: Path) -> bool:
    """Whether weights lie in a folder or one below it."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*/*.safetensors"))


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """The card, then what belongs to it: configurations, scores, weights, and the pictures that it shows."""
    folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns="README.md"))
    card = folder / "README.md"
    pictures = shown_pictures(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else []
    files = ["README.md", "*.json", *_weight_patterns(variant=None)]
    files += [glob.escape(name) for name in pictures if "/" not in name]
    commit = folder.name  # that the card is of
    return Path(snapshot_download(repo_id, revision=commit, token=token, allow_patterns=files))


def _stored_dtype(folder: Path) -> torch.dtype:
    """The precision of the first stored tensor of a network."""
    for path in sorted([*folder.glob("*model.safetensors"), *folder.glob("*model-*-of-*.safetensors")]):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                return file.get_tensor(name).dtype
    return torch.float32


# -- pushing ----------------------------------------------------------------------------------------------------------


def push(
    model_or_pipeline: Shareable,
    repo_id: str,
    feature_extractor: EarthformerFeatureExtractor | None = None,
    card: str | Path | None = None,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | str | None = None,
    tag: str | None = None,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
) -> CommitInfo:
    """Export to a hub repository, which is created if need be: the card first, then all else in one commit.

    A repository's card is kept if none is given. An interrupted upload leaves the repository's files as they were.
    `push_to_hub` of a model, a feature extractor and a pipeline is this function, in the signature of its library.

    Args:
        model_or_pipeline, feature_extractor, card, max_shard_size, variant: as for [`export`]. Files of weights of
            other variants stay in the repository.
        repo_id: "name" or "namespace/name".
        commit_message, commit_description, private, token: as everywhere on the hub.
        revision: a branch, created if need be; the main one if omitted.
        create_pr: open a pull request with these commits; the result names it (`pr_url`, `pr_revision`).
        tags: to add to those of the card's metadata.
        tag: a name for the resulting commit.

    Returns:
        The commit.

    Raises:
        ValueError: as for [`export`], or both `create_pr` and `revision`.
        huggingface_hub.errors.HfHubHTTPError: what the hub refuses.
    """
    all_tags = [tags] if isinstance(tags, str) else list(tags or [])
    all_tags += getattr(model_or_pipeline, "model_tags", None) or []
    with TemporaryDirectory() as temporary:
        folder = export(
            model_or_pipeline, Path(temporary) / "export", feature_extractor, card,
            max_shard_size=max_shard_size or "5GB", variant=variant,
        )  # fmt: skip
        return upload(
            folder, repo_id, commit_message or f"Upload {type(model_or_pipeline).__name__}", private, token, revision,
            tag, keep_card=card is None, commit_description=commit_description, create_pr=create_pr,
            tags=all_tags, variant=variant,
        )  # fmt: skip


def upload(
    folder: Path,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    *,
    keep_card: bool = False,
    commit_description: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
    variant: str | None = None,
) -> CommitInfo:
    """Upload a model folder as it is; arguments and result as for [`push`].

    Args:
        keep_card: leave a card that the repository has, but for its tags.
        tags: to add to those of the card, in `folder` as well.
        variant: of the weights in `folder`; the repository's files of weights of this variant are replaced.
    """
    if create_pr and revision is not None:
        raise ValueError(f"`revision` must be None with `create_pr`, which is to the main branch, got {revision!r}.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    stored_card = None
    if keep_card and api.file_exists(repo_id, "README.md", revision=revision):
        stored_card = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_bytes()
    card = (folder / "README.md").read_bytes() if stored_card is None else stored_card
    card = with_tags(card.decode(), tags).encode() if tags else card
    pull_request = None
    if card != stored_card:
        commit = api.upload_file(
            path_or_fileobj=card, path_in_repo="README.md", repo_id=repo_id, revision=revision,
            commit_message="Upload the model card", create_pr=create_pr,
        )  # fmt: skip
        if commit.pr_url is not None:  # what follows goes into the same pull request
            pull_request, revision, create_pr = commit.pr_url, commit.pr_revision, False
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, ignore_patterns="README.md",
        delete_patterns=_weight_patterns(variant) if has_weights(folder) else None,
        commit_message=commit_message, commit_description=commit_description, revision=revision, create_pr=create_pr,
    )  # fmt: skip
    if pull_request is not None:
        commit = dataclasses.replace(commit, pr_url=pull_request)
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def _weight_patterns(variant: str | None) -> list[str]:
    """What matches the files of weights of a variant in a repository, whole or in shards."""
    part = "" if variant is None else f".{variant}"
    names = [f"model{part}.safetensors", f"model{part}-*-of-*.safetensors", f"model.safetensors.index{part}.json"]
    return [prefix + name for prefix in ("", "*/diffusion_pytorch_") for name in names]


__all__ = ["has_weights", "load", "push", "upload"]
