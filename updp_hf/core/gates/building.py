"""From a site to the gates that close it, one for each slot that changes."""

from collections.abc import Mapping, Sequence

from torch import nn

from updp_hf.core.algebra.affine import empty, read
from updp_hf.core.algebra.kernels import can_fill, crop_some, move_padding
from updp_hf.core.depth.runs import merged_map
from updp_hf.core.gates.convolution import ConvGate, FillGate
from updp_hf.core.gates.gate import Blend, Bypass, Gate, Landing, MarkGate, Shortcut
from updp_hf.core.graph.roles import close_activation, close_norm
from updp_hf.core.plan.site import Form, Site, outermost
from updp_hf.model.layout_updp import EPS, Skip, Zero, batch_norm, get_slot, unwrap

__all__ = ["build_gates"]


def build_gates(model: nn.Module, site: Site, start: str) -> dict[str, Gate]:
    """Build the gates that close `site` in `model`, by their slots: see `Plan.start` for `start`."""
    if not site.form.merges:
        slot = site.run[-1]
        return {slot: Blend(get_slot(model, slot), _stand_in(site))}
    dense = _dense(model, site)
    axis = 1 if isinstance(next(iter(dense.values())), nn.Conv2d) else -1
    norms = dict(zip(site.norms, site.norm_channels, strict=True))
    first = site.run.index(next(iter(dense)))
    leading, inside = site.run[:first], site.run[first:]
    closing = leading if start == "fit" else site.run
    found: dict[str, Gate] = {}
    for slot in closing:
        original = get_slot(model, slot)
        if slot in norms:
            found[slot] = Blend(original, close_norm(original, norms[slot], axis))
        elif slot in site.activations:
            found[slot] = Blend(original, close_activation(original))
        elif slot in site.marked:
            found[slot] = MarkGate(original)
    if start == "fit":
        return found | _shortcut_gates(model, site, inside)
    return found | _conv_gates(site, {slot: found.get(slot) or get_slot(model, slot) for slot in site.run})


def _dense(model: nn.Module, site: Site) -> dict[str, nn.Module]:
    """Return the Linears or convolutions of the run of `site`."""
    modules = {slot: unwrap(get_slot(model, slot)) for slot in site.run}
    return {slot: module for slot, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}


def _stand_in(site: Site) -> nn.Module:
    """Build what is left of a branch or a block."""
    if site.form is Form.ATTENTION_DROP:
        return Zero(site.outputs)
    if site.form is Form.BLOCK_DROP:
        return Skip(site.outputs)
    return _zeroed(nn.utils.skip_init(nn.Linear, site.channels, site.channels))


def _shortcut_gates(model: nn.Module, site: Site, slots: Sequence[str]) -> dict[str, Gate]:
    """Build the gates of a run that a fitted map is to replace; what lies inside another slot goes with it."""
    dense = _dense(model, site)
    maps = [read(module, device="meta") for module in dense.values()]
    merged = merged_map(crop_some(maps, [slot in site.cropped for slot in dense]))
    first, *between, last = outermost(slots)
    shortcut = Shortcut(get_slot(model, first), _zeroed(empty(merged)))
    bypasses = {slot: Bypass(get_slot(model, slot), marks=slot in site.marked) for slot in between}
    norm = batch_norm(merged.out_channels, EPS, merged.channel_axis)
    return {first: shortcut, **bypasses, last: Landing(get_slot(model, last), shortcut, norm)}


def _zeroed(module: nn.Module) -> nn.Module:
    # Zeros, not random numbers: gating is not to draw from the generator that orders the training data.
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _conv_gates(site: Site, modules: Mapping[str, nn.Module]) -> dict[str, Gate]:
    """Build the gates of the convolutions whose padding has to be at the front, or whose outer taps close.

    `modules` is what stands in the slots of the run, with the gates of all others.
    """
    convs = {slot: module for slot, module in modules.items() if isinstance(module, nn.Conv2d)}
    if not convs:
        return {}
    own = [read(conv, device="meta") for conv in convs.values()]
    closed = crop_some(own, [slot in site.cropped for slot in convs])
    moved, rings = move_padding(closed)
    padded = [i for i, map in enumerate(closed) if i and any(map.padding)]
    fills = can_fill(closed)
    nothing = (0,) * 4
    found: dict[str, Gate] = {}
    for index, (slot, conv) in enumerate(convs.items()):
        is_cropped, ring, at_end = slot in site.cropped, rings[index], moved[index].padding
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
