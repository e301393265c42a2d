"""Gates of a run for which one fitted map is to stand: the map goes round the run, and comes in at its end."""

from torch import Tensor, nn

from updp_hf.core.gates.gate import Gate, Replacement

__all__ = ["Bypass", "Landing", "Shortcut"]


class Shortcut(Replacement):
    """The first dense slot of a run for which one fitted map is to stand.

    Between the ends the fitted map's output waits in `ahead` for the `Landing` in the run's last slot, which blends it
    with the run's.
    """

    def __init__(self, original: nn.Module, pruned: nn.Module):
        super().__init__(original, pruned)
        self.ahead: Tensor | None = None

    def forward_between(self, x: Tensor) -> Tensor:
        self.ahead = self.pruned(x)
        original: Tensor = self.original(x)
        return original


class Bypass(Gate):
    """A slot between the first and the last one of a run for which one fitted map is to stand."""

    def forward_between(self, x: Tensor) -> Tensor:
        output: Tensor = self.original(x)
        return output

    def forward_closed(self, x: Tensor) -> Tensor:
        return x

    def closed(self) -> nn.Module:
        return nn.Identity()


class Landing(Replacement):
    """The last slot of a run for which the fitted map of `shortcut` is to stand, and a BatchNorm behind it.

    The BatchNorm makes the fitted map easier to train, and merging folds it.
    """

    def __init__(self, original: nn.Module, shortcut: Shortcut, pruned: nn.Module):
        super().__init__(original, pruned)
        self._shortcut = (shortcut,)  # in a tuple, for it is no part of this slot

    def forward_between(self, x: Tensor) -> Tensor:
        output: Tensor = self.original(x)
        (shortcut,) = self._shortcut
        ahead, shortcut.ahead = shortcut.ahead, None
        assert ahead is not None, "the gates of a site have one λ"
        return self.lerp(output, self.pruned(ahead))
