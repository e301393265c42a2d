"""How merging compares what it made with what it was made of."""

import pytest
import torch
from tiny_training import last_two, resnet

from updp_hf import close_, gate_, merge


def precisions():
    return [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 says it otherwise")
def test_logits_are_compared_in_full_precision_whatever_gpus_compute_in_otherwise():
    model, seen = resnet(), []
    gate_(model, last_two(resnet))
    close_(model)
    before = precisions()
    assert "tf32" in before  # torch's own default for convolutions
    model.register_forward_hook(lambda *_: seen.append(precisions()))
    merge(model)
    assert seen == [["ieee", "ieee"]] * 2
    assert precisions() == before
