"""What a choice is worth, by hand, of one gated network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny_models import CLASSES, randomise_, tiny_model
from tiny_training import RandomImages, gate_, mobilenet, sites_of
from torch import nn

from updp_hf import Plan, calibrate_
from updp_hf.core.gates.gate import gates
from updp_hf.selection.scores import (
    closeness,
    label_fit,
    labels_of,
    log_probabilities,
)
from updp_hf.surgery.gate import close_only_, plan_of, site_gates
from updp_hf.surgery.model_io import logits_of


def batches_for(model, sizes=(6, 3)):
    """Return batches of several sizes with labels."""
    generator = torch.Generator().manual_seed(7)
    like = next(model.parameters())
    return [
        {
            "pixel_values": torch.randn(size, 3, 32, 32, generator=generator).to(like.dtype),
            "labels": torch.randint(CLASSES, (size,), generator=generator),
        }
        for size in sizes
    ]


def images_in(batches):
    return [{"pixel_values": batch["pixel_values"]} for batch in batches]


def gated(name, **plan):
    model = tiny_model(name)
    gate_(model, Plan(tuple(site for site in sites_of(model, "merge") if site.saves_compute), **plan))
    calibrate_(model, images_in(batches_for(model)))
    return model


@pytest.fixture(scope="module")
def models():
    """Gated models of which a test takes a copy: gating exports them."""
    return {"vit": gated("vit"), "vit-fit": gated("vit", start="fit"), "resnet": gated("resnet", end_activation="relu")}


@torch.no_grad()
def probabilities(model, batches):
    return torch.cat([logits_of(model, batch) for batch in images_in(batches)]).softmax(-1).tolist()


# the divergence from the open network


@pytest.mark.parametrize("name", ["vit", "vit-fit", "resnet"])
def test_closeness_is_the_negated_mean_divergence_of_open_and_closed(models, name):
    model = copy.deepcopy(models[name])
    batches = batches_for(model)
    score = closeness(copy.deepcopy(model), batches)
    expected = probabilities(model, batches)
    for choice in [(0,), (0, 2), (1, 2)]:
        close_only_(model, choice)
        found = probabilities(model, batches)
        pairs = [pair for p, q in zip(expected, found, strict=True) for pair in zip(p, q, strict=True)]
        by_hand = sum(p * math.log(p / q) for p, q in pairs) / len(expected)
        assert by_hand > 1e-4
        assert score(choice) == pytest.approx(-by_hand, rel=1e-9)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_nothing_closed_is_as_close_as_can_be(models, name):
    model = copy.deepcopy(models[name])
    close_only_(model, (0,))  # what is closed when scoring begins does not matter
    score = closeness(model, batches_for(model))
    assert score(()) == 0.0
    assert score((0,)) < 0.0
    assert score(()) == 0.0


def test_closeness_does_not_depend_on_how_the_images_are_batched_nor_on_labels(models):
    images = torch.cat([batch["pixel_values"] for batch in batches_for(models["vit"])])
    ways = [[images], images.split(2), [{"pixel_values": images[:1]}, {"pixel_values": images[1:]}], iter([images])]
    scores = [closeness(copy.deepcopy(models["vit"]), batches)((0, 1)) for batches in ways]
    assert scores == pytest.approx([scores[0]] * len(scores), rel=1e-9)


def test_scoring_asks_for_images(models):
    with pytest.raises(ValueError, match="no calibration batches"):
        closeness(models["vit"], [])
    with pytest.raises(ValueError, match="no calibration batches"):
        label_fit(models["vit"], [])


# the labels


def reestimated(model, choice, images):
    """Return a copy of `model` with `choice` closed and the statistics that its BatchNorms see, by hand."""
    model = copy.deepcopy(model)
    close_only_(model, choice)
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.momentum = None
        norm.reset_running_stats()
    model.train()  # nothing in these models but BatchNorms notices
    with torch.no_grad():
        for batch in images:
            logits_of(model, batch)
    return model.eval()


@pytest.mark.parametrize("name", ["vit", "vit-fit", "resnet"])
def test_label_fit_is_the_negated_cross_entropy_with_the_statistics_of_the_choice(models, name):
    model = models[name]
    batches = batches_for(model, (6, 3, 5, 4, 7, 2))
    labels = torch.cat([batch["labels"] for batch in batches]).tolist()
    score = label_fit(copy.deepcopy(model), batches)
    for choice in [(), (0,), (0, 2)]:
        found = probabilities(reestimated(model, choice, images_in(batches)), batches)
        by_hand = -sum(math.log(row[label]) for row, label in zip(found, labels, strict=True)) / len(labels)
        assert score(choice) == pytest.approx(-by_hand, rel=1e-9)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_what_was_scored_before_does_not_matter(models, name):
    for score_by in (closeness, label_fit):
        score = score_by(copy.deepcopy(models[name]), batches_for(models[name]))
        one, other, again, nothing = score((0,)), score((1, 2)), score((0,)), score(())
        assert one == again
        assert len({one, other, nothing}) == 3
        fresh = score_by(copy.deepcopy(models[name]), batches_for(models[name]))
        assert fresh((1, 2)) == other


def test_statistics_of_the_open_network_do_not_help_a_closed_one(models):
    """A BatchNorm behind a closed site sees other inputs; scored with what it was trained with, it is worth less."""
    model = copy.deepcopy(models["resnet"])
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.add_(100.0)
    batches = batches_for(model)
    assert label_fit(copy.deepcopy(model), batches)((0,)) == label_fit(copy.deepcopy(models["resnet"]), batches)((0,))


def test_the_last_batch_may_be_a_single_image():
    """Whose feature map of one pixel, as mobilenet has it here, is one value a channel."""
    model = mobilenet()
    gate_(model, Plan(sites_of(model, "merge")[-1:]))
    images = RandomImages(17)
    parts = zip(images.images.split(16), images.labels.split(16), strict=True)
    score = label_fit(model, [{"pixel_values": pixels, "labels": labels} for pixels, labels in parts])
    assert math.isfinite(score((0,)))


@pytest.mark.parametrize("score_by", [closeness, label_fit])
def test_a_choice_that_overflows_is_worth_less_than_any_other(models, score_by):
    model = copy.deepcopy(models["vit-fit"])
    for gate in site_gates(model, plan_of(model).sites[1]):
        for parameter in getattr(gate, "pruned", nn.Identity()).parameters():
            parameter.data.fill_(1e308)
    score = score_by(model, batches_for(model))
    assert score((1,)) == -math.inf
    assert math.isfinite(score((0, 2)))


@pytest.mark.parametrize("batch", [torch.zeros(2, 3, 32, 32), {"pixel_values": torch.zeros(2, 3, 32, 32)}], ids=type)
def test_images_without_labels_are_refused(models, batch):
    with pytest.raises(ValueError, match=r"^The images have no labels, by which the choices are scored: pass"):
        label_fit(models["vit"], [batch])
    with pytest.raises(ValueError, match="no labels"):
        labels_of(batch)


@pytest.mark.parametrize("score_by", [closeness, label_fit])
def test_scoring_gives_modes_back_and_no_gradients(models, score_by):
    model = copy.deepcopy(models["resnet"]).train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    momenta = [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    score_by(model, batches_for(model))((0, 1))
    assert [module.training for module in model.modules()] == modes
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {float(gate.lam) for _, gate in gates(model)} == {0.0, 1.0}


def test_probabilities_are_those_of_evaluation_in_float64(models):
    model = copy.deepcopy(models["vit"]).float().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    batches = batches_for(model)
    found = log_probabilities(model, batches)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    assert model.training
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(9, dtype=torch.float64))
    with torch.no_grad():
        logits = torch.cat([logits_of(model.eval(), batch) for batch in images_in(batches)])
    torch.testing.assert_close(found, F.log_softmax(logits.double(), -1))


def test_a_gated_model_is_scored_alike_whatever_its_seed(models):
    """Nothing random takes part."""
    model = copy.deepcopy(models["vit"])
    randomise_(model, seed=4)
    score = label_fit(model, batches_for(model))
    torch.manual_seed(1)
    one = score((0,))
    torch.manual_seed(2)
    assert score((0,)) == one
