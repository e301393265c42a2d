"""Where a model comes from: what the Hub says of its checkpoint, and what the images it was evaluated on are."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import datasets
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]  # exported lazily
from transformers.utils import logging

from updp_hf.reporting.report import HeldOutSet, Report

__all__ = ["dataset_facts", "is_hub_id", "metadata_of", "with_card_facts"]

logger = logging.get_logger(__name__)

INHERITED = ("license", "license_name", "license_link", "datasets", "widget")
"""What the card of a pruned model takes over from the checkpoint's."""


def is_hub_id(name: str) -> bool:
    """Return whether `name` could be that of a repository: a path on somebody's machine is not."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def metadata_of(base_model: str, train_dataset: Any = None, token: str | None = None) -> dict[str, Any]:
    """Return what the head of a card says of where a model comes from.

    Args:
        base_model: id of the checkpoint on the Hub, whose card tells licence and datasets if it can be read.
        train_dataset: what the pruned model was trained on.
        token: access token.
    """
    metadata = _inherited(base_model, token) if is_hub_id(base_model) else {}
    trained_on = dataset_facts(train_dataset)
    if trained_on is not None and trained_on.id is not None:
        known = metadata.get("datasets", [])
        metadata["datasets"] = list(dict.fromkeys([*([known] if isinstance(known, str) else known), trained_on.id]))
    return metadata


def with_card_facts(
    report: Report,
    *,
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
) -> Report:
    """Return `report` with facts for its card that no run can know: see `UPDPTrainer.create_model_card`."""
    ids = _listed(dataset_tags)
    metadata = {
        "language": language,
        "license": license,
        "tags": _listed(tags),
        "model_name": model_name,
        "base_model": finetuned_from,
        "datasets": ids,
    }
    held_out = report.evaluated_on or HeldOutSet()
    held_out = replace(held_out, name=", ".join(_listed(dataset)) or held_out.name, id=ids[0] if ids else held_out.id)
    return replace(
        report,
        metadata={**report.metadata, **{name: value for name, value in metadata.items() if value}},
        evaluated_on=None if held_out == HeldOutSet() else held_out,
    )


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _inherited(base_model: str, token: str | None) -> dict[str, Any]:
    try:
        metadata = ModelCard.load(base_model, token=token, ignore_metadata_errors=True).data.to_dict()
    except (OSError, TypeError, ValueError, HfHubHTTPError, httpx.TransportError, yaml.YAMLError) as error:
        logger.info("The card of %s cannot be read (%s), so no licence is taken from it.", base_model, error)
        metadata = {}
    inherited = {name: metadata[name] for name in INHERITED if metadata.get(name)}
    if "://" not in (link := str(inherited.get("license_link", "://"))):  # a file beside that card
        inherited["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return {"base_model": base_model, **inherited}


def dataset_facts(dataset: Any) -> HeldOutSet | None:
    """Return what a set of images tells of itself: name, id on the Hub, split and number of images; None if nothing."""
    facts: dict[str, Any] = {}
    info = getattr(dataset, "info", None)
    if isinstance(info, datasets.DatasetInfo):
        sources = [source for source in info.download_checksums or {} if source.startswith("hf://datasets/")]
        repository = sources[0].removeprefix("hf://datasets/").partition("@")[0] if sources else None
        facts = {"id": repository, "name": info.dataset_name or repository, "split": dataset.split}
    is_one_set = hasattr(dataset, "__len__") and not isinstance(dataset, Mapping)
    known = {name: str(value) for name, value in facts.items() if value is not None}
    found = HeldOutSet(**known, images=len(dataset) if is_one_set else None)
    return None if found == HeldOutSet() else found
