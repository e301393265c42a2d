"""What every architecture and every form must keep: see `tiny_models.py` for the table that is walked here."""

import copy
import functools
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rings import slow_but
from tiny_models import REFUSED, SIZE, TINY_MODELS, TinyModel, close_, distance, observe, randomise_, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from updp_hf import Form, Plan, UPDPForImageClassification, find_sites, gate_, merge
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.depth.chains import chains_in, stretches_of
from updp_hf.core.depth.runs import Run
from updp_hf.core.gates.detour import Bypass, Landing, Shortcut
from updp_hf.core.gates.gate import Blend, Gate, gates
from updp_hf.core.graph.calls import stock_modules
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Site
from updp_hf.errors import MergeError, PlanError
from updp_hf.model.modules_updp import EndActivation
from updp_hf.surgery.find import FoundSites, read, require_sites
from updp_hf.surgery.model_io import example_inputs_of, logits_of, model_inputs


class Case(NamedTuple):
    model: str
    form: Form
    start: str = "inherit"
    end_activation: str | None = None

    def __str__(self) -> str:
        return "-".join(str(part) for part in self if part)


VARIANTS = {
    # Beside the plain start, which every model has for each of its forms.
    "vit": [(Form.MERGE_KEEP_NORM, "fit", None), (Form.MERGE, "fit", None), (Form.ATTENTION_DROP, "inherit", "silu")],
    "deit": [(Form.MERGE, "inherit", "relu")],
    "dinov2": [(Form.MERGE, "inherit", "gelu"), (Form.MERGE, "fit", "relu")],
    "dinov2-swiglu": [(Form.BRANCH_FIT, "fit", "relu")],
    "swin": [(Form.MERGE, "fit", "relu"), (Form.ATTENTION_DROP, "inherit", "relu")],
    "swinv2": [(Form.MERGE, "inherit", "relu"), (Form.MERGE, "fit", "relu")],
    "timm-wrapper": [(Form.MERGE, "fit", "relu"), (Form.MERGE, "inherit", "relu")],
    "timm-vit-n-is-c": [(Form.MERGE, "fit", "relu"), (Form.MERGE, "inherit", "relu")],
    "timm-deit3": [(Form.MERGE, "fit", None)],
    "timm-swin": [(Form.MERGE, "inherit", "relu")],
    "timm-swinv2": [(Form.MERGE, "fit", "relu")],
    "timm-eva02": [(Form.BRANCH_FIT, "fit", None)],
    "chain": [(Form.MERGE, "fit", None), (Form.MERGE_WHOLE_KERNELS, "fit", None)],
    "resnet": [(Form.MERGE, "fit", "relu"), (Form.MERGE, "inherit", "silu")],
    "timm-wrapper-mobilenetv2": [(Form.MERGE, "fit", "relu")],
    "timm-test-efficientnet": [(Form.MERGE, "inherit", "relu"), (Form.MERGE, "fit", None)],
    "convnext": [(Form.MERGE, "inherit", "relu"), (Form.MERGE, "fit", None)],
    "timm-convnext-conv": [(Form.MERGE, "fit", "gelu"), (Form.MERGE, "inherit", "relu")],
    "poolformer": [(Form.MERGE, "fit", "relu")],
    "mobilevit": [(Form.MERGE, "inherit", "relu")],
}
CASES = [Case(row.name, form) for row in TINY_MODELS for form in row.forms]
VARIED = [Case(name, *variant) for name, variants in VARIANTS.items() for variant in variants]
ROWS = {row.name: row for row in TINY_MODELS}
CASES = sorted(CASES + VARIED, key=lambda case: list(ROWS).index(case.model))
OTHER_SIZE = (48, 40)
ALIKE = {
    *("deit", "deit-teacher", "timm-vit-avg", "timm-deit", "timm-deit-distilled", "timm-vit-reg4-dinov2"),
    *("timm-resnet-dilated", "timm-seresnet", "timm-convnextv2", "mobilenetv2", "mobilevit"),
    *("beit", "swinv2", "timm-swin", "timm-swinv2", "timm-deit3", "timm-test-byobnet", "timm-test-resnet"),
    *("timm-resnet-bottleneck", "regnety", "timm-convnext", "timm-mobilenetv3"),
}
"""Rows whose structures are those of other rows together; all of the table is for the slow ring."""
THOROUGH = {"vit", "timm-resnet"}
"""Rows of which every form and variant is tested by default, of the others the first form."""


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """Run a test on each of `cases`, by default each structure once.

    With this scope the tests of a case come one after the other, so that one worker makes its models, once.
    """
    by_default = {Case(name, row.forms[0]) for name, row in ROWS.items() if row.forms and name not in ALIKE}
    is_slow = {case: case.model not in THOROUGH and case not in by_default for case in cases}
    marked = [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * is_slow[case]) for case in cases]
    return pytest.mark.parametrize("case", marked, scope="module")


