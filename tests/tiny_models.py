"""The models that the contract is tested on, one line each, and what `find_sites` must find in them."""

import copy
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileViTConfig,
    MobileViTForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from updp_hf import Form, Plan, UPDPForImageClassification, find_sites, gate_, merge
from updp_hf.core.gates.gate import gates
from updp_hf.model.layout_updp import get_slot
from updp_hf.surgery.model_io import example_inputs_of, logits_of

CLASSES = 5
SIZE = (33, 47)
"""Height and width of the images of nets that do not fix them: neither square nor even, so that borders show."""

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
HF_CONV: dict[str, Any] = {"num_labels": CLASSES, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
HF_CONVNEXT: dict[str, Any] = {"num_labels": CLASSES, "num_stages": 3, "hidden_sizes": [8, 12, 16], "depths": [2, 1, 2]}
HF_MOBILENET: dict[str, Any] = {"num_labels": CLASSES, "depth_multiplier": 0.25}
TIMM_RESNET: dict[str, Any] = {"layers": (2, 1, 1, 2), "channels": (8, 8, 12, 16)}
TIMM_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 8, 12, 16)}
TIMM_SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


class TinyModel(NamedTuple):
    """A constructor, and how many sites of each form the model has that pay.

    None says that the form has the same sites as `merge`: no norm stands in front of them, or no kernel is cropped.
    """

    name: str
    build: Callable[[], nn.Module]
    merge: int
    merge_keep_norm: int | None = None
    branch_fit: int = 0
    attention_drop: int = 0
    block_drop: int = 0
    merge_whole_kernels: int | None = None
    dearer: tuple[Form, ...] = ()
    """Forms of which no site pays, but which are exact all the same."""
    size: tuple[int, int] | None = None
    """Height and width of the images; None for a net that fixes them. A net that does not takes others too."""

    @property
    def is_pretrained(self) -> bool:
        """Whether it is a `PreTrainedModel`. The name says so: building every model would take seconds."""
        return not self.name.startswith(("timm-", "chain")) or self.name.startswith("timm-wrapper")

    def sites(self, form: Form) -> int:
        count = getattr(self, form.replace("-", "_"))
        return self.merge if count is None else count

    @property
    def forms(self) -> list[Form]:
        """The forms that the model has sites of, each with its own outcome."""
        return [form for form in Form if getattr(self, form.replace("-", "_")) or form in self.dearer]

    def __str__(self) -> str:
        return self.name


class Chain(nn.Module):
    """A plain net: no block is repeated, and nothing is added to what has gone by."""

    def __init__(self, *features: nn.Module, channels: int):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Residual(nn.Module):
    """A net of residual blocks that are `inner`s."""

    def __init__(self, *inners: nn.Module, channels: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2)
        self.blocks = nn.ModuleList(inners)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def _conv(
    channels: int, out: int, size: int = 3, act: type[nn.Module] = nn.ReLU, **arguments: Any
) -> tuple[nn.Module, nn.Module, nn.Module]:
    arguments = {"padding": size // 2 * arguments.get("dilation", 1), "bias": False} | arguments
    return nn.Conv2d(channels, out, size, **arguments), nn.BatchNorm2d(out), act()


def _chain() -> Chain:
    """Strides, dilation, groups, a bias, kernels that are not square, and a pool that ends a run."""
    stem = (*_conv(3, 16, stride=2), *_conv(16, 4))
    plain = (*_conv(4, 16), *_conv(16, 4, act=nn.SiLU), nn.MaxPool2d(2, padding=1))
    strided = (*_conv(4, 8, stride=2), *_conv(8, 8, dilation=2, act=nn.Hardswish), *_conv(8, 8, groups=4, bias=True))
    oblong = (nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.GELU(), nn.Conv2d(8, 8, (3, 1)))
    return Chain(*stem, *plain, *strided, *oblong, channels=8)


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    size = TIMM_SWIN if "swin" in name else TIMM
    return _timm_conv(name, **{**size, **arguments})


def _timm_conv(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASSES, **arguments)


def _wrapped(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    config = {"architecture": name, "num_labels": CLASSES, "model_args": arguments}
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
    TinyModel("timm-wrapper", _wrapped("vit_tiny_patch16_224", **TIMM), 3, 3, 3, 3, 3),
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
    # Convolutional nets, on images that are neither square nor even.
    TinyModel("chain", _chain, 2, merge_whole_kernels=1, size=SIZE),
    TinyModel(
        "resnet",
        lambda: ResNetForImageClassification(ResNetConfig(**HF_CONV, layer_type="basic")),
        4,
        merge_whole_kernels=0,
        block_drop=3,
        dearer=(Form.MERGE_WHOLE_KERNELS,),
        size=SIZE,
    ),
    TinyModel(
        "timm-resnet",
        _timm_conv("resnet18", **TIMM_RESNET),
        6,
        merge_whole_kernels=0,
        block_drop=2,
        dearer=(Form.MERGE_WHOLE_KERNELS,),
        size=SIZE,
    ),
    TinyModel(
        "timm-resnet-dilated",
        _timm_conv("resnet18", **TIMM_RESNET, output_stride=8),
        6,
        merge_whole_kernels=0,
        block_drop=2,
        dearer=(Form.MERGE_WHOLE_KERNELS,),
        size=SIZE,
    ),
    TinyModel(
        "timm-resnet-bottleneck",
        _timm_conv("resnet26", **TIMM_RESNET),
        0,
        block_drop=2,
        dearer=(Form.MERGE,),
        size=SIZE,
    ),
    TinyModel(
        "timm-seresnet",
        _timm_conv("resnet18", **TIMM_RESNET, block_args={"attn_layer": "se"}),
        6,
        merge_whole_kernels=0,
        block_drop=2,
        dearer=(Form.MERGE_WHOLE_KERNELS,),
        size=SIZE,
    ),
    TinyModel("timm-test-resnet", _timm_conv("test_resnet"), 4, merge_whole_kernels=1, block_drop=1, size=SIZE),
    TinyModel("timm-test-byobnet", _timm_conv("test_byobnet"), 1, merge_whole_kernels=1, size=SIZE),
    TinyModel(
        "regnety",
        lambda: RegNetForImageClassification(RegNetConfig(**HF_CONV, groups_width=4)),
        2,
        block_drop=2,
        size=SIZE,
    ),
    TinyModel("timm-densenet", _timm_conv("densenet121", block_config=(2, 2), growth_rate=4), 4, size=SIZE),
    TinyModel(
        "mobilenetv2",
        lambda: MobileNetV2ForImageClassification(MobileNetV2Config(**HF_MOBILENET, tf_padding=False)),
        16,
        block_drop=10,
        size=SIZE,
    ),
    TinyModel("timm-wrapper-mobilenetv2", _wrapped("mobilenetv2_050"), 16, block_drop=10, size=SIZE),
    TinyModel("timm-mobilenetv3", _timm_conv("mobilenetv3_small_050"), 1, block_drop=7, size=SIZE),
    TinyModel("timm-test-efficientnet", _timm_conv("test_efficientnet"), 4, size=SIZE),
    TinyModel(
        "convnext",
        lambda: ConvNextForImageClassification(ConvNextConfig(**HF_CONVNEXT)),
        5,
        merge_keep_norm=5,
        block_drop=4,
        size=SIZE,
    ),
    TinyModel(
        "convnextv2",
        lambda: ConvNextV2ForImageClassification(ConvNextV2Config(**HF_CONVNEXT)),
        5,
        merge_keep_norm=5,
        block_drop=4,
        size=SIZE,
    ),
    TinyModel(
        "timm-convnext",
        _timm_conv("convnext_tiny", **TIMM_CONVNEXT),
        5,
        merge_keep_norm=5,
        branch_fit=5,
        block_drop=5,
        size=SIZE,
    ),
    TinyModel(
        "timm-convnext-conv",
        _timm_conv("convnext_tiny", **TIMM_CONVNEXT, conv_mlp=True),
        5,
        merge_keep_norm=5,
        block_drop=5,
        size=SIZE,
    ),
    TinyModel(
        "timm-convnextv2", _timm_conv("convnextv2_tiny", **TIMM_CONVNEXT), 5, merge_keep_norm=5, block_drop=5, size=SIZE
    ),
    TinyModel(
        "poolformer",
        lambda: PoolFormerForImageClassification(
            PoolFormerConfig(hidden_sizes=[8, 8, 16, 16], depths=[2, 1, 1, 2], num_labels=CLASSES)
        ),
        6,
        merge_keep_norm=6,
        block_drop=6,
        size=SIZE,
    ),
    TinyModel(
        "mobilevit",
        lambda: MobileViTForImageClassification(
            MobileViTConfig(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32], num_labels=CLASSES)
        ),
        17,
        merge_keep_norm=17,
        attention_drop=9,
        block_drop=12,
        size=SIZE,
    ),
)


