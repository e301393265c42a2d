import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from updp_hf import Accuracy, TopKAccuracy, compute_accuracy
from updp_hf.training.metrics import top_k_accuracy

LOGITS = np.array(
    [
        [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0],
        [0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
)
LABELS = np.array([0, 2, 5, 6])  # on rank 1, 5, 6, and 7 among equals


def test_accuracies_are_those_counted_by_hand():
    assert top_k_accuracy(LOGITS, LABELS, 1) == 1 / 4
    assert top_k_accuracy(LOGITS, LABELS, 5) == 2 / 4
    assert top_k_accuracy(LOGITS, LABELS, 6) == 3 / 4
    assert top_k_accuracy(LOGITS, LABELS, 99) == 1.0


def test_images_without_a_label_do_not_count():
    logits, labels = np.concatenate([LOGITS, LOGITS]), np.concatenate([LABELS, np.full(4, -100)])
    assert top_k_accuracy(logits, labels, 1) == 1 / 4
    assert top_k_accuracy(logits, labels, 5) == 2 / 4
    with pytest.raises(ValueError, match="with at least one image whose label is not -100"):
        top_k_accuracy(LOGITS, np.full(4, -100))


def test_equal_logits_count_for_the_lower_class():
    assert top_k_accuracy(np.zeros((2, 3)), np.array([0, 2]), 1) == 1 / 2


def test_metrics_compute_in_batches():
    metric = TopKAccuracy()
    metric.add_batch(predictions=LOGITS[:3], references=LABELS[:3])
    metric.add_batch(predictions=LOGITS[3:], references=LABELS[3:])
    assert metric.compute() == {"top5_accuracy": 2 / 4}


def test_metrics_combine():
    both = evaluate.combine([Accuracy(), TopKAccuracy()])
    assert both.compute(predictions=LOGITS, references=LABELS) == {"accuracy": 1 / 4, "top5_accuracy": 2 / 4}


@pytest.mark.parametrize("predictions", [LOGITS, (LOGITS, np.zeros(3))], ids=["array", "tuple"])
def test_trainer_metrics(predictions):
    found = compute_accuracy(EvalPrediction(predictions=predictions, label_ids=LABELS))
    assert found == {"accuracy": 1 / 4, "top5_accuracy": 2 / 4}


@pytest.mark.parametrize(
    ("logits", "labels"), [(LOGITS, LABELS[:2]), (LOGITS[0], LABELS[:1]), (LOGITS[:0], LABELS[:0])]
)
def test_shapes_that_do_not_match_are_refused(logits, labels):
    with pytest.raises(ValueError, match="expected \\(images, classes\\) and \\(images,\\)"):
        top_k_accuracy(logits, labels)
