"""The plan as a document: what is written is read again, and what does not fit is refused."""

import dataclasses
import json

import pytest

from updp_hf.core.kinds import Form
from updp_hf.core.plan.plan import Plan, library_versions
from updp_hf.core.plan.site import Site
from updp_hf.errors import PlanError


def ffn(block, **fields):
    slots = tuple(f"{block}.{slot}" for slot in ("norm", "mlp.fc1", "mlp.act", "mlp.fc2"))
    return Site(
        **{
            "form": Form.MERGE,
            "block": block,
            "run": slots,
            "activations": slots[2:3],
            "norms": slots[:1],
            "norm_channels": (8,),
            "channels": 8,
            "tokens": 5,
            "params_saved": 100,
            "macs_saved": 500,
            **fields,
        }
    )


def conv(block):
    slots = tuple(f"{block}.{slot}" for slot in ("conv1", "bn1", "bn1.act", "conv2"))
    return Site(
        Form.MERGE, block, slots, activations=slots[2:3], cropped=slots[3:], channels=8, channel_axis=1, tokens=16
    )


def drop(block):
    return Site(Form.BLOCK_DROP, block, (block,), container=block, channels=8)


def attention(block):
    return Site(Form.ATTENTION_DROP, block, (f"{block}.norm1", f"{block}.attn"), container=f"{block}.attn", outputs=2)


PLAN = Plan(
    (ffn("blocks.0"), attention("blocks.1"), conv("blocks.2")),
    end_activation="relu",
    base_model="someone/some-vit",
    revision="0123abc",
    versions={"torch": "2.8.0"},
)

GOLDEN = """\
{
  "base_model": "someone/some-vit",
  "end_activation": "relu",
  "format_version": 1,
  "revision": "0123abc",
  "sites": [
    {
      "activations": [
        "blocks.0.mlp.act"
      ],
      "block": "blocks.0",
      "channel_axis": -1,
      "channels": 8,
      "container": null,
      "cropped": [],
      "form": "merge",
      "macs_saved": 500,
      "marked": [],
      "norm_channels": [
        8
      ],
      "norms": [
        "blocks.0.norm"
      ],
      "outputs": 0,
      "params_saved": 100,
      "run": [
        "blocks.0.norm",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.act",
        "blocks.0.mlp.fc2"
      ],
      "seconds_saved": null,
      "shared": [],
      "tokens": 5
    },
    {
      "activations": [],
      "block": "blocks.1",
      "channel_axis": -1,
      "channels": 0,
      "container": "blocks.1.attn",
      "cropped": [],
      "form": "attention-drop",
      "macs_saved": 0,
      "marked": [],
      "norm_channels": [],
      "norms": [],
      "outputs": 2,
      "params_saved": 0,
      "run": [
        "blocks.1.norm1",
        "blocks.1.attn"
      ],
      "seconds_saved": null,
      "shared": [],
      "tokens": 0
    },
    {
      "activations": [
        "blocks.2.bn1.act"
      ],
      "block": "blocks.2",
      "channel_axis": 1,
      "channels": 8,
      "container": null,
      "cropped": [
        "blocks.2.conv2"
      ],
      "form": "merge",
      "macs_saved": 0,
      "marked": [],
      "norm_channels": [],
      "norms": [],
      "outputs": 0,
      "params_saved": 0,
      "run": [
        "blocks.2.conv1",
        "blocks.2.bn1",
        "blocks.2.bn1.act",
        "blocks.2.conv2"
      ],
      "seconds_saved": null,
      "shared": [],
      "tokens": 16
    }
  ],
  "start": "inherit",
  "versions": {
    "torch": "2.8.0"
  }
}
"""


# the document


