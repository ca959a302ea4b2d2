"""Pushing a model, or a folder of one, to a hub."""

import dataclasses
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi

from ..feature_extraction_earthformer import EarthformerFeatureExtractor
from .cards import Shareable, with_tags
from .export import PACKAGE, export, self_contained
from .files import model_files
from .loading import has_weights, weight_patterns
from .words import without_local_paths


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
    """Upload the files that a model folder consists of, see [`model_files`]; arguments and result as for [`push`].

    Args:
        keep_card: leave a card that the repository has, but for its tags.
        tags: to add to those of the card, in `folder` as well.
        variant: of the weights in `folder`; the repository's files of weights of this variant are replaced.

    Raises:
        ValueError: one of the files is a link out of the folder.
    """
    if create_pr and revision is not None:
        raise ValueError(f"`revision` must be None with `create_pr`, which is to the main branch, got {revision!r}.")
    _refuse_foreign_code(folder)  # and links out of it, before a repository is made
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
    with TemporaryDirectory() as temporary:
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=_publishable(folder, Path(temporary)), ignore_patterns="README.md",
            delete_patterns=weight_patterns(variant) if has_weights(folder) else None, commit_message=commit_message,
            commit_description=commit_description, revision=revision, create_pr=create_pr,
        )  # fmt: skip
    if pull_request is not None:
        commit = dataclasses.replace(commit, pr_url=pull_request)
    if tag is not None:
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return commit


def _refuse_foreign_code(folder: Path):
    """Raise if the code of a folder is not that of this package, which whoever pushes it would vouch for."""
    for name in model_files(folder)[0]:
        if name.endswith(".py"):
            own = PACKAGE / Path(name).name
            if (folder / name).read_text(encoding="utf-8") not in (own.read_text("utf-8"), self_contained(own.stem)):
                raise ValueError(f"{folder / name} is not the code of this package; `hub export` writes it anew.")


def _publishable(folder: Path, draft: Path) -> Path:
    """The files of a model folder that are published, as links and, where something is left out of them, as copies."""
    for name in model_files(folder)[0]:
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith(".json"):
            (draft / name).symlink_to((folder / name).resolve())
            continue
        text = (folder / name).read_text(encoding="utf-8")
        if name == "scores.json":
            text = without_local_paths(text)
        elif '"_name_or_path"' in text:  # where an object was loaded from
            stored = {key: value for key, value in json.loads(text).items() if key != "_name_or_path"}
            text = json.dumps(stored, indent=2, sort_keys=True) + "\n"
        (draft / name).write_text(text, encoding="utf-8")
    return draft


__all__ = ["push", "upload"]
