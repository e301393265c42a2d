"""The plan as a document: what is written is read again, and what does not fit is refused."""

import dataclasses
import json

import pytest

from updp_hf.core.depth.attention import Attention
from updp_hf.core.depth.blocks import Block
from updp_hf.core.depth.branches import Branch
from updp_hf.core.depth.runs import Run
from updp_hf.core.kinds import Form
from updp_hf.core.plan.plan import Plan, library_versions
from updp_hf.core.plan.site import Saving
from updp_hf.errors import PlanError


def ffn(block, **fields):
    slots = tuple(f"{block}.{slot}" for slot in ("norm", "mlp.fc1", "mlp.act", "mlp.fc2"))
    return Run(
        **{
            "form": Form.MERGE,
            "block": block,
            "slots": slots,
            "activations": slots[2:3],
            "norms": slots[:1],
            "norm_channels": (8,),
            "channels": 8,
            "saving": Saving(macs=500, parameters=100),
            **fields,
        }
    )


def conv(block):
    slots = tuple(f"{block}.{slot}" for slot in ("conv1", "bn1", "bn1.act", "conv2"))
    return Run(Form.MERGE, block, slots, 8, 1, activations=slots[2:3], cropped=slots[3:])


def drop(block):
    return Block(Form.BLOCK_DROP, block, (block,), 8)


def attention(block):
    return Attention(Form.ATTENTION_DROP, block, (f"{block}.norm1", f"{block}.attn"), outputs=2)


PLAN = Plan(
    (ffn("blocks.0"), attention("blocks.1"), conv("blocks.2")),
    start="inherit",
    end_activation="relu",
    base_model="someone/some-vit",
    revision="0123abc",
    versions={"torch": "2.8.0"},
)

RELEASE_0_1 = """\
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


GOLDEN = """\
{
  "base_model": "someone/some-vit",
  "end_activation": "relu",
  "format_version": 2,
  "revision": "0123abc",
  "sites": [
    {
      "activations": [
        "blocks.0.mlp.act"
      ],
      "block": "blocks.0",
      "channel_axis": -1,
      "channels": 8,
      "cropped": [],
      "form": "merge",
      "kind": "run",
      "norm_channels": [
        8
      ],
      "norms": [
        "blocks.0.norm"
      ],
      "saving": {
        "macs": 500,
        "parameters": 100,
        "seconds": null
      },
      "slots": [
        "blocks.0.norm",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.act",
        "blocks.0.mlp.fc2"
      ]
    },
    {
      "block": "blocks.1",
      "channel_axis": -1,
      "channels": 0,
      "form": "attention-drop",
      "kind": "attention",
      "outputs": 2,
      "saving": {
        "macs": 0,
        "parameters": 0,
        "seconds": null
      },
      "slots": [
        "blocks.1.norm1",
        "blocks.1.attn"
      ]
    },
    {
      "activations": [
        "blocks.2.bn1.act"
      ],
      "block": "blocks.2",
      "channel_axis": 1,
      "channels": 8,
      "cropped": [
        "blocks.2.conv2"
      ],
      "form": "merge",
      "kind": "run",
      "norm_channels": [],
      "norms": [],
      "saving": {
        "macs": 0,
        "parameters": 0,
        "seconds": null
      },
      "slots": [
        "blocks.2.conv1",
        "blocks.2.bn1",
        "blocks.2.bn1.act",
        "blocks.2.conv2"
      ]
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


def test_a_plan_of_release_0_1_is_read():
    plan = Plan.from_dict(json.loads(RELEASE_0_1))
    assert plan == PLAN
    assert [site.saving for site in plan.sites] == [site.saving for site in PLAN.sites]
    assert plan.versions == PLAN.versions
    assert plan.to_dict()["format_version"] == 2


def test_a_plan_of_release_0_1_that_does_not_say_how_it_starts_inherits():
    assert Plan.from_dict(without(json.loads(RELEASE_0_1), "start")).start == "inherit"
    assert Plan.from_dict(without(json.loads(GOLDEN), "start")).start == "fit"


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        Plan((ffn("blocks.0"), ffn("blocks.11"))),
        Plan((drop("blocks.3"),)),
        Plan((Branch(Form.BRANCH_FIT, "blocks.0", ("blocks.0.mlp",), 8, saving=Saving(1, 2, 0.5)),)),
        Plan((ffn("blöcke.0"),)),
        Plan(()),
    ],
    ids=lambda plan: ", ".join(map(str, plan.sites)),
)
def test_a_plan_survives_json(plan):
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan
    assert read.to_dict() == plan.to_dict()
    assert read.digest() == plan.digest()
    assert [site.saving for site in read.sites] == [site.saving for site in plan.sites]
    assert [site.left for site in read.sites] == [site.left for site in plan.sites]


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
        {"sites": (ffn("blocks.0", saving=Saving(7, 8, 0.1)), *PLAN.sites[1:])},
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
        {"start": "fit"},
    ],
)
def test_the_digest_depends_on_what_is_done(changes):
    digests = {PLAN.digest(), Plan((ffn("blocks.1"),)).digest(), dataclasses.replace(PLAN, **changes).digest()}
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


def with_site(document, **changes):
    return document | {"sites": [document["sites"][0] | changes]}