def test_the_file_is_this_text(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == GOLDEN


def test_this_text_is_the_plan(tmp_path):
    (tmp_path / "plan.json").write_text(GOLDEN, encoding="utf-8")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert Plan.load(tmp_path / "plan.json").versions == PLAN.versions


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        Plan((ffn("blocks.0"), ffn("blocks.11")), start="fit"),
        Plan((drop("blocks.3"),)),
        Plan((ffn("blöcke.0", tokens=7),)),
    ],
    ids=lambda plan: str(plan.sites[0]),
)
def test_a_plan_survives_json(plan):
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan
    assert read.to_dict() == plan.to_dict()
    assert read.digest() == plan.digest()
    assert all(isinstance(site.form, Form) for site in read.sites)


def test_a_plan_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.start = "fit"
    assert hash(PLAN) == hash(Plan.from_dict(PLAN.to_dict()))


def test_a_plan_remembers_the_libraries_it_was_made_with():
    assert set(Plan((drop("blocks.0"),)).versions) == {"updp-hf", "torch", "transformers", "timm"}
    assert library_versions(["no-such-library", "torch"]).keys() == {"torch"}


# the digest


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": {"torch": "9.9"}},
        {"base_model": "", "revision": None},
        {"sites": (ffn("blocks.0", params_saved=7, macs_saved=8, seconds_saved=0.1, tokens=9), *PLAN.sites[1:])},
    ],
    ids=["versions", "origin", "costs"],
)
def test_the_digest_does_not_depend_on_what_changes_no_model(changes):
    assert dataclasses.replace(PLAN, **changes).digest() == PLAN.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"end_activation": "gelu"},
        {"end_activation": None},
        {"sites": (ffn("blocks.0"),)},
        {"sites": (ffn("blocks.3"), *PLAN.sites[1:])},
        {"sites": (ffn("blocks.0", form=Form.MERGE_KEEP_NORM, norms=()), *PLAN.sites[1:])},
        {"sites": (PLAN.sites[0], dataclasses.replace(attention("blocks.1"), outputs=1), PLAN.sites[2])},
        {"sites": (*PLAN.sites[:2], dataclasses.replace(conv("blocks.2"), cropped=()))},
        {"sites": (*PLAN.sites[:2], dataclasses.replace(conv("blocks.2"), channel_axis=-1))},
        {"sites": (*PLAN.sites[:2], dataclasses.replace(conv("blocks.2"), shared=("a",), marked=("blocks.2.bn1",)))},
        {"sites": (ffn("blocks.0"),), "start": "fit"},
    ],
)
def test_the_digest_depends_on_what_is_done(changes):
    digests = {PLAN.digest(), Plan((ffn("blocks.0"),)).digest(), dataclasses.replace(PLAN, **changes).digest()}
    assert len(digests) == 3


# hostile documents


def without(document, *keys):
    """Return `document` without what stands at the path `keys`."""
    *path, last = keys
    holder = document
    for key in path:
        holder = holder[key]
    del holder[last]
    return document


