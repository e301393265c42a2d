"""Tiny models, images and trainers for the tests of training."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

import updp_hf
from updp_hf import Plan, UPDPTrainer, UPDPTrainingArguments, find_sites
from updp_hf.core.gates.gate import gates
from updp_hf.core.graph.structure import Structure
from updp_hf.core.plan.site import Site
from updp_hf.surgery.find import read

CLASSES = 4
STEPS = 8


class RandomImages(Dataset):
    """Images of noise, with random labels."""

    def __init__(self, count: int = 32, size: int = 16, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, size, size, generator=generator)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


def _config(dropout: float) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
        "num_labels": CLASSES,
        "hidden_dropout_prob": dropout,
    }


def vit(seed: int = 0, dropout: float = 0.0, **changes: Any) -> ViTForImageClassification:
    return _drawn(lambda: ViTForImageClassification(ViTConfig(**{**_config(dropout), **changes})), seed)


def deit(seed: int = 0) -> DeiTForImageClassification:
    return _drawn(lambda: DeiTForImageClassification(DeiTConfig(**_config(dropout=0.2))), seed)


def timm_vit(seed: int = 0) -> TimmWrapperForImageClassification:
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=CLASSES, model_args=shape)
    return _drawn(lambda: TimmWrapperForImageClassification(config), seed)


def resnet(seed: int = 0) -> ResNetForImageClassification:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic", "image_size": 16}
    return _drawn(lambda: ResNetForImageClassification(ResNetConfig(**shape, num_labels=CLASSES)), seed)


def mobilenet(seed: int = 0) -> TimmWrapperForImageClassification:
    config = TimmWrapperConfig(architecture="mobilenetv2_035", num_labels=CLASSES, image_size=16)
    return _drawn(lambda: TimmWrapperForImageClassification(config), seed)


def _drawn(build: Any, seed: int) -> Any:
    """Build a model whose weights, all of them, are random and make logits that differ from image to image."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def last_two(build: Callable[[], nn.Module], form: str = "merge") -> Plan:
    return Plan(sites_of(build(), form)[-2:], start="inherit")


def sites_of(model: nn.Module, form: str = "merge") -> tuple[Site, ...]:
    return find_sites(model, [form], structure=structure_of(model)).sites


def gate_(model: nn.Module, plan: Plan) -> None:
    updp_hf.gate_(model, plan, structure=structure_of(model))


def structure_of(model: nn.Module) -> Structure:
    """Export each architecture once: what is tested here is not that."""
    if not isinstance(model, PreTrainedModel):
        return read(model)
    key = type(model), model.config.to_json_string(), model.dtype
    if key not in _STRUCTURES:
        _STRUCTURES[key] = read(copy.deepcopy(model))
    return _STRUCTURES[key]


_STRUCTURES: dict[tuple[Any, ...], Structure] = {}


def arguments(folder: Path, **changes: Any) -> UPDPTrainingArguments:
    given = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "selector": "last",
        "form": "merge",  # with BatchNorms, which have more states that can go wrong than the default
        "start": "inherit",
        "ramp_end": 0.5,  # several of the few steps
        "calibration_size": 16,
        "use_cpu": True,
        "disable_tqdm": True,
        "num_pruned_blocks": None if "plan" in changes else 2,
        **changes,
    }
    return UPDPTrainingArguments(**given)


def trainer(folder: Path, model: nn.Module | None = None, **changes: Any) -> UPDPTrainer:
    """Build a trainer; what the arguments do not know goes to the trainer."""
    names = ("args", "callbacks", "compute_metrics", "eval_dataset", "processing_class", "teacher", "train_dataset")
    given = {name: changes.pop(name) for name in (*names, "optimizers", "compute_loss_func") if name in changes}
    defaults = {"args": None, "train_dataset": RandomImages(), "eval_dataset": RandomImages(count=8, seed=1)}
    options = {**defaults, **given}
    options["args"] = options["args"] or arguments(folder, **changes)
    run = UPDPTrainer(model=vit() if model is None else model, **options)
    run.structure = structure_of(run.base)
    return run


class Lambdas(TrainerCallback):
    """Write down λ of every gate whenever anything happens."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, float]] = []

    def _record(self, event: str, state: Any, model: nn.Module) -> None:
        values = {float(gate.lam) for _, gate in gates(model)}
        assert len(values) == 1
        self.seen.append((event, state.global_step, values.pop()))

    def on_substep_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._record("substep", state, model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._record("step", state, model)

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._record("prediction", state, model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Compare state dicts; without a tolerance, bit by bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0.0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def logits(model: nn.Module, dataset: RandomImages | None = None) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=(dataset or RandomImages(count=8, seed=1)).images).logits


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