every_case = each(CASES)
every_row = pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row), marks=[pytest.mark.slow] * (row.name in ALIKE)) for row in TINY_MODELS]
)
WITHOUT_CONFIG_FIELD = {"swin", "swinv2"}  # without its first block, a shifted window would stand in another place
WITHOUT_CONFIG_FIELD |= {"mobilenetv2", "timm-wrapper-mobilenetv2", "mobilevit"}  # their depths are fixed


@functools.cache
def checkpoint(name: str) -> nn.Module:
    return tiny_model(name)


@functools.cache
def structure_of(name: str) -> Structure:
    return read(checkpoint(name), images(name, 1))


@functools.cache
def found_in(name: str) -> FoundSites:
    return find_sites(checkpoint(name), list(Form), structure=structure_of(name))


def sites_of(name: str) -> tuple[Site, ...]:
    return found_in(name).sites


def plan_for(case: Case) -> Plan:
    """Plan the first and the last site, so that paths and numbers of blocks have to be told apart.

    No two convolutional runs are alike, so all of them are planned, also those that do not pay.
    """
    sites = [site for site in sites_of(case.model) if site.form == case.form]
    are_alike = ROWS[case.model].size is None or not isinstance(sites[0], Run)
    chosen = dict.fromkeys((sites[0], sites[-1])) if are_alike else sites
    return Plan(tuple(chosen), start=case.start, end_activation=case.end_activation)


@functools.cache
def gated_model(case: Case) -> nn.Module:
    model = copy.deepcopy(checkpoint(case.model))
    gate_(model, plan_for(case), structure=structure_of(case.model))
    return model


@functools.cache
def closed_model(case: Case) -> nn.Module:
    """Close a gated model of which everything, what was inserted too, has been drawn at random."""
    model = copy.deepcopy(gated_model(case))
    randomise_(model, seed=1)
    close_(model)
    return model


@functools.cache
def merged_model(case: Case) -> nn.Module:
    return merge(closed_model(case), example_inputs=images(case.model, 2))