HOSTILE = {
    "future version": lambda d: d | {"format_version": 2},
    "version as text": lambda d: d | {"format_version": "1"},
    "no version": lambda d: without(d, "format_version"),
    "unknown field": lambda d: d | {"code": "import os"},
    "no sites": lambda d: without(d, "sites"),
    "sites of no kind": lambda d: d | {"sites": None},
    "sites as text": lambda d: d | {"sites": "blocks.0"},
    "site of no kind": lambda d: d | {"sites": [None]},
    "unknown form": lambda d: d | {"sites": [d["sites"][0] | {"form": "rm -rf"}]},
    "no form": lambda d: without(d, "sites", 0, "form"),
    "no run": lambda d: without(d, "sites", 0, "run"),
    "no cropped": lambda d: without(d, "sites", 0, "cropped"),
    "channels of no kind": lambda d: d | {"sites": [d["sites"][0] | {"norm_channels": 8}]},
    "no block": lambda d: without(d, "sites", 0, "block"),
    "unknown site field": lambda d: d | {"sites": [d["sites"][0] | {"weight": 1}]},
    "unknown start": lambda d: d | {"start": "pretend"},
    "unknown end activation": lambda d: d | {"end_activation": "system"},
    "twice the same": lambda d: d | {"sites": d["sites"][:1] * 2},
    "a list": lambda d: [d],
    "nothing": lambda d: None,
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_plan_is_refused(spoil):
    with pytest.raises(PlanError):
        Plan.from_dict(spoil(json.loads(GOLDEN)))


@pytest.mark.parametrize("content", [b"", b"not json", b"[1, 2]", b"\xff\xfe\x00", GOLDEN[:200].encode()])
def test_a_file_that_holds_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")


def test_a_newer_plan_says_what_to_do():
    with pytest.raises(PlanError, match=r"version 2, but .* reads 1: make the plan again, or install"):
        Plan.from_dict(PLAN.to_dict() | {"format_version": 2})


# sites that do not go together


@pytest.mark.parametrize(
    "sites",
    [
        (ffn("blocks.0"), ffn("blocks.0")),
        (ffn("blocks.0"), ffn("blocks.0", form=Form.MERGE_KEEP_NORM, run=("blocks.0.mlp.fc1",), norms=())),
        (drop("blocks.0"), ffn("blocks.0")),
        (ffn("blocks.0"), drop("blocks.0")),
        (ffn("blocks.0"), ffn("blocks.0", form=Form.BRANCH_FIT, run=("blocks.0.mlp",), norms=(), activations=())),
    ],
    ids=["duplicate", "overlap", "block and inside", "inside and block", "run and container"],
)
def test_overlapping_sites_are_refused(sites):
    with pytest.raises(PlanError, match="overlap"):
        Plan(sites)


def test_names_that_begin_alike_do_not_overlap():
    plan = Plan((drop("blocks.1"), drop("blocks.10"), ffn("blocks.11"), attention("blocks.11")))
    assert plan.blocks == ["blocks.1", "blocks.10", "blocks.11"]


def test_slots_of_one_site_may_lie_in_each_other():
    Plan((conv("blocks.0"), conv("blocks.1")))
    with pytest.raises(PlanError, match=r"overlap in 'blocks\.0\.bn1\.act'"):
        Plan((ffn("blocks.0", run=("blocks.0.bn1",)), Site(Form.MERGE, "blocks.0", ("blocks.0.bn1.act",))))


def test_no_linear_is_fitted_in_place_of_what_returns_a_tuple():
    with pytest.raises(PlanError, match="tuple of 1"):
        Plan((Site(Form.BRANCH_FIT, "b", ("b.mlp",), container="b.mlp", outputs=1),))
    Plan((attention("blocks.1"),), start="fit")


def test_nothing_follows_a_block_that_is_gone():
    with pytest.raises(PlanError, match="end_activation"):
        Plan((drop("blocks.0"),), end_activation="relu")


# the plan and a model


def test_a_plan_fits_a_model_that_has_its_sites_at_whatever_cost():
    dearer = ffn("blocks.0", tokens=99, params_saved=0, macs_saved=-1)
    PLAN.check([attention("blocks.1"), dearer, drop("blocks.2"), conv("blocks.2")])


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ([ffn(f"blocks.{i}") for i in (1, 2)], r"blocks\.1 \(merge\), blocks\.2 \(merge\)"),
        ([ffn(f"blocks.{i}") for i in range(1, 9)], r"blocks\.3 \(merge\) … blocks\.8 \(merge\)"),
        ([], "none of merge"),
        ([attention("blocks.0")], "none of merge"),
        ([ffn("blocks.0", channels=16)], r"blocks\.0 \(merge\)"),
        ([ffn("blocks.0", cropped=("blocks.0.mlp.fc1",))], r"blocks\.0 \(merge\)"),
    ],
    ids=["other blocks", "many", "none", "other form", "other width", "other kernels"],
)
def test_a_plan_for_another_model_says_what_it_names_what_there_is_and_what_to_ask(found, names):
    slots = "blocks.0.norm, blocks.0.mlp.fc1, blocks.0.mlp.act, blocks.0.mlp.fc2"
    with pytest.raises(PlanError, match=rf"names blocks\.0 \(merge\) with the slots {slots}, .* {names}: was the plan"):
        PLAN.check(found)