HOSTILE = {
    "future version": lambda d: d | {"format_version": 3},
    "version as text": lambda d: d | {"format_version": "1"},
    "no version": lambda d: without(d, "format_version"),
    "version of none": lambda d: d | {"format_version": 0},
    "unknown field": lambda d: d | {"code": "import os"},
    "no sites": lambda d: without(d, "sites"),
    "sites of no kind": lambda d: d | {"sites": None},
    "sites as text": lambda d: d | {"sites": "blocks.0"},
    "site of no kind": lambda d: d | {"sites": [None]},
    "unknown form": lambda d: with_site(d, form="rm -rf"),
    "form of no kind": lambda d: with_site(d, form=["merge"]),
    "no form": lambda d: without(d, "sites", 0, "form"),
    "channels of no kind": lambda d: with_site(d, norm_channels=8),
    "channels of text": lambda d: with_site(d, norm_channels=["8"]),
    "endless channels": lambda d: with_site(d, channels=2**70),
    "no block": lambda d: without(d, "sites", 0, "block"),
    "endless block": lambda d: with_site(d, block="b" * 2**13),
    "unknown start": lambda d: d | {"start": "pretend"},
    "unknown end activation": lambda d: d | {"end_activation": "system"},
    "twice the same": lambda d: d | {"sites": d["sites"][:1] * 2},
    "a list": lambda d: [d],
    "nothing": lambda d: None,
}
HOSTILE_NOW = {
    "no kind": lambda d: without(d, "sites", 0, "kind"),
    "unknown kind": lambda d: with_site(d, kind="channels"),
    "kind of no kind": lambda d: with_site(d, kind=["run"]),
    "form of another kind": lambda d: with_site(d, form="block-drop"),
    "no slots": lambda d: without(d, "sites", 0, "slots"),
    "empty slots": lambda d: with_site(d, slots=[]),
    "slots of numbers": lambda d: with_site(d, slots=[0, 1]),
    "unknown site field": lambda d: with_site(d, weight=1),
    "field of another kind": lambda d: with_site(d, outputs=1),
    "saving of no kind": lambda d: with_site(d, saving=5),
    "saving in text": lambda d: with_site(d, saving={"macs": "5"}),
    "unknown saving": lambda d: with_site(d, saving={"money": 5}),
}
HOSTILE_THEN = {
    "no run": lambda d: without(d, "sites", 0, "run"),
    "empty run": lambda d: with_site(d, run=[]),
    "run of numbers": lambda d: with_site(d, run=[0, 1]),
    "no cropped": lambda d: without(d, "sites", 0, "cropped"),
    "saving in text": lambda d: with_site(d, macs_saved="5"),
    "marks of no kind": lambda d: with_site(d, marked=None),
    "shared of numbers": lambda d: with_site(d, shared=[1], marked=d["sites"][0]["run"][:1]),
}


@pytest.mark.parametrize("spoil", (HOSTILE | HOSTILE_NOW).values(), ids=HOSTILE | HOSTILE_NOW)
def test_what_is_no_plan_is_refused(spoil):
    with pytest.raises(PlanError):
        Plan.from_dict(spoil(json.loads(GOLDEN)))


@pytest.mark.parametrize("spoil", (HOSTILE | HOSTILE_THEN).values(), ids=HOSTILE | HOSTILE_THEN)
def test_what_is_no_plan_of_release_0_1_is_refused(spoil):
    with pytest.raises(PlanError):
        Plan.from_dict(spoil(json.loads(RELEASE_0_1)))


@pytest.mark.parametrize("content", [b"", b"not json", b"[1, 2]", b"\xff\xfe\x00", GOLDEN[:200].encode()])
def test_a_file_that_holds_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")


def test_a_newer_plan_says_what_to_do():
    with pytest.raises(PlanError, match=r"version 3, but .* reads 2 and older ones: make the plan again, or install"):
        Plan.from_dict(PLAN.to_dict() | {"format_version": 3})


# sites that do not go together


@pytest.mark.parametrize(
    "sites",
    [
        (ffn("blocks.0"), ffn("blocks.0")),
        (ffn("blocks.0"), ffn("blocks.0", form=Form.MERGE_KEEP_NORM, slots=("blocks.0.mlp.fc1",), norms=())),
        (drop("blocks.0"), ffn("blocks.0")),
        (ffn("blocks.0"), drop("blocks.0")),
        (ffn("blocks.0"), Branch(Form.BRANCH_FIT, "blocks.0", ("blocks.0.mlp",))),
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
        Plan((ffn("blocks.0", slots=("blocks.0.bn1",)), Run(Form.MERGE, "blocks.0", ("blocks.0.bn1.act",))))


def test_nothing_follows_a_block_that_is_gone():
    with pytest.raises(PlanError, match="end_activation"):
        Plan((drop("blocks.0"),), end_activation="relu")


def test_a_site_has_a_form_of_its_kind_and_a_slot():
    with pytest.raises(PlanError, match=r"of the kind 'block' has the form 'merge', expected one of \['block-drop'\]"):
        Block(Form.MERGE, "blocks.0", ("blocks.0",))
    with pytest.raises(PlanError, match=r"^blocks\.0 \(merge\) has no slots"):
        Run(Form.MERGE, "blocks.0", ())


@pytest.mark.parametrize(("saving", "counts"), [(Saving(5, -1), 5), (Saving(5, 1, -0.5), -0.5), (Saving(-5, 9), -5)])
def test_what_counts_is_the_latency_if_it_was_measured(saving, counts):
    assert saving.compute == counts
    assert drop("b").saves_compute is False
    assert dataclasses.replace(drop("b"), saving=saving).saves_compute is (counts > 0)