def images(name: str, batch_size: int, seed: int = 0, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Make random images of the size of the row, or of another one if the net does not fix it."""
    fixed = ROWS[name].size
    if fixed is None:
        return example_inputs_of(checkpoint(name), batch_size, seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(batch_size, 3, *(size or fixed), generator=generator, dtype=torch.float64)
    return model_inputs(checkpoint(name), pixels)


def assert_loads_identically(merged: PreTrainedModel, folder: Path, inputs: dict[str, Tensor]) -> None:
    merged.save_pretrained(folder)
    # Weights in a mapped file are not aligned in memory, which moves the last bit; a copy's are.
    loaded = copy.deepcopy(type(merged).from_pretrained(folder))
    with torch.no_grad():
        assert torch.equal(logits_of(loaded, inputs), logits_of(merged, inputs))


def assert_merged_is_closed(merged: nn.Module, closed: nn.Module, case: Case, tolerance: float) -> None:
    is_stock = isinstance(merged, PreTrainedModel) and not isinstance(merged, UPDPForImageClassification)
    plan, dtype = plan_for(case), next(closed.parameters()).dtype
    # A stock model has no place left where the block was.
    places = [] if is_stock else [*plan.blocks, *(site.slots[-1] for site in plan.sites)]
    for batch_size, size in ((3, None), (4, OTHER_SIZE)):
        inputs = {name: x.to(dtype) for name, x in images(case.model, batch_size, batch_size, size).items()}
        expected, found = (observe(model, inputs, dict.fromkeys(places)) for model in (closed, merged))
        assert distance(expected["logits"][0], expected["logits"][1]) > 2e-4
        for place, value in expected.items():
            assert distance(value, found[place]) <= tolerance, place


# find_sites


@every_row
def test_expected_sites_are_found(row: TinyModel):
    assert isinstance(checkpoint(row.name), PreTrainedModel) == row.is_pretrained
    sites = [site for site in sites_of(row.name) if site.saves_compute]
    assert {form: sum(site.form == form for site in sites) for form in Form} == {form: row.sites(form) for form in Form}


@every_row
def test_every_block_has_a_site_or_a_reason(row: TinyModel):
    found = found_in(row.name)
    blocks = {result.block for result in (*found.sites, *found.unsupported)}
    for form in Form:
        sites = {site.block for site in found.sites if site.form == form}
        unsupported = {none.block for none in found.unsupported if none.form == form and none.reason}
        assert sites | unsupported == blocks
        assert not sites & unsupported


@every_row
def test_what_is_found_fits(row: TinyModel):
    reasons = [site.fits(structure_of(row.name)) for site in sites_of(row.name)]
    assert set(reasons) <= {""}


@each([case for case in CASES if case.model == "swin" or case in VARIED or case == Case("vit", Form.MERGE)])
def test_sites_are_found_again_in_a_gated_model(case: Case):
    expected = [site for site in sites_of(case.model) if site.form == case.form]
    found = find_sites(gated_model(case), [case.form], example_inputs=images(case.model, 1)).sites
    assert list(found) == expected
    assert [s.saving for s in found] == [s.saving for s in expected]


@every_case
def test_plan_survives_json(case: Case):
    plan = plan_for(case)
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan
    assert read.digest() == plan.digest()
    assert [site.saving.macs for site in read.sites] == [site.saving.macs for site in plan.sites]


# gate_


@every_case
def test_gated_model_is_the_checkpoint_bit_for_bit(case: Case):
    inputs = images(case.model, 3)
    with torch.no_grad():
        expected, found = (logits_of(model, inputs) for model in (checkpoint(case.model), gated_model(case)))
    assert torch.equal(expected, found)


@every_case
def test_gating_twice_changes_nothing(case: Case):
    model = copy.deepcopy(gated_model(case))
    before = dict(model.named_modules())
    gate_(model, plan_for(case), example_inputs=images(case.model, 1))
    assert dict(model.named_modules()) == before


@every_case
def test_inserted_modules_take_over_mode_and_dtype(case: Case):
    model = gated_model(case)
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {gate.lam.dtype for _, gate in gates(model)} == {torch.float32}


@functools.cache
def gradients(name: str, is_training: bool) -> dict[str, float]:
    return gradients_of(copy.deepcopy(checkpoint(name)), name, is_training)


def gradients_of(model: nn.Module, name: str, is_training: bool) -> dict[str, float]:
    """Return the largest gradient of each parameter by its stock path, 0 for one that has none.

    What was inserted comes under its real path.
    """
    model.train(is_training)
    model.zero_grad()
    (logits_of(model, images(name, 4)) ** 3).mean().backward()
    stock = {real: path for real, (path, _) in stock_modules(model).items()}
    found = {}
    for path, parameter in model.named_parameters():
        owner, _, own = path.rpartition(".")
        where = f"{stock[owner]}.{own}".removeprefix(".") if owner in stock else path
        found[where] = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
    return found


@every_case
@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
def test_gradients_reach_both_branches(case: Case, is_training: bool):
    """Between the ends, whatever moves in the checkpoint's training still does, and what was inserted does too."""
    # What is to be fitted begins at zero, which a BatchNorm passes no gradient on to.
    model = copy.deepcopy(closed_model(case) if case.start == "fit" else gated_model(case))
    close_(model, 0.5)
    gradient = gradients_of(model, case.model, is_training)
    # A key's bias has no gradient but rounding, nor has a mask token one: so in the checkpoint.
    should_move = {path for path, value in gradients(case.model, is_training).items() if value > 1e-9}
    # Nor has, in training, a shift in front of a BatchNorm.
    if not is_training or ROWS[case.model].size is None:
        fits = {f"{path}.pruned.bias" for path, gate in gates(model) if is_training and isinstance(gate, Shortcut)}
        should_move |= gradient.keys() - gradients(case.model, is_training).keys() - fits
    assert {path for path in should_move if not gradient[path] > 1e-9} == set()


@every_case
def test_the_ends_are_approached_without_a_jump(case: Case):
    model = copy.deepcopy(closed_model(case))
    inputs = images(case.model, 3)
    for end, near, tolerance in ((0.0, 1e-9, 1e-8), (1.0, 1 - 2**-24, 1e-4)):
        close_(model, end)
        with torch.no_grad():
            expected = logits_of(model, inputs)
        close_(model, near)
        with torch.no_grad():
            assert distance(expected, logits_of(model, inputs)) <= tolerance


@every_case
def test_at_its_ends_a_gate_computes_one_side_alone(case: Case):
    """Convolutions that stay are left out, and BatchNorms that mark: they belong to both sides."""
    model = copy.deepcopy(gated_model(case)).train()
    blends = [gate for _, gate in gates(model) if isinstance(gate, Blend | Bypass | Landing | Shortcut)]
    called: list[nn.Module] = []
    for value, dead in ((0.0, "pruned"), (1.0, "original")):
        close_(model, value)
        parts = [part for gate in blends if hasattr(gate, dead) for part in getattr(gate, dead).modules()]
        hooks = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in parts]
        logits_of(model, images(case.model, 2))
        for hook in hooks:
            hook.remove()
    assert called == []


