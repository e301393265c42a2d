"""Find where a model can be pruned, and what that saves. No model class is named here."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from updp_hf.core.cost import LatencyTable
from updp_hf.core.graph.calls import check_unwrapped, trace
from updp_hf.core.graph.forward import run_forward
from updp_hf.core.graph.roles import is_registered
from updp_hf.core.graph.structure import Structure
from updp_hf.core.kinds import DEFAULT_FORM, kind_of_form
from updp_hf.core.plan.site import Site, Unsupported
from updp_hf.errors import PlanError
from updp_hf.surgery.model_io import example_inputs_of

__all__ = ["FoundSites", "blocks_of", "find_sites", "read", "require_sites"]


class FoundSites(NamedTuple):
    """The sites of a model in order of execution, and the blocks that have none, with the reason."""

    sites: tuple[Site, ...]
    unsupported: tuple[Unsupported, ...]


def read(model: nn.Module, example_inputs: Mapping[str, Tensor] | None = None) -> Structure:
    """Export `model`, gated or not, and return its structure: what everything that asks for sites goes by.

    Args:
        model: any module that `torch.export` understands.
        example_inputs: keyword arguments of one forward on one image; made from the configuration by default.

    Raises:
        ExportError: the model cannot be exported.
        UPDPError: the model is wrapped, or no example input can be made for it.
    """
    check_unwrapped(model)
    inputs = example_inputs_of(model) if example_inputs is None else dict(example_inputs)
    return Structure(model, trace(model, inputs, is_registered), run_forward(model, inputs))


def find_sites(
    model: nn.Module,
    forms: Iterable[str] = (DEFAULT_FORM,),
    *,
    example_inputs: Mapping[str, Tensor] | None = None,
    latencies: LatencyTable | None = None,
    structure: Structure | None = None,
) -> FoundSites:
    """Find what can be closed in `model`, gated or not, and what that saves.

    A chain of layers is split into runs that save compute, by their MACs or, if `latencies` is given, by their latency
    on the model's device. `Site.saves_compute` tells those that make the model cheaper.

    Args:
        model: any module that `torch.export` understands.
        forms: what closing may leave behind. Sites of different forms overlap; a plan takes one of each place.
        example_inputs: keyword arguments of one forward on one image; made from the configuration by default.
        latencies: what has been measured so far, maybe nothing; what is measured now is added to it.
        structure: what `read` returned for the model, if that was called before.

    Raises:
        ExportError: the model cannot be exported.
        UPDPError: the model is wrapped, no example input can be made for it, or there is no such form.
    """
    kinds = {form: kind_of_form(form) for form in map(str, forms)}
    structure = read(model, example_inputs) if structure is None else structure
    found = [result for form, kind in kinds.items() for result in kind.find(structure, form, latencies)]
    sites = [result for result in found if isinstance(result, Site)]
    sites.sort(key=lambda site: structure.place(site.slots[0]))
    return FoundSites(tuple(sites), tuple(result for result in found if isinstance(result, Unsupported)))


def blocks_of(model: nn.Module, structure: Structure | None = None) -> list[str]:
    """Return the blocks of `model`, pruned or not, in order of execution; of nested ones the innermost.

    Raises:
        ExportError: the model cannot be exported.
        UPDPError: no example input can be made for it.
    """
    blocks = (read(model) if structure is None else structure).blocks()
    return [block for block in blocks if not any(other.startswith(f"{block}.") for other in blocks)]


def require_sites(
    model: nn.Module,
    form: str,
    example_inputs: Mapping[str, Tensor] | None = None,
    latencies: LatencyTable | None = None,
    structure: Structure | None = None,
) -> tuple[Site, ...]:
    """Return the sites of `model` of one form that make the model cheaper when they are closed.

    Raises:
        PlanError: there are none; the message tells what was looked for and where the search stopped.
    """
    found = find_sites(model, [form], example_inputs=example_inputs, latencies=latencies, structure=structure)
    sites = tuple(site for site in found.sites if site.saves_compute)
    if not sites:
        where = [f"{none.block}: {none.reason}" for none in found.unsupported[:3]]
        costly = [f"{s.block}: closing it costs {-s.saving.macs:,} MACs more" for s in found.sites[:3]]
        raise PlanError(
            f"{type(model).__name__} has no site of the form {str(form)!r} that saves compute. "
            + ("; ".join(costly + where) or "No repeated blocks with Linears or convolutions were found")
            + ". Try another form, or name a non-linearity of your own with `register_closable`."
        )
    return sites