def _tied() -> nn.Module:
    first, second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


class CalledTwice(nn.Module):
    """Two activations that are one module, as in torchvision's residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))


def _before(conv: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))


def _padded_by_tensorflow() -> nn.Module:
    return MobileNetV2ForImageClassification(MobileNetV2Config(**HF_MOBILENET, tf_padding=True))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # What looks like a run of two convolutions, and the reason why it is none.
    "called-twice": (lambda: Residual(CalledTwice(), CalledTwice()), "'blocks.1.act' is called 2 times"),
    "tied": (lambda: Residual(_tied(), _tied()), "has its parameters read by"),
    "standardised": (lambda: Residual(_before(StdConv2d(8, 8, 1)), _before(StdConv2d(8, 8, 1))), "(StdConv2d)"),
    "same": (lambda: Residual(_before(Conv2dSame(8, 8, 3)), _before(Conv2dSame(8, 8, 3))), "(Conv2dSame)"),
    "tensorflow": (_padded_by_tensorflow, "pads in its forward"),
}


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


@torch.no_grad()
def observe(model: nn.Module, inputs: dict[str, Tensor], paths: Iterable[str]) -> dict[str, Tensor]:
    """Return the logits and the outputs of the slots `paths`."""
    seen: dict[str, Tensor] = {}
    root = model.base if isinstance(model, UPDPForImageClassification) else model

    def keep(path: str, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[path] = (output if isinstance(output, Tensor) else output[0]).clone()  # of what may be added to in place

    handles = [
        get_slot(root, path).register_forward_hook(lambda module, args, output, path=path: keep(path, output))
        for path in paths
    ]
    try:
        seen["logits"] = logits_of(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def distance(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference relative to the largest value, which may be 0."""
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((expected.double() - found.double()).abs().max() / scale)


def pruned_once(model: nn.Module, form: Form = Form.MERGE, numbers: Iterable[int] = (1,), **plan: Any) -> nn.Module:
    """Return `model` merged with the sites `numbers` of `form` closed, its weights drawn anew."""
    sites = find_sites(model, [form]).sites
    gate_(model, Plan(tuple(sites[i] for i in numbers), **{"start": "inherit", **plan}))
    randomise_(model, seed=1)
    close_(model)
    return merge(model)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """Return the logits of `model`, of images drawn with a fixed seed if `inputs` are not given."""
    return logits_of(model, example_inputs_of(model, 3) if inputs is None else inputs)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration in a saved model's folder in place."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the weights in a saved model's folder in place."""
    file = folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    change(state)
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