# merge


@every_case
def test_closing_changes_the_function(case: Case):
    closed = closed_model(case)
    opened = copy.deepcopy(closed)
    close_(opened, 0.0)
    inputs = images(case.model, 3)
    with torch.no_grad():
        assert distance(logits_of(opened, inputs), logits_of(closed, inputs)) > 1e-3


@every_case
def test_merged_is_closed_in_float64(case: Case):
    assert_merged_is_closed(merged_model(case), closed_model(case), case, 1e-10)


@every_case
def test_merged_is_closed_in_float32(case: Case):
    closed = copy.deepcopy(closed_model(case)).float()
    merged = merge(closed, example_inputs={name: x.float() for name, x in images(case.model, 2).items()})
    assert_merged_is_closed(merged, closed, case, 1e-4)


@every_case
def test_merging_leaves_the_closed_model_as_it_was(case: Case):
    closed = copy.deepcopy(closed_model(case))
    before = {name: tensor.clone() for name, tensor in closed.state_dict().items()}
    merge(closed, example_inputs=images(case.model, 2))
    after = closed.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@every_case
def test_merged_model_is_smaller_by_what_its_sites_save(case: Case):
    plan, merged = plan_for(case), merged_model(case)
    inputs = images(case.model, 1)
    ends = [m for m in merged.modules() if isinstance(m, EndActivation)]
    assert len(ends) == (len(plan.blocks) if plan.end_activation else 0)
    params = count_parameters(checkpoint(case.model)) - count_parameters(merged)
    assert params == sum(site.saving.parameters for site in plan.sites) - sum(count_parameters(m.end) for m in ends)
    macs = count_macs(checkpoint(case.model), inputs) - count_macs(merged, inputs)
    assert macs == sum(site.saving.macs for site in plan.sites)
    worthwhile = [site for site in plan.sites if site.saves_compute and ROWS[case.model].size is None]
    assert all(site.saving.parameters > 0 for site in worthwhile)


