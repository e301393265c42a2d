"""What the benchmark of selectors found, as Markdown: a verdict, and for each network a table of the selectors."""

import statistics
from collections.abc import Iterator, Sequence
from math import comb
from typing import Any

import numpy as np

from recipes.benchmarks.text import paragraph, side_by_side

MEASURES = {"accuracy": "{:.1%}", "loss": "{:.3f}"}
REPEATS = 3
"""How often a plan that a selector chose is fine-tuned, with other seeds."""
DRAWS = 2000
"""Of the bootstrap over plans."""


def table(results: dict[str, Any]) -> str:
    """Return a verdict, and for each network a Markdown table of the selectors, means over its baselines."""
    parts = [paragraph(verdict(results))]
    for name, network in results["networks"].items():
        runs = finished(network)
        rows = {selector: dict(facts(selector, runs)) for selector in selectors_of(runs)}
        columns = {fact: {selector: row[fact] for selector, row in rows.items()} for fact in rows.get("taylor", {})}
        parts += [paragraph(description(name, network["conditions"], runs)), side_by_side(columns)] if runs else []
    return "\n\n".join(parts)


def page(results: dict[str, Any]) -> str:
    return f"# Selectors\n\n{table(results)}\n"


def finished(network: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was found with each baseline of which the sample and all choices are fine-tuned."""
    return [
        run
        for run in network["seeds"].values()
        if run["selectors"]
        and all(run["plans"].get(plan) for plan in (*run["sample"], *(s["choice"] for s in run["selectors"].values())))
    ]


def selectors_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run["selectors"]))


def facts(selector: str, runs: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the facts about one selector, means over the baselines with which it was tried."""
    runs = [run for run in runs if selector in run["selectors"]]
    chosen = [run["selectors"][selector] for run in runs]
    yield "baselines", str(len(runs))
    yield "τ, accuracy", correlation("scores", "accuracy", selector, runs)
    yield "τ, loss", correlation("scores", "loss", selector, runs)
    yield "τ, loss, scored by accuracy", correlation("accuracies", "loss", selector, runs)
    for measure, form in MEASURES.items():
        values = [mean(run, own["choice"], measure) for run, own in zip(runs, chosen, strict=True)]
        yield f"{measure} of its plan", form.format(statistics.fmean(values))
    for measure in MEASURES:
        ranks = [rank(run, own["choice"], measure) for run, own in zip(runs, chosen, strict=True)]
        yield f"rank, {measure}", " and ".join(map(str, ranks))
    yield "images", f"{statistics.fmean(own['images'] for own in chosen):,.0f}"
    yield "seconds", f"{statistics.fmean(own['seconds'] for own in chosen):.1f}"


def mean(run: dict[str, Any], plan: str, measure: str) -> float:
    """Return what fine-tuning a plan gave in the mean over its seeds."""
    return statistics.fmean(result[measure] for result in run["plans"][plan])


def goodness(run: dict[str, Any], plan: str, measure: str) -> float:
    """Return what the first fine-tuning of a plan gave, which has the same seed for all plans; higher is better."""
    return run["plans"][plan][0][measure] * (-1 if measure == "loss" else 1)


def correlation(kind: str, measure: str, selector: str, runs: Sequence[dict[str, Any]]) -> str:
    """Return Kendall's τ of scores and what fine-tuning gave, with the 95 % interval of a bootstrap over plans."""
    generator = np.random.default_rng(0)
    means = np.zeros(1 + DRAWS)
    for run in runs:
        scores = run["selectors"][selector].get(kind)
        if scores is None:
            return "–"
        values = [goodness(run, plan, measure) for plan in run["sample"]]
        one, other = (np.sign(np.subtract.outer(numbers, numbers)) for numbers in (scores, values))
        count = len(values)
        drawn = np.vstack([np.ones(count), generator.multinomial(count, [1 / count] * count, size=DRAWS)])
        both, *own = (((drawn @ signs) * drawn).sum(1) for signs in (one * other, one**2, other**2))
        means += both / np.sqrt(own[0] * own[1]) / len(runs)  # τ-b of the plans, each as often as it was drawn
    low, high = np.quantile(means[1:], [0.025, 0.975])
    return f"{means[0]:.2f} ({low:.2f} to {high:.2f})"


def rank(run: dict[str, Any], plan: str, measure: str) -> int:
    """Return the rank of `plan` among all plans that were fine-tuned, 1 for the best."""
    return 1 + sum(goodness(run, other, measure) > goodness(run, plan, measure) for other in run["plans"])


def verdict(results: dict[str, Any]) -> str:
    """Say whether the supernet's plans are at least as good as those of the best selector that trains nothing."""
    runs = [run for network in results["networks"].values() for run in finished(network)]
    means: dict[str, dict[str, float]] = {}
    for name in selectors_of(runs):
        if all(name in run["selectors"] for run in runs):
            chosen = [run["selectors"][name]["choice"] for run in runs]
            pairs = list(zip(runs, chosen, strict=True))
            means[name] = {measure: statistics.fmean(mean(*pair, measure) for pair in pairs) for measure in MEASURES}
            means[name]["images"] = statistics.fmean(run["selectors"][name]["images"] for run in runs)
    if "supernet" not in means:
        return "Not all baselines have a supernet."
    cheap = [name for name in means if not name.startswith("supernet")]
    best = min(cheap, key=lambda name: (means[name]["loss"], means[name]["images"]))
    ours, others = means["supernet"], means[best]
    return (
        f"Mean over {len(runs)} baselines (all networks): the supernet's plans reach a held-out loss of "
        f"{ours['loss']:.3f} ({ours['accuracy']:.1%}), those of {best!r}, the best selector that trains "
        f"nothing, {others['loss']:.3f} ({others['accuracy']:.1%}): the supernet, which takes "
        f"{ours['images'] / max(others['images'], 1):,.0f} times as many images, is "
        f"{'at least as good' if ours['loss'] <= others['loss'] else 'not as good'}."
    )


def description(name: str, conditions: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """Return how a network was measured, and how far apart plans and repetitions are."""
    images, versions, closed = conditions["images"], conditions["versions"], conditions["num_pruned_blocks"]
    sites = runs[0]["baseline"]["sites"]
    searched = max(own.get("searched", 0) for run in runs for own in run["selectors"].values())
    changes = ", ".join(f"{change} {value}" for change, value in conditions["changes"].items())
    counts = " and ".join(str(len(run["plans"])) for run in runs)
    spreads = []
    for measure, form in MEASURES.items():
        plans = [[run["plans"][plan][0][measure] for plan in run["sample"]] for run in runs]
        again = [[one[measure] for one in plan] for run in runs for plan in run["plans"].values() if len(plan) > 1]
        across, noise = (np.mean([np.var(values, ddof=1) for values in groups]) ** 0.5 for groups in (plans, again))
        before = np.mean([run["baseline"][measure] for run in runs])
        numbers = [form.format(value) for value in (before, np.mean(plans), across, noise)]
        spread_ = "baseline {}, random plans {}, ± {} from plan to plan, ± {} from seed to seed".format(*numbers)
        spreads.append(f"{measure}: {spread_}")
    return f"""
        **{name}** with {changes}, {closed} of {sites} sites closed: {comb(sites, closed)} plans, of which a
        search scores at most {searched}. Baselines of {conditions["baseline_epochs"]} epochs on the digits, distorted
        and with noise ({images["noise"]}), {len(runs)} of them; plans are fine-tuned for {conditions["epochs"]} epochs,
        those that selectors chose with {REPEATS} seeds, of which the table has the mean; τ and ranks are of the first.
        Held out are 450 digits, each distorted {images["test_copies"]} times. {"; ".join(spreads)}. τ: Kendall's over
        {conditions["plans"]} random plans for each baseline, above 0 if better scores go with better results, in
        brackets the 95 % interval of {DRAWS:,} bootstrap samples of plans. Ranks among the {counts} plans that were
        fine-tuned. Scored by {images["sample"]} training images, on which no supernet is trained. Images: those that
        were forwarded, three times as many where a backward followed. Seconds of the processor, {conditions["device"]},
        {conditions["threads"]} thread, {conditions["dtype"]}, torch {versions["torch"]}, transformers
        {versions["transformers"]}, timm {versions["timm"]}."""
