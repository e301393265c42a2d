"""Where a model comes from: what the Hub says of its checkpoint, and what the images it was evaluated on are."""

from collections.abc import Mapping
from typing import Any

import datasets
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]  # exported lazily
from transformers.utils import logging

__all__ = ["dataset_facts", "is_hub_id", "metadata_of"]

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
    trained_on = dataset_facts(train_dataset).get("id")
    if trained_on is not None:
        known = metadata.get("datasets", [])
        metadata["datasets"] = list(dict.fromkeys([*([known] if isinstance(known, str) else known), trained_on]))
    return metadata


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


def dataset_facts(dataset: Any) -> dict[str, Any]:
    """Return what a set of images tells of itself: name, id on the Hub, split and number of images, as far as known."""
    facts: dict[str, Any] = {}
    info = getattr(dataset, "info", None)
    if isinstance(info, datasets.DatasetInfo):
        sources = [source for source in info.download_checksums or {} if source.startswith("hf://datasets/")]
        repository = sources[0].removeprefix("hf://datasets/").partition("@")[0] if sources else None
        facts = {"id": repository, "name": info.dataset_name or repository, "split": dataset.split}
    is_one_set = hasattr(dataset, "__len__") and not isinstance(dataset, Mapping)
    facts["images"] = len(dataset) if is_one_set else None
    return {name: value if name == "images" else str(value) for name, value in facts.items() if value is not None}