@every_case
def test_merged_model_holds_no_gate_and_no_plan(case: Case):
    merged = merged_model(case)
    assert not any(isinstance(module, Gate) for module in merged.modules())
    assert not hasattr(merged, "updp_plan")


@each([case for case in CASES if ROWS[case.model].is_pretrained])
def test_saved_model_loads_with_identical_logits(case: Case, tmp_path):
    merged = merged_model(case)
    is_stock = case.form == Form.BLOCK_DROP and case.model not in WITHOUT_CONFIG_FIELD
    assert type(merged) is (type(checkpoint(case.model)) if is_stock else UPDPForImageClassification)
    assert_loads_identically(merged, tmp_path, images(case.model, 3))


def test_timm_model_stays_a_timm_model():
    case = Case("timm-vit", Form.MERGE)
    assert type(merged_model(case)) is type(checkpoint(case.model))


# forms together


@pytest.mark.parametrize("name", slow_but(["vit", "timm-wrapper"], "vit"))
@pytest.mark.parametrize("end_activation", slow_but([None, "relu"], "relu"))
def test_sites_of_two_forms_share_a_block(name: str, end_activation: str | None, tmp_path):
    sites = [s for s in sites_of(name) if s.form in (Form.ATTENTION_DROP, Form.MERGE) and s.block.endswith(".1")]
    plan = Plan(tuple(sites), end_activation=end_activation)
    assert len(plan.sites) == 2
    assert len(plan.blocks) == 1
    model = copy.deepcopy(checkpoint(name))
    gate_(model, plan)
    randomise_(model, seed=1)
    close_(model)
    merged = merge(model)
    inputs = images(name, 3)
    with torch.no_grad():
        assert distance(logits_of(model, inputs), logits_of(merged, inputs)) <= 1e-10
    assert_loads_identically(merged, tmp_path, inputs)


# chains

CHAINED = (Form.MERGE, Form.MERGE_WHOLE_KERNELS)


@functools.cache
def every_run(form: Form) -> tuple[Site, ...]:
    """Return a run for each way to merge a stretch of the chain, whether it saves compute or not."""
    structure = structure_of("chain")
    return tuple(
        Run.of(structure, block, form, chain, stretch)
        for block in structure.blocks()
        for chain in chains_in(structure, block)
        for stretch in stretches_of(structure, chain, crops=form == Form.MERGE)
    )


def test_runs_of_a_chain_have_up_to_three_maps_each_cropped_or_whole():
    stretches = {(site.slots, bool(site.cropped)) for form in CHAINED for site in every_run(form)}
    convs = {name for name, module in checkpoint("chain").named_modules() if isinstance(module, nn.Conv2d)}
    assert {len(convs & set(run)) for run, _ in stretches} == {2, 3}
    assert {is_cropped for _, is_cropped in stretches} == {True, False}


@pytest.mark.parametrize("form", CHAINED)
def test_every_run_of_a_chain_can_be_planned_and_is_exact(form: Form):
    for site in every_run(form):
        model = copy.deepcopy(checkpoint("chain"))
        gate_(model, Plan((site,), start="inherit"), structure=structure_of("chain"))
        close_(model, 1e-9)
        for size in (SIZE, OTHER_SIZE):
            inputs = images("chain", 3, size=size)
            expected, found = (observe(m, inputs, site.slots[-1:]) for m in (checkpoint("chain"), model))
            assert all(distance(expected[place], found[place]) <= 1e-8 for place in expected), site.slots
        randomise_(model, seed=1)
        close_(model)
        merged = merge(model, example_inputs=images("chain", 2))
        for size in (SIZE, OTHER_SIZE):
            inputs = images("chain", 3, size=size)
            expected, found = (observe(m, inputs, site.slots[-1:]) for m in (model, merged))
            assert all(distance(expected[place], found[place]) <= 1e-10 for place in expected), site.slots
        macs = count_macs(checkpoint("chain"), images("chain", 1)) - count_macs(merged, images("chain", 1))
        assert macs == site.saving.macs


