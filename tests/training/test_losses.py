import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from rings import slow_but
from tiny_training import CLASSES, RandomImages, last_two, logits, losses, trainer, vit

from updp_hf.training.distillation import distillation_losses
from updp_hf.training.losses import label_loss


def outputs(count: int = 6) -> dict[str, torch.Tensor]:
    return {"logits": torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(0))}


def test_the_loss_of_classes_is_the_mean_over_the_images_that_count():
    labels = torch.tensor([0, 1, -100, 3, -100, 2])
    counting = [0, 1, 3, 5]
    expected = -F.log_softmax(outputs()["logits"], -1)[counting, labels[counting]].mean()
    torch.testing.assert_close(label_loss(outputs(), labels), expected)
    torch.testing.assert_close(label_loss(outputs(), labels, 4), expected)
    torch.testing.assert_close(label_loss(outputs(), labels, torch.tensor(8)), expected / 2)


def test_the_loss_of_mixed_labels_is_that_of_their_classes_in_proportion():
    first, second = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 1, 0, 0, 2])
    mixed = 0.25 * F.one_hot(first, CLASSES) + 0.75 * F.one_hot(second, CLASSES)
    expected = 0.25 * label_loss(outputs(), first) + 0.75 * label_loss(outputs(), second)
    torch.testing.assert_close(label_loss(outputs(), mixed), expected)
    torch.testing.assert_close(label_loss(outputs(), mixed, mixed.numel()), expected)


class SoftImages(RandomImages):
    """The same images; their labels are the probabilities of the classes."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "labels": F.one_hot(torch.tensor(item["labels"]), CLASSES).float()}


@pytest.mark.parametrize(
    ("distillation", "accumulation"), slow_but([("none", 1), ("none", 2), ("soft", 1), ("soft", 2)], ("soft", 2))
)
def test_classes_and_their_probabilities_train_alike(distillation, accumulation, tmp_path):
    """Probabilities are counted as many labels by the Trainer."""
    runs = []
    for images in (RandomImages(), SoftImages()):
        run = trainer(
            tmp_path,
            train_dataset=images,
            compute_loss_func=label_loss,
            plan=last_two(vit),
            distillation=distillation,
            teacher=vit(seed=3),
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        runs.append(run)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    torch.testing.assert_close(logits(runs[0].model), logits(runs[1].model), rtol=1e-3, atol=1e-4)


def test_soft_distillation_is_the_scaled_divergence():
    student, teacher = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    temperature = 3.0
    by_hand = [
        temperature**2 * sum(q * (math.log(q) - math.log(p)) for p, q in zip(ps, qs, strict=True))
        for ps, qs in zip(
            (student / temperature).softmax(-1).tolist(), (teacher / temperature).softmax(-1).tolist(), strict=True
        )
    ]
    found = distillation_losses(student, teacher, hard=False, temperature=temperature)
    assert found.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert distillation_losses(student, student, hard=False).abs().max() < 1e-6


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_classes():
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0, 9.0], [-1.0, 0.5]])
    by_hand = [math.log(math.exp(2.0) + 1.0), math.log(1.0 + math.exp(1.0)) - 1.0]
    assert distillation_losses(student, teacher, hard=True).tolist() == pytest.approx(by_hand)
