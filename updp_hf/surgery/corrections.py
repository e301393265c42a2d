"""Corrections in closed form of a model whose sites have been replaced: its BatchNorms, its last Linear."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from updp_hf.core.algebra.least_squares import Moments, fit_linear
from updp_hf.core.gates.contexts import evaluation
from updp_hf.surgery.model_io import check_batches, logits_of, model_inputs

__all__ = ["correct_head_", "recalibrate_batch_norms_"]

HEAD_RIDGE = 1e-2
"""Of the change to the last Linear: there is one sample an image, few for so many weights."""


@torch.no_grad()
def recalibrate_batch_norms_(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> None:
    """Replace the running statistics of every BatchNorm in `model` by what it sees on `batches`, all weighted alike.

    After some blocks have been replaced, those behind them see other inputs than the checkpoint's statistics describe.
    Batches of a single image are left out, for of one nothing is known of the variance.

    Raises:
        ValueError: there are no batches.
    """
    inputs = [model_inputs(model, batch) for batch in check_batches(batches)]
    images = [batch for batch in inputs if len(next(iter(batch.values()))) > 1]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = {norm: (norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms}
    with evaluation(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.training = True  # it alone, not what may lie in it
        try:
            for batch in images if norms else ():
                model(**batch)
        finally:
            for norm, (momentum, state) in before.items():
                norm.momentum = momentum
                if not norm.num_batches_tracked:  # it saw nothing
                    norm.load_state_dict(state)


@torch.no_grad()
def correct_head_(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], reference: nn.Module) -> None:
    """Change the last Linear of `model` so that its logits come nearest to those of `reference`.

    The change is the ridge regression of what is lacking on the input of the Linear. A model whose logits are not what
    a Linear returns is left as it is.

    Raises:
        ValueError: there are no batches.
    """
    seen: dict[nn.Linear, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        seen[module] = (args[0], output)

    moments: dict[nn.Linear, Moments] = {}
    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with evaluation(model), evaluation(reference):
            for batch in check_batches(batches):
                logits = logits_of(model, model_inputs(model, batch))
                lacking = logits_of(reference, model_inputs(reference, batch)).to(logits.device) - logits
                for head, (x, y) in seen.items():
                    if y is logits:
                        found = Moments.joint(x, lacking)
                        moments[head] = moments[head] + found if head in moments else found
                seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for head, sums in moments.items():
        weight, bias = fit_linear(sums, HEAD_RIDGE)
        head.weight.add_(weight.to(head.weight.dtype))
        if head.bias is not None:
            head.bias.add_(bias.to(head.bias.dtype))
