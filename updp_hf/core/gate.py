"""The gate: one slot of a model on its way from what the checkpoint holds to what the pruned model will hold."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Gate", "gates", "is_gated"]


class Gate(nn.Module):
    """Blend two modules in one slot: `(1 - λ) * original(x) + λ * pruned(x)`.

    λ = 0 is the checkpoint's function, λ = 1 the pruned one. At the two ends only one side is computed: 0 · inf is
    NaN, and a closed branch should cost nothing. λ is a 0-dimensional float32 buffer, so that it is saved, broadcast
    and moved with the model, and changing it recompiles nothing; write it with `set_lambda_` only.

    The blend of whole outputs follows UPDP (arXiv 2401.06426); its exact equation is not known to us.
    """

    stock_child = "original"
    lam: Tensor

    def __init__(self, original: nn.Module, pruned: nn.Module):
        super().__init__()
        like = next(original.parameters(), None)
        if like is not None:
            pruned.to(like.device, like.dtype)
        self.original = original
        self.pruned = pruned
        self.register_buffer("lam", torch.zeros((), dtype=torch.float32, device=None if like is None else like.device))
        self.stage = 0.0  # λ if that is 0 or 1, else 0.5: the branch taken in `forward` without asking the device
        self.training = original.training  # what is frozen inside `original` keeps its own mode
        pruned.train(original.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.stage == 0.0:
            return self.original(*args, **kwargs)
        if self.stage == 1.0:
            return self.pruned(*args, **kwargs)
        original, pruned = self.original(*args, **kwargs), self.pruned(*args, **kwargs)
        if isinstance(original, Tensor):
            return self._blend(original, pruned)
        return (self._blend(original[0], pruned[0]), *original[1:])

    def _blend(self, original: Tensor, pruned: Tensor) -> Tensor:
        # Under autocast the two sides may differ in dtype; the stock forward expects the original's.
        return torch.lerp(original, pruned.to(original.dtype), self.lam.to(original.dtype))

    def set_lambda_(self, value: float) -> None:
        """Set λ.

        Raises:
            ValueError: `value` is not in [0, 1].
        """
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"λ is {value}, but a gate blends with λ in [0, 1]: check the schedule that computed it.")
        self.lam.fill_(value)
        self._read_stage()

    def _read_stage(self) -> None:
        value = float(self.lam)
        self.stage = value if value in (0.0, 1.0) else 0.5

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        exact = self.lam
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `.half()` must not round 0.999 up to 1.
        self.lam = exact.to(self.lam.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_stage()

    def extra_repr(self) -> str:
        return f"lam={float(self.lam):g}"


def gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Yield `(path, gate)` for every gate in `model`."""
    for path, module in model.named_modules():
        if isinstance(module, Gate):
            yield path, module


def is_gated(model: nn.Module) -> bool:
    """Return whether there is a gate in `model`."""
    return next(gates(model), None) is not None
