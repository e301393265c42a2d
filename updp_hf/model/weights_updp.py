"""The weights of a merged model as their files announce them, compared with a model before any memory is taken."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported lazily
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .checks_updp import FLOATING_DTYPES, one_line
from .layout_updp import UPDPError

__all__ = ["HUB_ARGUMENTS", "Stored", "check_against_weights", "stored_weights"]

SPARE_VALUES = 2**20
"""How many values a model may hold besides twice those in its file: tables that are computed, not stored."""

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_FLOATING = ("F64", "F32", "F16", "BF16")
Stored = dict[str, tuple[tuple[int, ...], str]]
"""From the name of a tensor to its shape and dtype."""


def stored_weights(source: Any, kwargs: Mapping[str, Any]) -> Stored:
    """Return the shape and dtype of each tensor in the safetensors files of `source`. No tensor is read.

    Raises:
        OSError: they cannot be downloaded.
        ValueError: there are none, or their headers cannot be read.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}

    def find(name: str) -> str | None:
        if variant := kwargs.get("variant"):
            stem, _, end = name.rpartition(".")
            name = f"{stem}.{variant}.{end}"
        return _fetched(source, name, _raise_exceptions_for_missing_entries=False, **hub)

    folder = Path(source, hub.get("subfolder", ""))
    if any(folder.glob("shard-*-model-*.safetensors")) or (folder / ADAPTER_CONFIG_NAME).exists():
        raise UPDPError(
            f"{source} holds an adapter or parts of a distributed checkpoint, which may be loaded in place of the "
            f"{SAFE_WEIGHTS_NAME} of a merged model: move them to a folder of their own."
        )
    files = [find(SAFE_WEIGHTS_NAME)]
    if files[0] is None and (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        files = [_fetched(source, shard, **hub) for shard in _shards(index)]
    if files[0] is None:
        raise UPDPError(
            f"{source} has no {SAFE_WEIGHTS_NAME}, and other formats may hold code, so they are not read: save the "
            "model again with `save_pretrained`."
        )
    return {name: tensor for file in files for name, tensor in _header(file).items()}


def _fetched(source: Any, name: str, **options: Any) -> str | None:
    """Return the path of a file of the model, downloaded if need be: see `cached_file`."""
    try:
        file: str | None = cached_file(source, name, **options)
    except httpx.TransportError as error:
        raise OSError(
            f"The connection broke while {name} of {source} was downloaded ({one_line(error)}): load it again, which "
            "goes on where it broke."
        ) from error
    return file


def _shards(index: str) -> list[str]:
    """Return the names of the files that the index of a sharded model lists: plain names, beside the index."""
    try:
        document = json.loads(Path(index).read_text(encoding="utf-8"))
        metadata = document["metadata"]
        names = sorted(set(document["weight_map"].values()))
        is_right = all(re.fullmatch(r"[\w-]+(\.[\w-]+)*\.safetensors", name) for name in names)
        is_right = is_right and bool(names) and metadata.get("dtype") in (None, *FLOATING_DTYPES)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        is_right = False
    if not is_right:
        raise UPDPError(
            f"The index {index} is not one of safetensors files that lie beside it: download the model again."
        )
    return names


def _header(file: str | None) -> Stored:
    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UPDPError(
            f"The weights in {file} cannot be read ({one_line(error)}): download the model again."
        ) from error


def check_against_weights(model: PreTrainedModel, stored: Stored, source: Any, *, is_new_head: bool) -> None:
    """Check that `model` has the shapes and dtypes of its weights, and is not far larger than all of them.

    What transformers renames on loading has no weight of its name here; that is left to the comparison after loading.

    Raises:
        UPDPError: it differs.
    """
    values = 0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        shape, dtype = stored.get(name, (tuple(tensor.shape), None))
        if dtype is not None and tensor.is_floating_point() != (dtype in _FLOATING):
            raise UPDPError(
                f"The weight {name} in {source} is of dtype {dtype}, expected one like {tensor.dtype}: download the "
                "model again."
            )
        if shape == tuple(tensor.shape):
            values += tensor.numel()
        elif not is_new_head or tuple(tensor.shape) != (model.num_labels, *shape[1:]):
            raise UPDPError(
                f"The weights in {source} do not fit its configuration (mismatched keys: {name} has the shape {shape}, "
                f"expected {tuple(tensor.shape)}): download the model again, or ask for new classes with "
                "`ignore_mismatched_sizes=True`."
            )
    in_file = sum(math.prod(shape) for shape, _ in stored.values())
    if values > 2 * in_file + SPARE_VALUES:
        raise UPDPError(
            f"The configuration in {source} describes a model of {values} values, but its weights are {in_file}: "
            "download the model again."
        )
