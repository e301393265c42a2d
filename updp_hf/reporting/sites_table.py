"""What the sites of a model are and save, for people to read."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from updp_hf.core.cost import LatencyTable
from updp_hf.core.plan.site import Site, Unsupported
from updp_hf.errors import ExportError, UPDPError
from updp_hf.reporting.report import Cost, measure_costs, side_by_side
from updp_hf.surgery.find import find_sites

__all__ = ["few", "sites_table"]


def sites_table(model: PreTrainedModel, name: str, forms: Sequence[str], batch_size: int | None) -> str:
    """Return tables of what `model` costs, of its sites, and the blocks that have none.

    Args:
        model: an image classifier.
        name: what to call it.
        forms: what closing may leave behind.
        batch_size: images in the forward of which latency is measured; None measures none, and MACs decide what pays.

    Raises:
        ValueError: the model cannot be exported.
    """
    latencies = None if batch_size is None else LatencyTable(batch_size)
    try:
        sites, refused = find_sites(model, forms, latencies=latencies)
    except ExportError as error:
        raise UPDPError(f"{error} That takes Python: `updp_hf.find_sites(model, example_inputs=...)`.") from error
    costs, conditions = measure_costs({name: model}, [] if batch_size is None else [batch_size])
    cost = costs[name]
    kind = type(model).__name__
    where = {fact: str(value) for fact, value in conditions.items() if fact in ("device", "dtype", "threads")}
    parts = [side_by_side({name: {"model class": kind, **cost.facts(), **where}})]
    if sites:
        parts.append(_table(sites, cost))
    for form in forms:
        if not any(site.form == form for site in sites):
            why = "" if refused else ", for no repeated blocks with Linears or convolutions were found"
            parts.append(f"{kind} has no site of the form {form}{why}. Try another --form.")
    if refused:
        parts.append(_reasons(refused))
    return "\n\n".join(parts)


def _table(sites: Sequence[Site], cost: Cost) -> str:
    """Return a row for each site in order of execution, and one for all sites of a form that pay."""
    rows = {}
    for index, site in enumerate(sites):
        closed = site.closed or site.slots
        slots = ", ".join(slot.removeprefix(site.block).removeprefix(".") for slot in closed)
        names = {"block": site.block, "closes": slots or "all of it", "form": str(site.form)}
        rows[str(index)] = {**names, **_saved([site], cost), "pays": "yes" if site.saves_compute else "no"}
    for form in dict.fromkeys(site.form for site in sites):
        alike = [site for site in sites if site.form == form]
        paying = [site for site in alike if site.saves_compute]
        names = {"block": f"{len(paying)} of {len(alike)} sites pay", "closes": "", "form": ""}
        rows[str(form)] = {**names, **_saved(paying, cost), "pays": ""}
    return side_by_side({fact: {row: facts[fact] for row, facts in rows.items()} for fact in rows["0"]})


def _saved(sites: Sequence[Site], cost: Cost) -> dict[str, str]:
    """Return what closing `sites` saves, and which share of the model's that is."""
    macs, parameters = sum(site.saving.macs for site in sites), sum(site.saving.parameters for site in sites)
    latency = "not measured"
    if cost.latency and all(site.saving.seconds is not None for site in sites):
        (total,) = cost.latency.values()
        seconds = sum(site.saving.seconds or 0.0 for site in sites)
        latency = f"{seconds * 1e3:z.2f} ms ({seconds / total:z.1%})"
    return {
        "MACs saved": f"{macs / 1e6:z.1f} M ({macs / cost.macs:z.1%})",
        "parameters saved": f"{parameters / 1e6:z.2f} M ({parameters / cost.parameters:z.1%})",
        "latency saved": latency,
    }


def _reasons(refused: Iterable[Unsupported]) -> str:
    """Return a list of why blocks have no site, those with the same reason together."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for refusal in refused:
        reason = refusal.reason.replace(f"'{refusal.block}.", "'").replace(f"'{refusal.block}'", "the block")
        blocks.setdefault((refusal.form, reason), []).append(refusal.block)
    lines = [f"- {few(names)} ({form}): {reason}." for (form, reason), names in blocks.items()]
    return "\n".join(["Blocks without a site:", *lines])


def few(names: Sequence[str]) -> str:
    """Return the first three of `names`, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
