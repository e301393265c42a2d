import copy

import pytest
import torch
from tiny_models import close_, tiny_model
from torch import nn

from updp_hf import Form, Plan, calibrate_, find_sites, gate_
from updp_hf.core.gate import gates
from updp_hf.core.plan import PlanError
from updp_hf.inputs import example_inputs_of, logits_of
from updp_hf.layout_updp import ChannelBatchNorm, EndActivation
from updp_hf.surgery import site_gates


class Halve(nn.Module):
    """An "activation" that is linear, so that the branch around it is truly affine."""

    def forward(self, x):
        return x * 0.5


def gated(name="vit", form=Form.MERGE, **plan):
    model = tiny_model(name)
    gate_(model, Plan(find_sites(model, [form]).sites, **plan))
    return model


def batches_for(model, count=2):
    return [example_inputs_of(model, 16, seed) for seed in range(count)]


@torch.no_grad()
def errors_of_closed_sides(model, kind):
    """Return for each gate with a `kind` on its pruned side the error of that relative to the original's spread."""
    errors = {}

    def compare(path):
        def hook(gate, args, output):
            original, pruned = gate.original(*args), gate.pruned(*args)
            errors[path] = float((original - pruned).norm() / (original - original.mean((0, 1))).norm())

        return hook

    chosen = [(path, gate) for path, gate in gates(model) if isinstance(gate.pruned, kind)]
    handles = [gate.register_forward_hook(compare(path)) for path, gate in chosen]
    logits_of(model, example_inputs_of(model, 16, seed=9))
    for handle in handles:
        handle.remove()
    return errors


@pytest.mark.parametrize("name", ["vit", "swin", "timm-vit-n-is-c", "timm-deit3"])
def test_batch_norm_starts_near_the_norm_that_it_replaces(name):
    model = gated(name)
    before = errors_of_closed_sides(model, ChannelBatchNorm)
    calibrate_(model, batches_for(model))
    after = errors_of_closed_sides(model, ChannelBatchNorm)
    assert len(after) >= 3
    assert all(after[path] < 0.6 * before[path] and after[path] < 0.6 for path in before)


@pytest.mark.parametrize("value", [0.1, 0.5, 1.0])
def test_closing_a_calibrated_norm_does_less_damage(value):
    model = gated("vit")
    norms = [gate for _, gate in gates(model) if isinstance(gate.pruned, ChannelBatchNorm)]
    inputs = example_inputs_of(model, 16, seed=9)

    @torch.no_grad()
    def logits_at(lam):
        for gate in norms:
            gate.set_lambda_(lam)
        return logits_of(model, inputs)

    expected = logits_at(0.0)
    before = float((logits_at(value) - expected).norm())
    close_(model, 0.0)
    calibrate_(model, batches_for(model))
    after = float((logits_at(value) - expected).norm())
    assert after < 0.6 * before


@pytest.mark.parametrize("form", [Form.MERGE_KEEP_NORM, Form.BRANCH_FIT])
def test_fit_of_an_affine_branch_is_exact(form):
    model = tiny_model("vit")
    for layer in model.vit.layers:
        layer.mlp.activation_fn = Halve()
    gate_(model, Plan(find_sites(model, [form]).sites, start="fit"))
    inputs = example_inputs_of(model, 4, seed=9)
    calibrate_(model, batches_for(model, 4))
    with torch.no_grad():
        expected = logits_of(model, inputs)
        close_(model)
        found = logits_of(model, inputs)
    assert float((found - expected).norm() / expected.norm()) < 2e-3  # what the ridge leaves


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("vit", Form.MERGE),
        ("swin", Form.MERGE_KEEP_NORM),
        ("timm-deit3", Form.MERGE),
        ("timm-eva02", Form.BRANCH_FIT),
        ("timm-swinv2", Form.MERGE),
        ("timm-swinv2", Form.BRANCH_FIT),
    ],
)
def test_fit_is_nearer_than_the_mean(name, form):
    model = gated(name, form, start="fit")
    calibrate_(model, batches_for(model))
    errors = errors_of_closed_sides(model, nn.Linear)
    assert len(errors) >= 3
    assert max(errors.values()) < 0.9


@pytest.mark.parametrize("plan", [{}, {"start": "fit", "end_activation": "relu"}])
def test_calibration_changes_the_pruned_sides_and_nothing_else(plan):
    model = gated("vit", **plan).train()
    model.vit.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    draws = torch.get_rng_state()
    calibrate_(model, batches_for(model))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed
    assert all(".pruned." in name for name in changed)
    assert {float(gate.lam) for _, gate in gates(model)} == {0.0}
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(draws, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_end_activation_starts_standardised():
    model = gated("vit", end_activation="relu")
    calibrate_(model, batches_for(model))
    outputs = []
    ends = [module.end for module in model.modules() if isinstance(module, EndActivation)]
    for gate in ends:
        gate.register_forward_hook(lambda gate, args, output: outputs.append((args[0], gate.pruned[0](args[0]))))
    with torch.no_grad():
        logits_of(model, batches_for(model)[0])
    assert len(outputs) == 3
    # In front of its activation, an affine map fitted to the identity is the identity.
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-3) for x, y in outputs)


def test_batches_can_be_split_and_be_bare_tensors():
    whole, split = gated("vit", start="fit"), gated("vit", start="fit")
    images = example_inputs_of(whole, 16, seed=0)["pixel_values"]
    calibrate_(whole, [{"pixel_values": images, "labels": torch.zeros(16)}])
    calibrate_(split, list(images.split(5)))
    for (name, expected), found in zip(whole.state_dict().items(), split.state_dict().values(), strict=True):
        assert torch.allclose(expected, found, rtol=1e-6, atol=1e-8), name


def test_sites_closed_earlier_are_passed_closed():
    together, in_turn = gated("vit", start="fit"), gated("vit", start="fit")
    images = batches_for(together)
    calibrate_(together, images)
    sites = find_sites(in_turn, [Form.MERGE]).sites
    for site in sites:
        calibrate_(in_turn, images, [site])
        for gate in site_gates(in_turn, site):
            gate.set_lambda_(1.0)

    def fitted(model):
        return [gate.pruned.weight for _, gate in gates(model) if isinstance(gate.pruned, nn.Linear)]

    pairs = list(zip(fitted(together), fitted(in_turn), strict=True))
    assert torch.equal(*pairs[0])
    assert not any(torch.allclose(a, b) for a, b in pairs[1:])


def test_calibration_without_images_is_refused():
    with pytest.raises(ValueError, match="no calibration batches"):
        calibrate_(gated("vit"), [])


def test_calibration_of_an_ungated_model_is_refused():
    model = tiny_model("vit")
    with pytest.raises(PlanError, match="has no gates"):
        calibrate_(model, batches_for(model))
