"""An optimizer of the user's own, which has to hold the parameters of the gates."""

from typing import Any

from torch import nn

from updp_hf.errors import UPDPError

__all__ = ["check_optimizer"]


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer that was built before `model` was gated.

    Raises:
        ValueError: it does not hold the parameters of the gates.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if any(".pruned." in name and id(parameter) not in held for name, parameter in model.named_parameters()):
        raise UPDPError(
            f"The optimizer given ({type(optimizer).__name__}) does not hold the parameters of the gates, which were "
            "put in after it was built: leave it to the trainer (`optim`, `optimizer_cls_and_kwargs`), or gate and "
            "calibrate the model before you build it."
        )
