"""How the ways of the accuracy benchmark are brought to one latency, and what their networks cost."""

from collections.abc import Callable, Iterator

from torch import nn
from transformers import PreTrainedModel

from recipes.benchmarks.accuracy.bench import Bench
from recipes.benchmarks.accuracy.nets import FAMILIES
from recipes.benchmarks.accuracy.ways import ABRUPT, DROP, LEVELS, PAPER, SMALLER, TORCH_PRUNING, UPDP, Network
from updp_hf.core.cost import count_macs, count_parameters, measure_latency
from updp_hf.core.kinds import DEFAULT_FORM, Form
from updp_hf.surgery.find import require_sites
from updp_hf.surgery.model_io import example_inputs_of

__all__ = ["bisected", "cost", "networks_of"]

BISECTIONS = 5


def cost(model: nn.Module) -> dict[str, int]:
    """Return parameters and multiply-accumulates of one image."""
    return {"parameters": count_parameters(model), "macs": count_macs(model, example_inputs_of(model))}


def networks_of(bench: Bench, model: PreTrainedModel, batch_size: int, rounds: int) -> Iterator[Network]:
    """Yield the networks to be compared: UPDP's levels, and what is as fast in the other ways."""
    images = [example_inputs_of(model, batch_size)]
    sites = len(require_sites(model, DEFAULT_FORM))
    counts = [-(-sites * level // LEVELS) for level in range(1, LEVELS + 1)]
    levels = {level: Network(UPDP, count, level) for level, count in enumerate(counts, 1)}
    built = {level: bench.build(network, model) for level, network in levels.items()}
    for level, network in levels.items():
        yield network
        yield Network(ABRUPT, network.amount, level)
        yield Network(PAPER, network.amount, level)

    def ratio(level: int, candidate: Network) -> float:
        """Measure how much longer the candidate takes than UPDP at this level."""
        pair = {"": built[level], "other": bench.build(candidate, model)}
        medians = measure_latency(pair, images, rounds=max(1, rounds // 2))
        return medians["other"][0] / medians[""][0]

    droppable = len(require_sites(model, Form.BLOCK_DROP))
    dropped = [Network(DROP, count, 0) for count in range(1, droppable + 1)]
    modules = {0: model, **{int(network.amount): bench.build(network, model) for network in dropped}}
    medians = measure_latency(
        {**{f"P{level}": net for level, net in built.items()}, **{str(count): net for count, net in modules.items()}},
        images,
        rounds=rounds,
    )
    chosen: dict[int, int] = {}
    for level in levels:
        aim = medians[f"P{level}"][0]
        slower = max((count for count in modules if medians[str(count)][0] >= aim), default=0)
        for count in (slower, slower + 1):
            if 1 <= count <= droppable:
                chosen.setdefault(count, level)
    yield from (Network(DROP, count, level) for count, level in chosen.items())

    family = FAMILIES[bench.family]
    for level in levels:
        found = bisected(lambda share: ratio(level, Network(TORCH_PRUNING, share, level)), 0.0, 0.9)  # noqa: B023
        yield Network(TORCH_PRUNING, round(found, 4), level)
        widths = range(family.multiple, family.width, family.multiple)
        narrower = bisected(
            lambda place: ratio(level, Network(SMALLER, widths[-1 - int(place)], level)),  # noqa: B023
            0,
            len(widths) - 1,
            whole=True,
        )
        yield Network(SMALLER, widths[-1 - int(narrower)], level)


def bisected(measure: Callable[[float], float], low: float, high: float, *, whole: bool = False) -> float:
    """Return where `measure`, which falls, is nearest to 1 of the places that were tried."""
    tried: dict[float, float] = {}
    for _ in range(BISECTIONS):
        place = (low + high) // 2 if whole else (low + high) / 2
        tried[place] = measure(place)
        if tried[place] > 1:
            low = place + whole
        else:
            high = place - whole
        if low > high:
            break
    return min(tried, key=lambda place: abs(tried[place] - 1))
