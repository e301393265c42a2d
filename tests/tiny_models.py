"""The models that the contract is tested on, one line each, and what `find_sites` must find in them."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from updp_hf import Form
from updp_hf.core.gate import gates

CLASSES = 5
HF: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": CLASSES,
}
HF_FFN = {**HF, "intermediate_size": 32}
HF_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
HF_SWIN |= {"mlp_ratio": 2.0, "num_labels": CLASSES}
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
TIMM_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


class TinyModel(NamedTuple):
    """A constructor, and how many sites of each form the model has that pay."""

    name: str
    build: Callable[[], nn.Module]
    merge: int
    merge_keep_norm: int
    branch_fit: int
    attention_drop: int
    block_drop: int
    merge_whole_kernels: int | None = None  # as many as for `merge`, where there is no kernel to crop

    def sites(self, form: Form) -> int:
        count = getattr(self, form.replace("-", "_"))
        return self.merge if count is None else count

    @property
    def forms(self) -> list[Form]:
        """The forms that the model has sites of, each with its own outcome."""
        crops = self.merge_whole_kernels is not None
        return [form for form in Form if self.sites(form) and (crops or form is not Form.MERGE_WHOLE_KERNELS)]

    def __str__(self) -> str:
        return self.name


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    size = TIMM_SWIN if "swin" in name else TIMM
    return lambda: timm.create_model(name, num_classes=CLASSES, **{**size, **arguments})


def _wrapped(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    config = {"architecture": name, "num_labels": CLASSES, "model_args": {**TIMM, **arguments}}
    return lambda: TimmWrapperForImageClassification(TimmWrapperConfig(**copy.deepcopy(config)))


TINY_MODELS = (
    # name, constructor, merge, merge-keep-norm, branch-fit, attention-drop, block-drop
    TinyModel("vit", lambda: ViTForImageClassification(ViTConfig(**HF_FFN)), 3, 3, 3, 3, 3),
    TinyModel("deit", lambda: DeiTForImageClassification(DeiTConfig(**HF_FFN)), 3, 3, 3, 3, 3),
    TinyModel("deit-teacher", lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**HF_FFN)), 3, 3, 3, 3, 3),
    TinyModel("dinov2", lambda: Dinov2ForImageClassification(Dinov2Config(**HF, mlp_ratio=2)), 3, 3, 3, 3, 3),
    TinyModel(
        "dinov2-swiglu", lambda: Dinov2ForImageClassification(Dinov2Config(**HF, use_swiglu_ffn=True)), 0, 0, 3, 3, 3
    ),
    TinyModel(
        "beit",
        lambda: BeitForImageClassification(
            BeitConfig(**HF_FFN, use_relative_position_bias=True, layer_scale_init_value=0.1)
        ),
        *(3, 3, 3, 3, 3),
    ),
    TinyModel("swin", lambda: SwinForImageClassification(SwinConfig(**HF_SWIN)), 4, 4, 4, 4, 4),
    # The FFN is spread over two modules, so there is no branch to replace as one.
    TinyModel("swinv2", lambda: Swinv2ForImageClassification(Swinv2Config(**HF_SWIN)), 4, 4, 0, 4, 4),
    TinyModel("timm-wrapper", _wrapped("vit_tiny_patch16_224"), 3, 3, 3, 3, 3),
    TinyModel("timm-vit", _timm("vit_tiny_patch16_224"), 3, 3, 3, 3, 3),
    TinyModel(  # 16 tokens of 16 channels
        "timm-vit-n-is-c",
        _timm("vit_tiny_patch16_224", embed_dim=16, class_token=False, global_pool="avg"),
        *(3, 3, 3, 3, 3),
    ),
    TinyModel("timm-vit-avg", _timm("vit_tiny_patch16_224", global_pool="avg"), 3, 3, 3, 3, 3),
    TinyModel("timm-deit", _timm("deit_tiny_patch16_224"), 3, 3, 3, 3, 3),
    TinyModel("timm-deit-distilled", _timm("deit_tiny_distilled_patch16_224"), 3, 3, 3, 3, 3),
    TinyModel("timm-deit3", _timm("deit3_small_patch16_224"), 3, 3, 3, 3, 3),
    TinyModel("timm-vit-reg4-dinov2", _timm("vit_small_patch14_reg4_dinov2"), 3, 3, 3, 3, 3),
    TinyModel("timm-swin", _timm("swin_tiny_patch4_window7_224", mlp_ratio=2.0), 4, 4, 4, 4, 4),
    TinyModel("timm-swinv2", _timm("swinv2_tiny_window8_256", mlp_ratio=2.0), 4, 4, 4, 4, 4),
    TinyModel("timm-eva02", _timm("eva02_tiny_patch14_224"), 0, 0, 3, 3, 3),
)


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter and every BatchNorm statistic such that activations stay O(1).

    Fresh ones hide errors: biases are 0, norms are 1, a layer scale is 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> None:
        tensor.copy_(std * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))

    def uniform(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))

    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            normal(parameter, 1 / math.sqrt(math.prod(parameter.shape[1:])))
        elif "bias" in name.rpartition(".")[2]:
            normal(parameter, 0.3)
        else:
            uniform(parameter, 0.5, 1.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            normal(module.running_mean, 0.3)
            uniform(module.running_var, 0.5, 1.5)


def tiny_model(name: str, seed: int = 0) -> nn.Module:
    """Build a randomised model in float64 and evaluation mode."""
    model = next(row for row in TINY_MODELS if row.name == name).build().double().eval()
    randomise_(model, seed)
    return model


def close_(model: nn.Module, value: float = 1.0) -> None:
    """Set λ of every gate."""
    for _, gate in gates(model):
        gate.set_lambda_(value)
