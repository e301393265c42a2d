"""The tables of the benchmark of latency."""

from collections.abc import Iterator
from typing import Any

from recipes.benchmarks.text import side_by_side


def page(results: dict[str, Any]) -> str:
    """Return all tables with their conditions."""
    return f"# Latency of merged networks\n\n{text_of(results)}\n"


def text_of(results: dict[str, Any]) -> str:
    facts = "; ".join(f"{name}: {value}" for name, value in results.items() if name != "networks")
    return f"{tables(results)}\n\n{facts}"


def summary(results: dict[str, Any]) -> str:
    """Return a Markdown table with a column for each net: all of its sites merged, and the fewest that were tried."""
    return side_by_side(summary_rows(results))


def summary_rows(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the rows of `summary` by net."""
    columns = {}
    for name, network in results["networks"].items():
        _, fewest, *_, whole = network["versions"]
        facts = dict(_costs(network, whole))
        columns[name] = {"all sites merged": whole[1:]}
        columns[name] |= {fact: facts[fact] for fact in ("parameters", "MACs per image", "MACs, before / after")}
        for version, runs in ((whole, network["latencies"]), (fewest, network["latencies"][:2])):
            merged = "speed-up" if version == whole else f"{version[1:]} sites merged"
            for run in runs:
                columns[name][f"{merged}, {run['mode']}, batch {run['batch_size']}"] = f"{_speed_up(run, version):.2f}×"
    return columns


def tables(results: dict[str, Any]) -> str:
    """Return a Markdown table for each net: a column for each version, speed-ups beside the ratio of the MACs."""
    return "\n\n".join(
        f"**{name}**, {'×'.join(map(str, network['image']))}, {network['sites']} sites:\n\n"
        + side_by_side(
            {version: dict([*_costs(network, version), *_times(network, version)]) for version in network["versions"]}
        )
        for name, network in results["networks"].items()
    )


def _costs(network: dict[str, Any], version: str) -> Iterator[tuple[str, str]]:
    cost = network["versions"][version]
    yield "merged blocks", str(cost["merged_blocks"])
    yield "parameters", f"{cost['parameters'] / 1e6:.2f} M"
    yield "MACs per image", f"{cost['macs'] / 1e6:.0f} M"
    yield "MACs, before / after", f"{_ratio_of_macs(network, version):.2f}×"


def _times(network: dict[str, Any], version: str) -> Iterator[tuple[str, str]]:
    cost, ratio = network["versions"][version], _ratio_of_macs(network, version)
    for size, moved in cost["bytes"].items():
        yield f"bytes per forward, batch {size}", f"{moved / 1e6:.1f} MB"
        yield f"roofline, batch {size}", f"{1e3 * cost['bound_seconds'][size]:.2f} ms"
    for run in network["latencies"]:
        condition = f"{run['mode']}, batch {run['batch_size']}, {run['memory_format']}"
        seconds, speed_up = run["seconds"][version], _speed_up(run, version)
        yield f"latency, {condition}", f"{1e3 * seconds:.2f} ms"
        yield f"speed-up, {condition} (/ ratio of MACs)", f"{speed_up:.2f}× ({speed_up / ratio:.2f})"
        bound = cost["bound_seconds"][str(run["batch_size"])]
        yield f"fraction of the roofline, {condition}", f"{bound / seconds:.2f}"


def _ratio_of_macs(network: dict[str, Any], version: str) -> float:
    return float(network["versions"]["P0"]["macs"] / network["versions"][version]["macs"])


def _speed_up(run: dict[str, Any], version: str) -> float:
    return float(run["seconds"]["P0"] / run["seconds"][version])
