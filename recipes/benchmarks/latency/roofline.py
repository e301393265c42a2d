"""The least time that a forward could take: its operators' MACs and bytes against the peaks of this machine.

What counts are the aten operators of an eager forward, one by one. MACs are those of torch's own formulas: matrix
products, convolutions with the zeros of their padding, attention; other arithmetic is free. Bytes are one read of each
tensor that goes into an operator, weights included, and one write of each that comes out of it. A view counts for what
it shows, an expanded axis for one element, a tensor that is passed twice once; making a view moves nothing. A table
that is looked up counts as a whole. An operator takes as long as its MACs or its bytes do at the machine's peaks,
whichever takes longer, and a forward takes the sum.

So the bound is that of a forward which runs operator by operator from main memory. Whatever fuses operators, keeps
tensors in a cache from one to the next, or multiplies less than the formulas do (Winograd's convolutions) can beat it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from updp_hf.core.cost import measure_latency

__all__ = ["Operator", "Peaks", "Sizes", "least_seconds", "measure_peaks", "operators_of"]


@dataclass(frozen=True)
class Operator:
    """What one operator of a forward computes and moves."""

    name: str
    macs: int
    bytes: int


@dataclass(frozen=True)
class Peaks:
    """How fast a machine multiplies and moves at best."""

    macs_per_second: float
    bytes_per_second: float


class Sizes(NamedTuple):
    """Of the operands that peaks are measured with.

    Args:
        sides: of square matrices.
        images: of 256 channels.
        elements: of vectors, more than fit into a cache.
    """

    sides: tuple[int, ...]
    images: int
    elements: int


Timer: TypeAlias = Callable[[Callable[..., Tensor], Mapping[str, Tensor], int], float]

CPU, GPU = Sizes((1024, 2048), 8, 2**26), Sizes((4096, 8192), 256, 2**28)


def operators_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Operator]:
    """Run `model`, in evaluation mode, once, and return the operators that compute or move something, in order."""
    with torch.no_grad(), _Recorder() as recorder:
        model(**inputs)
    return recorder.operators


def least_seconds(operators: Iterable[Operator], peaks: Peaks) -> float:
    """Return how long `operators` take one after another, each at the peak that it reaches first."""
    return sum(
        max(operator.macs / peaks.macs_per_second, operator.bytes / peaks.bytes_per_second) for operator in operators
    )


def seconds_of(function: Callable[..., Tensor], tensors: Mapping[str, Tensor], rounds: int) -> float:
    """Return the median seconds of one call."""
    return measure_latency({"": _Call(function)}, [tensors], rounds=rounds)[""][0]


def measure_peaks(
    device: str, dtype: torch.dtype, sizes: Sizes | None = None, rounds: int = 15, seconds: Timer = seconds_of
) -> Peaks:
    """Measure the peaks of `device` with torch's present threads and settings, from medians of `rounds`.

    The MACs are those of the fastest of some matrix products and a convolution of 3×3, which are often not of the same
    library; the bytes are those of a sum of two vectors.

    Args:
        device: where to multiply and to move.
        dtype: of what is multiplied and moved.
        sizes: of the operands, those in `CPU` or `GPU` by default.
        rounds: how often each operation is measured.
        seconds: how long a call takes, the median of so many rounds.
    """
    sides, images, elements = sizes or (CPU if torch.device(device).type == "cpu" else GPU)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    rates = []
    for side in sides:
        product = {"input": ones(side, side), "mat2": ones(side, side), "out": ones(side, side)}
        rates.append(side**3 / seconds(torch.mm, product, rounds))
    wide = {"input": ones(images, 256, 30, 30), "weight": ones(256, 256, 3, 3)}  # to 28×28
    wide = {name: tensor.to(memory_format=torch.channels_last) for name, tensor in wide.items()}
    rates.append(images * 256 * 256 * 3**2 * 28**2 / seconds(torch.conv2d, wide, rounds))
    total = {"input": ones(elements), "other": ones(elements), "out": ones(elements)}
    moved = 3 * elements * total["out"].element_size()
    return Peaks(max(rates), moved / seconds(torch.add, total, rounds))


class _Call(nn.Module):
    """A function of tensors as a module, which is what can be measured."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self._function = function

    def forward(self, **tensors: Tensor) -> Tensor:
        return self._function(**tensors)


class _Recorder(TorchDispatchMode):
    """Notes the operators that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        macs = flop_registry[packet](*args, **kwargs, out_val=result) // 2 if packet in flop_registry else 0
        moved = _bytes(_tensors((args, kwargs)), _tensors(result))
        if macs or moved:
            self.operators.append(Operator(str(packet), macs, moved))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree of Python's containers, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _bytes(read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    """Return the bytes that an operator moves, none if what comes out are mere views of what went in."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in read}
    in_place = any(out is tensor for out in written for tensor in read)
    if not in_place and all(out.untyped_storage().data_ptr() in storages for out in written):
        return 0
    return sum(_elements(tensor) * tensor.element_size() for tensor in (*read, *written))


def _elements(tensor: Tensor) -> int:
    """Return how many elements `tensor` has in memory: an expanded axis has one."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size == 0 or stride)
