"""The gates of a run, one for each slot that changes: annealed to what merging reads, or fitted by one map."""

from collections.abc import Collection, Mapping

from torch import nn

from updp_hf.core.algebra.kernels import can_fill, crop_some, move_padding
from updp_hf.core.algebra.modules import empty, read
from updp_hf.core.depth.chains import merged_map
from updp_hf.core.gates.convolution import ConvGate, FillGate
from updp_hf.core.gates.detour import Bypass, Landing, Shortcut
from updp_hf.core.gates.gate import Blend, Gate
from updp_hf.core.graph.roles import close_activation, close_norm
from updp_hf.core.plan.site import outermost
from updp_hf.model.modules_updp import EPS, batch_norm, unwrap

__all__ = ["annealing_gates", "fitted_gates"]


def annealing_gates(
    slots: Mapping[str, nn.Module], norms: Mapping[str, int], activations: Collection[str], cropped: Collection[str]
) -> dict[str, Gate]:
    """Build the gates of a run that keeps the checkpoint's weights, as UPDP does.

    Args:
        slots: what stands in each slot of the run, in order.
        norms: those that close to a BatchNorm, with the number of their channels.
        activations: those that close to the identity.
        cropped: the convolutions whose outer taps close.
    """
    dense = _dense(slots)
    axis = 1 if isinstance(next(iter(dense.values())), nn.Conv2d) else -1
    found: dict[str, Gate] = {}
    for slot, original in slots.items():
        if slot in norms:
            found[slot] = Blend(original, close_norm(original, norms[slot], axis))
        elif slot in activations:
            found[slot] = Blend(original, close_activation(original))
    return found | _conv_gates({slot: found.get(slot, module) for slot, module in slots.items()}, cropped)


def fitted_gates(slots: Mapping[str, nn.Module], norms: Mapping[str, int], cropped: Collection[str]) -> dict[str, Gate]:
    """Build the gates of a run for which one fitted map is to stand: see `annealing_gates` for the arguments.

    What lies in front of the first Linear or convolution closes as it does there.
    """
    dense = _dense(slots)
    first_dense = next(iter(dense))
    paths = list(slots)
    leading = {slot: slots[slot] for slot in paths[: paths.index(first_dense)]}
    axis = 1 if isinstance(dense[first_dense], nn.Conv2d) else -1
    found: dict[str, Gate] = {
        slot: Blend(original, close_norm(original, norms[slot], axis))
        for slot, original in leading.items()
        if slot in norms
    }
    maps = [read(module, device="meta") for module in dense.values()]
    merged = merged_map(crop_some(maps, [slot in cropped for slot in dense]))
    first, *between, last = outermost([slot for slot in paths if slot not in leading])
    shortcut = Shortcut(slots[first], zeroed(empty(merged)))
    bypasses = {slot: Bypass(slots[slot]) for slot in between}
    norm = batch_norm(merged.out_channels, EPS, merged.channel_axis)
    return found | {first: shortcut, **bypasses, last: Landing(slots[last], shortcut, norm)}


def zeroed(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: random ones would draw from the generator that orders the training data."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _dense(slots: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the Linears or convolutions of a run."""
    modules = {slot: unwrap(module) for slot, module in slots.items()}
    return {slot: module for slot, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}


def _conv_gates(modules: Mapping[str, nn.Module], cropped: Collection[str]) -> dict[str, Gate]:
    """Build the gates of the convolutions whose padding has to be at the front, or whose outer taps close.

    `modules` is what stands in the slots of the run, with the gates of all others.
    """
    convs = {slot: module for slot, module in modules.items() if isinstance(module, nn.Conv2d)}
    if not convs:
        return {}
    own = [read(conv, device="meta") for conv in convs.values()]
    closed = crop_some(own, [slot in cropped for slot in convs])
    moved, rings = move_padding(closed)
    padded = [i for i, map in enumerate(closed) if i and any(map.padding)]
    fills = can_fill(closed)
    nothing = (0,) * 4
    found: dict[str, Gate] = {}
    for index, (slot, conv) in enumerate(convs.items()):
        is_cropped, ring, at_end = slot in cropped, rings[index], moved[index].padding
        # A kernel on its way to its centre pads as in the checkpoint.
        between = own[index].padding if is_cropped else nothing
        if fills and is_cropped:
            found[slot] = ConvGate(conv, between, nothing, is_cropped, nothing)
        elif fills and index in padded:
            slots = list(modules)
            front = [found.get(other, modules[other]) for other in slots[: slots.index(slot)]]
            found[slot] = FillGate(conv, closed[index].padding, front)
        elif not fills:
            if index == 0:
                between = tuple(map(sum, zip(between, at_end, strict=True)))
            if any(ring) or is_cropped or between != own[index].padding:
                found[slot] = ConvGate(conv, between, ring, is_cropped, at_end)
    return found
