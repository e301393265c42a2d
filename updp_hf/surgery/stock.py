"""Which stock configuration field expresses dropped blocks, so that no code of ours is needed to load the result."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["without_blocks"]

_TOTAL_FIELDS = ("num_hidden_layers",)  # one number for the whole model
_STAGE_FIELDS = ("depths",)  # one number a stage


def without_blocks(model: PreTrainedModel, blocks: Iterable[str]) -> PreTrainedModel | None:
    """Return `model` as a stock model without `blocks`, or None if its configuration cannot say that.

    Whether it computes the same as skipping the blocks is for the caller to compare: in some architectures what a
    block does depends on its number.
    """
    blocks = list(blocks)
    if not all(block.rpartition(".")[2].isdigit() for block in blocks):
        return None
    dropped = {_split(block) for block in blocks}
    lists = _block_lists(model, {parent for parent, _ in dropped})
    kept = {parent: [i for i in range(length) if (parent, i) not in dropped] for parent, length in lists.items()}
    if not all(kept.values()):
        return None
    state = _renumbered(model.state_dict(), kept)
    for config in _shrunk_configs(model.config, [len(indices) for indices in kept.values()], list(lists.values())):
        try:
            with torch.device("meta"):
                skeleton = type(model)(config)
        except TypeError:  # a timm net whose constructor takes no depth
            continue
        expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
        if expected == {name: tensor.shape for name, tensor in state.items()}:
            stock = type(model)(config).to(model.device, model.dtype)
            stock.load_state_dict(state)
            return stock.train(model.training)
    return None


def _split(block: str) -> tuple[str, int]:
    parent, _, index = block.rpartition(".")
    return parent, int(index)


def _block_lists(model: nn.Module, parents: set[str]) -> dict[str, int]:
    """Return the lists of repeated blocks in order: those of `parents`, and their siblings of the same kind."""
    kinds = {type(entry) for parent in parents for entry in model.get_submodule(parent).children()}
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and {type(entry) for entry in module} <= kinds
        and len(module)
    }


def _shrunk_configs(config: PreTrainedConfig, new: list[int], old: list[int]) -> Iterator[PreTrainedConfig]:
    """Yield the configurations that may mean `new` blocks a stage instead of `old`."""
    if config.model_type == "timm_wrapper":
        arguments = config.model_args or {}
        counts = {"depth": new[0]} if len(new) == 1 else {"depths": new}
        yield _changed(config, "model_args", {**arguments, **counts})
    for field in _TOTAL_FIELDS if len(new) == 1 else ():
        if getattr(config, field, None) == old[0]:
            yield _changed(config, field, new[0])
    for field in _STAGE_FIELDS:
        if list(getattr(config, field, None) or ()) == old:
            yield _changed(config, field, new)


def _changed(config: PreTrainedConfig, field: str, value: Any) -> PreTrainedConfig:
    # The names of the stages follow from their number; only a backbone has them.
    document = {k: v for k, v in config.to_dict().items() if k not in ("stage_names", "out_features", "out_indices")}
    changed: PreTrainedConfig = type(config).from_dict({**document, field: value})
    changed.id2label, changed.label2id = config.id2label, config.label2id
    return changed


def _renumbered(state: Mapping[str, torch.Tensor], kept: Mapping[str, list[int]]) -> dict[str, torch.Tensor]:
    renumbered = {}
    for name, tensor in state.items():
        for parent, indices in kept.items():
            if name.startswith(f"{parent}."):
                index, _, rest = name.removeprefix(f"{parent}.").partition(".")
                if int(index) not in indices:
                    break
                name = f"{parent}.{indices.index(int(index))}.{rest}"
        else:
            renumbered[name] = tensor
    return renumbered
