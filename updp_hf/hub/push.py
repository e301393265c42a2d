"""To the Hub: the files of a merged model and nothing else, in one commit that is whole or not there."""

import shutil
import tempfile
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file, logging

from updp_hf.errors import HubError, UPDPError
from updp_hf.hub.failures import explained, status_of
from updp_hf.hub.folder import MERGED_FILES, is_training_checkpoint, save_processor
from updp_hf.model.modeling_updp import UPDPForImageClassification
from updp_hf.reporting.card import CARD_NAME, PICTURES, add_card, is_generated
from updp_hf.reporting.measure import report_in
from updp_hf.reporting.report import REPORT_NAME, Report
from updp_hf.surgery.model_io import load_classifier

__all__ = ["HubError", "push_folder", "push_model"]

logger = logging.get_logger(__name__)

ATTEMPTS = 3
"""How often a push begins anew because somebody else's came in between."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload the merged model in `folder` in one commit; without a change there is none.

    What is uploaded: weights, configuration, processor, the code files that load them, report, card and pictures, and
    the ONNX file if it was exported from these weights. A card that somebody edited, here or on the Hub, is kept.

    Args:
        folder: what `UPDPTrainer.save_model` or `save_pretrained` wrote; it is left as it is.
        repo_id: `name` or `user/name`; the repository is made if there is none.
        private: whether a new repository is private.
        token: access token; by default that of `hf auth login`.
        revision: the branch, made if there is none; `main` by default.
        commit_message: title of the commit.
        commit_description: text of the commit.
        create_pr: open a pull request instead of committing to the branch.

    Raises:
        HubError: the Hub did not accept it, or was not reached.
        ValueError: `folder` holds no merged model.
    """
    folder = Path(folder)
    return _push(
        folder,
        report_in(folder, _loaded(folder)),
        repo_id,
        f"The model in {folder} is whole",
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
        commit_description=commit_description,
        create_pr=create_pr,
    )


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    processing_class: Any = None,
    tags: list[str] | str | None = None,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> CommitInfo:
    """Save `model` in a folder of its own and push that.

    Its card states the figures of the run it comes from if its weights are still those; else those that can be counted.

    Args:
        model: a merged model.
        repo_id: as for `push_folder`.
        processing_class: its image processor; by default the one beside the weights it was loaded from, if any.
        tags: for the head of the card, beside those that it always has.
        max_shard_size: as for `save_pretrained`.
        **options: those of `push_folder`, which tells what is raised, too.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processing_class is not None:
            save_processor(processing_class, folder)
        for name in (REPORT_NAME, IMAGE_PROCESSOR_NAME):
            if not (folder / name).exists() and (found := _beside(model, name, options.get("token"))) is not None:
                shutil.copyfile(found, folder / name)
        report = report_in(folder, model)
        tags = [*report.metadata.get("tags", []), *([tags] if isinstance(tags, str) else tags or [])]
        report = replace(report, metadata={**report.metadata, "tags": tags})
        return _push(folder, report, repo_id, "The model is as it was", **options)


def _beside(model: PreTrainedModel, name: str, token: str | bool | None) -> str | None:
    """Return the file `name` that lies where `model` was loaded from, None if there is none."""
    source = getattr(model, "loaded_from", None)
    if source is None:  # it was not loaded but made
        return None
    try:
        found: str | None = cached_file(**source, filename=name, token=token)
    except OSError:  # there is no such file
        return None
    return found


def _loaded(folder: Path) -> PreTrainedModel:
    """Load the model that is to be published: what does not load here loads nowhere."""
    is_merged = (folder / CONFIG_NAME).is_file() and not is_training_checkpoint(folder)
    if not is_merged:
        raise UPDPError(
            f"{folder} holds no pruned model, expected the files that `UPDPTrainer.save_model` or `save_pretrained` "
            "writes: for a training checkpoint, run `updp-hf merge` first."
        )
    model = load_classifier(folder)
    if not isinstance(model, UPDPForImageClassification) and not (folder / REPORT_NAME).is_file():
        raise UPDPError(
            f"{folder} holds a {type(model).__name__} that updp_hf has not pruned: push it by its own `push_to_hub`."
        )
    return model


def _push(
    folder: Path,
    report: Report,
    repo_id: str,
    safe: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload `folder` with a card of `report`; `safe` says in an error that nothing is lost."""
    api = HfApi(token=token)
    with explained(repo_id, safe):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise HubError(
                f"{repo_id} is there and public, but a private one was asked for: take another name. {safe}."
            )
        if revision is not None and not revision.startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as staged:
        files = _files(folder, report, repo_id, Path(staged))
        with explained(repo_id, safe):
            for attempt in range(1, ATTEMPTS + 1):
                head = api.repo_info(repo_id, revision=revision).sha
                try:
                    return api.create_commit(
                        repo_id,
                        _operations(api, repo_id, head, files),
                        commit_message=commit_message or "Add pruned model",
                        commit_description=commit_description,
                        revision=revision,
                        create_pr=create_pr,
                        parent_commit=head,  # else two pushes at once could leave a mixture of both
                    )
                except HfHubHTTPError as error:
                    if status_of(error) != 412 or attempt == ATTEMPTS:
                        raise
                    logger.info("Somebody else pushed to %s meanwhile: once more.", repo_id)
    raise AssertionError


def _files(folder: Path, report: Report, repo_id: str, staged: Path) -> dict[str, Path]:
    """Return the files to publish by their path in the repository. The card is written anew, for this repository."""
    files = {
        path.relative_to(folder).as_posix(): path
        for pattern in MERGED_FILES
        for path in folder.glob(pattern)
        if path.is_file()
    }
    if not report.onnx:  # not made from these weights
        files = {name: path for name, path in files.items() if not name.startswith("onnx/")}
    report.save(staged)
    card = folder / CARD_NAME
    if not card.is_file() or is_generated(card):
        files = {name: path for name, path in files.items() if name not in PICTURES}
        add_card(report, staged, repo_id)
    return files | {path.name: path for path in staged.iterdir()}


def _operations(
    api: HfApi, repo_id: str, head: str | None, files: dict[str, Path]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return what makes the repository hold `files`, and no other weights, pictures or exports of an earlier push."""
    there = api.list_repo_files(repo_id, revision=head)
    mine = [name for name in there if any(fnmatch(name, pattern) for pattern in MERGED_FILES)]
    stale = set(mine) - set(files) - {CARD_NAME, IMAGE_PROCESSOR_NAME}
    if CARD_NAME in there and CARD_NAME in files and is_generated(files[CARD_NAME]):
        card = api.hf_hub_download(repo_id, CARD_NAME, revision=head)
        if not is_generated(Path(card)):
            logger.warning(f"The card of {repo_id} was edited by hand, so it stays as it is.")
            files = {name: path for name, path in files.items() if name != CARD_NAME}
    additions = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    return [*additions, *(CommitOperationDelete(name) for name in sorted(stale))]
