"""The exponential moving average of a gated model's weights, which generalises better than the last ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from timm.utils import ModelEmaV3
from torch import nn
from transformers import TrainerCallback

from updp_hf.core.gates.gate import gates
from updp_hf.training.checkpoints import AVERAGE_NAME, load_checkpoint_

__all__ = ["WeightAverage"]


class WeightAverage(TrainerCallback):
    """The moving average of all weights and running statistics of a gated model; λ is that of the model.

    timm's `ModelEmaV3` averages: `average ← decay · average + (1 - decay) · weights`, once for each optimizer step.

    Args:
        model: gated, on the device where it is trained.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._model = model
        self._average = ModelEmaV3(model, decay=decay)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Take in the weights of the model."""
        self._average.update(self._model)
        for (_, ours), (_, theirs) in zip(gates(self._average.module), gates(self._model), strict=True):
            ours.lam.copy_(theirs.lam)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights within."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def install_(self) -> None:
        """Give the model the averaged weights for good."""
        self._exchange()

    def save(self, folder: Path) -> None:
        """Save the average beside the weights in the checkpoint `folder`."""
        safetensors.torch.save_model(self._average.module, str(folder / AVERAGE_NAME), metadata={"format": "pt"})

    def load_(self, folder: str | Path) -> None:
        """Load the average in the checkpoint `folder`.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        load_checkpoint_(self._average.module, folder, AVERAGE_NAME)

    def _exchange(self) -> None:
        ours, theirs = (dict(m.state_dict(keep_vars=True)) for m in (self._average.module, self._model))
        # Tied weights are one tensor under several names.
        pairs = {id(tensor): (tensor, ours[name]) for name, tensor in theirs.items()}
        for tensor, average in pairs.values():
            tensor.data, average.data = average.data, tensor.data
