"""Pictures show the facts of a report: the same bytes for the same facts, readable on any page."""

import copy
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from reports import empty_report, full_report, site

from updp_hf import Plan, Report
from updp_hf.reporting.card import PICTURES
from updp_hf.reporting.plots import plot_before_after, plot_blocks, plot_front, plot_schedule
from updp_hf.reporting.report import KEPT, Cost
from updp_hf.selection.pareto import Front, Point

MERGED, DROPPED, BARE = "merged", "dropped", "without attention"


def blocks(count):
    return [f"net.layers.{index}" for index in range(count)]


def plan(*sites):
    """Return a plan of `(form, number of the block)`, with a run of its own for each."""
    found = [site(form, f"net.layers.{n}", f"net.layers.{n}.{i}") for i, (form, n) in enumerate(sites)]
    return Plan(tuple(found)).to_dict()


def report_of(count, *sites):
    return full_report(blocks=blocks(count), plan=plan(*sites))


OUTCOMES = {
    "nothing": ((), [KEPT, KEPT, KEPT]),
    "merged": ([("merge", 1)], [KEPT, MERGED, KEPT]),
    "every form that leaves something": (
        [("merge-keep-norm", 0), ("merge-whole-kernels", 1), ("branch-fit", 2)],
        [MERGED, MERGED, MERGED],
    ),
    "dropped": ([("block-drop", 0), ("block-drop", 2)], [DROPPED, KEPT, DROPPED]),
    "attention dropped": ([("attention-drop", 2)], [KEPT, KEPT, BARE]),
    "several runs of a block": ([("merge", 0), ("merge", 0)], [MERGED, KEPT, KEPT]),
    "attention dropped, then merged": ([("attention-drop", 0), ("merge", 0)], [f"{BARE} and {MERGED}", KEPT, KEPT]),
    "all kinds": ([("block-drop", 2), ("attention-drop", 0), ("branch-fit", 1)], [BARE, MERGED, DROPPED]),
}


@pytest.mark.parametrize(("sites", "outcomes"), OUTCOMES.values(), ids=OUTCOMES)
def test_each_block_has_the_outcome_that_its_sites_tell(sites, outcomes):
    assert report_of(3, *sites).outcomes == dict(zip(blocks(3), outcomes, strict=True))


def test_blocks_stand_in_order_of_execution():
    assert list(report_of(12, ("merge", 11), ("merge", 2)).outcomes) == blocks(12)


def test_a_pruned_block_that_was_not_listed_is_pruned_all_the_same():
    outcomes = report_of(2, ("block-drop", 1), ("merge", 2)).outcomes
    assert outcomes == {"net.layers.0": KEPT, "net.layers.1": DROPPED, "net.layers.2": MERGED}
    assert replace(report_of(0, ("merge", 1)), blocks=[]).outcomes == {"net.layers.1": MERGED}
    assert empty_report().outcomes == {}


# pictures


def front():
    plans = [plan(*(("merge", n) for n in range(count))) for count in (1, 2, 3)]
    points = [
        Point(plan, -0.1 * speed_up, 2e-3, speed_up) for plan, speed_up in zip(plans, (1.1, 1.3, 1.2), strict=True)
    ]
    return Front(tuple(points[:2]), tuple(points[2:]), 1, "accuracy")


DRAWN = {**{plot.__name__: (plot, full_report) for plot in PICTURES.values()}, "plot_front": (plot_front, front)}
every_picture = pytest.mark.parametrize(("plot", "facts"), DRAWN.values(), ids=DRAWN)


def drawn(plot, facts, folder):
    file = folder / "picture.png"
    plot(facts, file)
    return file.read_bytes()


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """Return the function that gives the figure of some facts, without writing it."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))

    def draw(plot, facts):
        plot(facts, tmp_path / "picture.png")
        return figures.pop()

    return draw


def texts(figure):
    return [text.get_text().replace("\n", " ") for text in figure.findobj(Text) if text.get_text()]


@every_picture
def test_a_picture_is_an_opaque_png_on_white(plot, facts, tmp_path):
    assert drawn(plot, facts(), tmp_path).startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(tmp_path / "picture.png") as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert pixels[..., 3].min() == 255
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 255).all()
    assert pixels.min() < 100  # something is drawn
    assert 400 <= pixels.shape[1] <= 2000  # wide enough to read, narrow enough for a page


@every_picture
def test_the_same_facts_give_the_same_bytes(plot, facts, tmp_path):
    assert drawn(plot, facts(), tmp_path) == drawn(plot, facts(), tmp_path)


@every_picture
def test_nothing_of_the_facts_is_changed(plot, facts, tmp_path):
    given = facts()
    before = copy.deepcopy(given)
    plot(given, tmp_path / "picture.png")
    assert given == before


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Return the function that gives the picture of the full report, drawn once."""
    return cache(lambda plot: drawn(plot, full_report(), tmp_path_factory.mktemp("usual")))


CHANGES = {
    plot_before_after: [
        ("metrics_before", "accuracy"),
        ("metrics_after", "accuracy"),
        *((when, cost) for when in ("before", "after") for cost in ("macs", "parameters")),
        *((when, "latency", size) for when in ("before", "after") for size in ("1", "8")),
    ],
    plot_schedule: [("training", name) for name in ("ramp_end", "ramp_start", "steps")] + [("history", 1, "accuracy")],
}