# other dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_gates_and_merges(dtype: torch.dtype):
    case = Case("vit", Form.MERGE, end_activation="relu")
    model = copy.deepcopy(checkpoint(case.model)).to(dtype)
    gate_(model, plan_for(case))
    assert {p.dtype for p in model.parameters()} == {dtype}
    close_(model, 0.999)
    assert {float(gate.lam) for _, gate in gates(model)} == {float(torch.tensor(0.999))}
    randomise_(model, seed=1)
    close_(model)
    merged = merge(model)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert_merged_is_closed(merged, model, case, 5e-2)


@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_the_empty_plan_gives_back_the_checkpoint(name: str):
    model = copy.deepcopy(checkpoint(name))
    gate_(model, Plan(()))
    merged = merge(model)
    assert type(merged) is type(checkpoint(name))
    with torch.no_grad():
        assert torch.equal(logits_of(merged, images(name, 3)), logits_of(checkpoint(name), images(name, 3)))


# wrong usage


def test_plan_for_another_checkpoint_is_refused():
    model = copy.deepcopy(checkpoint("timm-vit"))
    with pytest.raises(PlanError, match="made for another checkpoint"):
        gate_(model, plan_for(Case("vit", Form.MERGE)))
    assert not list(gates(model))


def test_second_plan_on_a_gated_model_is_refused():
    model = copy.deepcopy(gated_model(Case("vit", Form.MERGE)))
    with pytest.raises(PlanError, match="another plan"):
        gate_(model, plan_for(Case("vit", Form.ATTENTION_DROP)))


def test_overlapping_sites_are_refused():
    first = [next(s for s in sites_of("vit") if s.form == form) for form in (Form.MERGE, Form.BRANCH_FIT)]
    with pytest.raises(PlanError, match="overlap"):
        Plan(tuple(first))


def test_activation_behind_a_dropped_block_is_refused():
    with pytest.raises(PlanError, match="end_activation"):
        plan_for(Case("vit", Form.BLOCK_DROP, end_activation="relu"))


def test_unknown_end_activation_is_refused():
    with pytest.raises(PlanError, match="'swoosh'"):
        plan_for(Case("vit", Form.MERGE, end_activation="swoosh"))


def test_model_without_sites_says_what_was_looked_for():
    with pytest.raises(PlanError, match=r"blocks\.0: looked for two Linears"):
        require_sites(checkpoint("timm-eva02"), Form.MERGE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_like_a_run_is_refused_with_the_reason(name: str):
    build, reason = REFUSED[name]
    model = build().eval()
    found = find_sites(model, ["merge"], example_inputs=model_inputs(model, torch.randn(1, 3, *SIZE)))
    assert not found.sites
    assert reason in found.unsupported[-1].reason


def test_model_without_blocks_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(PlanError, match="No repeated blocks"):
        require_sites(model, Form.MERGE, {"input": torch.zeros(1, 3, 2, 2)})


def test_model_without_a_known_image_size_is_refused():
    with pytest.raises(ValueError, match="give `example_inputs`"):
        find_sites(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), ["merge"])


def test_half_open_model_is_not_merged():
    model = copy.deepcopy(closed_model(Case("vit", Form.MERGE)))
    next(gate for _, gate in gates(model)).set_lambda_(0.5)
    with pytest.raises(MergeError, match=r"1 gates are not closed .* λ = 0\.5"):
        merge(model)


def test_model_without_gates_is_not_merged():
    with pytest.raises(PlanError, match="call `gate_"):
        merge(checkpoint("vit"))


def test_merge_that_changes_the_logits_is_an_error():
    with pytest.raises(MergeError, match="expected at most"):
        merge(closed_model(Case("vit", Form.MERGE)), tolerance=0.0)


def test_wrapped_model_is_refused():
    model = nn.DataParallel(copy.deepcopy(checkpoint("vit")))
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        gate_(model, plan_for(Case("vit", Form.MERGE)))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_lambda_outside_its_range_is_refused(value: float):
    gate = Blend(nn.ReLU(), nn.Identity())
    with pytest.raises(ValueError, match=r"λ in \[0, 1\]"):
        gate.set_lambda_(value)
