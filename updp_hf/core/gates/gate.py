"""Gates: slots of a model on their way from what the checkpoint holds to what the pruned model will hold."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from updp_hf.errors import UPDPError

__all__ = ["Blend", "Gate", "Replacement", "gates", "is_gated", "set_lambda_"]


class Gate(nn.Module):
    """A slot with two ends: λ = 0 is the checkpoint's function, λ = 1 the pruned one.

    At the two ends only one side is computed: 0 · inf is NaN, and a closed branch should cost nothing. λ is a
    0-dimensional float32 buffer, so that it is saved, broadcast and moved with the model, and changing it recompiles
    nothing; write it with `set_lambda_` only. All gates of a site have the same λ.
    """

    stock_child = "original"
    lam: Tensor

    def __init__(self, original: nn.Module):
        super().__init__()
        like = next(original.parameters(), None)
        self.original = original
        self.register_buffer("lam", torch.zeros((), dtype=torch.float32, device=None if like is None else like.device))
        self.stage = 0.0  # λ if that is 0 or 1, else 0.5: the branch taken in `forward` without asking the device
        self.training = original.training  # what is frozen inside `original` keeps its own mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage == 0.0:
            return self.original(*args, **kwargs)
        if self.stage == 1.0:
            return self.forward_closed(*args, **kwargs)
        return self.forward_between(*args, **kwargs)

    def forward_between(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what lies between the two ends."""
        raise NotImplementedError

    def forward_closed(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the pruned end."""
        raise NotImplementedError

    def closed(self) -> nn.Module:
        """Return the module that computes the pruned end: what a merge reads."""
        raise NotImplementedError

    def set_lambda_(self, value: float) -> None:
        """Set λ.

        Raises:
            ValueError: `value` is not in [0, 1].
        """
        if not 0.0 <= value <= 1.0:
            raise UPDPError(f"λ is {value}, but a gate blends with λ in [0, 1]: check the schedule that computed it.")
        self.lam.fill_(value)
        self.stage = value if value in (0.0, 1.0) else 0.5

    def lerp(self, original: Tensor, pruned: Tensor) -> Tensor:
        """Return `(1 - λ) * original + λ * pruned`."""
        # Under autocast the two sides may differ in dtype; the stock forward expects the original's.
        return torch.lerp(original, pruned.to(original.dtype), self.lam.to(original.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        exact = self.lam
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `.half()` must not round 0.999 up to 1.
        self.lam = exact.to(self.lam.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        value = float(self.lam)
        self.stage = value if value in (0.0, 1.0) else 0.5

    def extra_repr(self) -> str:
        return f"lam={float(self.lam):g}"


class Replacement(Gate):
    """A gate at whose pruned end another module stands in the slot."""

    def __init__(self, original: nn.Module, pruned: nn.Module):
        super().__init__(original)
        like = next(original.parameters(), None)
        if like is not None:  # dtype, device and mode are those of the slot
            pruned.to(like.device, like.dtype)
        self.pruned = pruned.train(original.training)

    def forward_closed(self, *args: Any, **kwargs: Any) -> Any:
        return self.pruned(*args, **kwargs)

    def closed(self) -> nn.Module:
        return self.pruned


class Blend(Replacement):
    """Blend two modules in one slot: `(1 - λ) * original(x) + λ * pruned(x)`.

    The blend of whole outputs follows UPDP (arXiv 2401.06426); its exact equation is not known to us.
    """

    def __init__(self, original: nn.Module, pruned: nn.Module):
        super().__init__(original, pruned)
        for module in original.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]  # the other side reads the same input

    def forward_between(self, *args: Any, **kwargs: Any) -> Any:
        original, pruned = self.original(*args, **kwargs), self.pruned(*args, **kwargs)
        if isinstance(original, Tensor):
            return self.lerp(original, pruned)
        return (self.lerp(original[0], pruned[0]), *original[1:])


def gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Yield `(path, gate)` for every gate in `model`."""
    for path, module in model.named_modules():
        if isinstance(module, Gate):
            yield path, module


def is_gated(model: nn.Module) -> bool:
    """Return whether there is a gate in `model`."""
    return next(gates(model), None) is not None


def set_lambda_(model: nn.Module, value: float) -> None:
    """Set λ of every gate in `model`.

    Raises:
        UPDPError: `value` is not in [0, 1].
    """
    for _, gate in gates(model):
        gate.set_lambda_(value)