@pytest.mark.parametrize(
    ("plot", "path"),
    [
        pytest.param(plot, path, marks=[pytest.mark.slow] * (index > 0))
        for plot, paths in CHANGES.items()
        for index, path in enumerate(paths)
    ],
    ids=lambda value: getattr(value, "__name__", None) or ".".join(map(str, value)),
)
def test_another_number_makes_another_picture(plot, path, usual, tmp_path):
    document = copy.deepcopy(asdict(full_report()))
    *parents, last = path
    inner = document
    for key in parents:
        inner = inner[key]
    inner[last] = type(inner[last])(inner[last] * 0.75)
    assert drawn(plot, Report.from_dict(document), tmp_path) != usual(plot)


def test_another_ramp_makes_another_picture(tmp_path):
    training = full_report().training
    ramps = [full_report(training=replace(training, ramp=ramp)) for ramp in ("linear", "cosine", "constant")]
    assert len({drawn(plot_schedule, report, tmp_path) for report in ramps}) == 3


def test_another_outcome_makes_another_picture(tmp_path):
    reports = [report_of(3), *(report_of(3, (form, 1)) for form in ("merge", "block-drop", "attention-drop"))]
    assert len({drawn(plot_blocks, report, tmp_path) for report in reports}) == 4


# the blocks


@pytest.mark.parametrize("count", [1, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("plot", PICTURES.values())
def test_a_network_of_any_depth_has_its_pictures(plot, count, tmp_path):
    assert drawn(plot, report_of(count, ("merge", 0)), tmp_path)


@pytest.mark.parametrize("count", [1, 2, 16, 17, 60])
def test_each_block_is_drawn_with_its_number_and_name(count, figure_of):
    found = texts(figure_of(plot_blocks, report_of(count, ("merge", 0))))
    assert set(map(str, range(count))) <= set(found)
    expected = [f"{n} {outcome}" for n, outcome in ((1, "merged"), (count - 1, "kept")) if n]
    assert [text for text in found if text.endswith(("kept", "merged", "dropped"))] == expected


def test_more_blocks_make_a_picture_higher_and_not_wider(figure_of):
    sizes = [figure_of(plot_blocks, report_of(count)).get_size_inches() for count in (16, 17, 60)]
    assert len({width for width, _ in sizes}) == 1
    assert [height for _, height in sizes] == sorted({height for _, height in sizes})


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ("vit.layers.7", "7"),
        ("encoder.stages.2.layers.11", "2.11"),
        ("timm_model.layer3.1", "layer3.1"),
        ("net.middle", "middle"),
        ("features", "features"),
    ],
)
def test_a_block_is_named_by_its_numbers(block, name, figure_of):
    report = full_report(blocks=[block, "another"], plan={"sites": []})
    assert texts(figure_of(plot_blocks, report))[:4] == ["0", name, "1", "another"]


# before and after


def test_each_number_is_printed_above_its_bar(figure_of):
    found = texts(figure_of(plot_before_after, full_report()))
    for title, numbers in {
        "accuracy, %": ("83.1", "81.5"),
        "MACs per image, M": ("1,234.5", "901.7"),
        "parameters, M": ("61.07", "47.39"),
        "latency, batch 1, ms": ("25.13", "14.27"),
        "latency, batch 8, ms": ("187.64", "93.58"),
    }.items():
        assert title in found
        assert set(numbers) <= set(found)
    assert "not measured" not in found


UNMEASURED = {
    "no metrics": ({"metrics_before": {}, "metrics_after": {}}, 2),
    "no metrics before": ({"metrics_before": {}}, 1),
    "no accuracy": ({"metrics_after": {"loss": 0.5}}, 1),
    "no latency": ({"before": Cost(2, 2), "after": Cost(1, 1)}, 2),
    "no latency after": ({"after": Cost(1, 1)}, 2),
    "no batch size in common": ({"after": Cost(1, 1, {"4": 0.1})}, 2),
    "nothing": ({"metrics_before": {}, "metrics_after": {}, "before": Cost(2, 2), "after": Cost(1, 1)}, 4),
}


@pytest.mark.parametrize(("changes", "count"), UNMEASURED.values(), ids=UNMEASURED)
def test_what_was_not_measured_is_said_to_be(changes, count, figure_of):
    assert texts(figure_of(plot_before_after, full_report(**changes))).count("not measured") == count


def test_an_accuracy_of_nothing_is_a_number(figure_of):
    nothing = {"accuracy": 0.0}
    assert (
        texts(figure_of(plot_before_after, full_report(metrics_before=nothing, metrics_after=nothing))).count("0.0")
        == 2
    )


# the schedule


def test_the_accuracy_is_shown_where_there_is_one(figure_of):
    label = "held-out accuracy, %"
    assert label in texts(figure_of(plot_schedule, full_report()))
    for history in ([], [{"step": 0, "lambda": 0.0, "loss": 1.0}]):
        assert label not in texts(figure_of(plot_schedule, full_report(history=history)))


@pytest.mark.parametrize("steps", [1, 120, 100_000])
def test_a_schedule_goes_from_open_to_closed_over_any_number_of_steps(steps, figure_of):
    report = full_report(training=replace(full_report().training, steps=steps), history=[])
    (line,) = figure_of(plot_schedule, report).axes[0].get_lines()
    x, y = line.get_data()
    assert (x[0], x[-1]) == (0, steps)
    assert (y[0], y[-1]) == (0.0, 1.0)
    assert list(y) == sorted(y)
