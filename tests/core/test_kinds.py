"""A new kind of site needs its own class and a line in the registry: nothing else has to know of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny_models import distance, logits, tiny_model
from torch import nn
from transformers import AutoModelForImageClassification

from updp_hf import Plan, UPDPForImageClassification, calibrate_, find_sites, gate_, merge
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.gates.gate import Blend, gates, set_lambda_
from updp_hf.core.kinds import KINDS, kind_of_form
from updp_hf.core.plan.site import Saving, Site
from updp_hf.errors import PlanError, UPDPError
from updp_hf.model.layout_updp import get_slot
from updp_hf.surgery.model_io import example_inputs_of


@dataclass(frozen=True)
class LinearNorm(Site):
    """A norm that becomes a Linear: of no use to anybody, but no other kind of site has it."""

    kind = "toy"
    forms: ClassVar[dict[str, str]] = {"norm-fit": "a Linear for the norm"}
    looked_for = "a norm over channels"
    outcome = "without norms"

    @classmethod
    def find_in(cls, structure, block, form, latencies=None) -> Iterator["LinearNorm"]:
        for call in structure.parts:
            if structure.is_norm(call) and structure.block_of(call.path) == block:
                channels = call.shape[-1]
                before = count_parameters(structure.modules[call.path])
                saving = Saving(-call.shape[1] * channels**2, before - (channels + 1) * channels)
                yield cls(form, block, (call.path,), channels, saving=saving)

    def fits(self, structure):
        call = structure.part_at(self.slots[0])
        return "" if call is not None and structure.is_norm(call) else f"{self.slots[0]!r} is no norm"

    def gates(self, model, start):
        linear = nn.Linear(self.channels, self.channels)
        return {self.slots[0]: Blend(get_slot(model, self.slots[0]), linear)}

    def merged(self, model):
        return {self.slots[0]: get_slot(model, self.slots[0]).closed()}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(KINDS, LinearNorm.kind, LinearNorm)


@torch.no_grad()
def test_a_new_kind_goes_all_the_way(tmp_path):
    model, stock = tiny_model("vit"), tiny_model("vit")
    found = find_sites(model, ["norm-fit", "merge-keep-norm"])
    toys = [site for site in found.sites if isinstance(site, LinearNorm)]
    assert [site.slots for site in toys[:2]] == [(f"vit.layers.0.layernorm_{side}",) for side in ("before", "after")]
    assert len(toys) == 6
    assert not found.unsupported

    runs = [site for site in found.sites if site not in toys]
    plan = Plan((toys[0], toys[3], runs[1]))
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_dict()))
    assert Plan.load(tmp_path / "plan.json") == plan
    assert [site.left for site in plan.sites] == ["a Linear for the norm"] * 2 + ["the norm and one map"]

    gate_(model, plan)
    expected = logits(stock)
    assert torch.equal(logits(model), expected)
    calibrate_(model, [example_inputs_of(model, 16, seed) for seed in range(2)])
    set_lambda_(model, 0.5)
    assert distance(expected, logits(model)) > 0
    set_lambda_(model, 1.0)
    merged = merge(model)
    assert not list(gates(merged))
    assert distance(logits(model), logits(merged)) <= 1e-10
    inputs = example_inputs_of(stock)
    assert count_macs(stock, inputs) - count_macs(merged, inputs) == sum(site.saving.macs for site in plan.sites)
    assert count_parameters(stock) - count_parameters(merged) == sum(site.saving.parameters for site in plan.sites)

    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert isinstance(loaded, UPDPForImageClassification)
    assert distance(logits(merged), logits(loaded)) <= 1e-12
    assert Plan.from_dict(loaded.config.plan) == plan
    assert len(find_sites(loaded, ["norm-fit"]).sites) == 4  # what is left


def test_sites_of_all_kinds_clash_in_a_slot():
    found = find_sites(tiny_model("vit"), ["norm-fit", "merge"]).sites
    behind = next(site for site in found if site.slots == ("vit.layers.0.layernorm_after",))
    run = next(site for site in found if site.form == "merge")
    with pytest.raises(PlanError, match=r"overlap in 'vit\.layers\.0\.layernorm_after'"):
        Plan((behind, run))


def test_every_kind_says_what_it_leaves_and_no_form_has_two():
    forms = [form for kind in KINDS.values() for form in kind.forms]
    assert len(forms) == len(set(forms))
    assert all(kind_of_form(form) is kind for kind in KINDS.values() for form in kind.forms)
    assert all(name == kind.kind and kind.outcome and kind.looked_for for name, kind in KINDS.items())
    with pytest.raises(UPDPError, match=r"The form is 'melt', expected one of \['merge', .*'norm-fit'\]"):
        kind_of_form("melt")


def test_a_site_of_a_kind_that_is_not_registered_is_refused(monkeypatch):
    document = Plan((LinearNorm("norm-fit", "blocks.0", ("blocks.0.norm",), 8),)).to_dict()
    monkeypatch.delitem(KINDS, LinearNorm.kind)
    with pytest.raises(PlanError, match=r"of the kind 'toy', expected one of \['run', 'branch', 'att"):
        Plan.from_dict(document)
