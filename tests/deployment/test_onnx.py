"""A saved model as an ONNX file: it computes what PyTorch computes, or it is not there."""

import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import CLASSES, HF_FFN, SIZE, TIMM_RESNET, distance, pruned_once, randomise_, tiny_model
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from updp_hf import Form, Plan, find_sites, gate_
from updp_hf.deployment import runtimes
from updp_hf.deployment.onnx import OnnxExport, export_onnx
from updp_hf.errors import ExportError, UPDPError
from updp_hf.surgery.model_io import logits_of
from updp_hf.training.checkpoints import save_checkpoint

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def wrapped(architecture, **model_args):
    config = TimmWrapperConfig(architecture=architecture, num_labels=CLASSES, model_args=model_args)
    model = TimmWrapperForImageClassification(config).eval()
    randomise_(model)
    return model


def of(name):
    return lambda: tiny_model(name).float()


def resnet():
    return wrapped("resnet18", **TIMM_RESNET)


MODELS = {
    # what to save, and height and width of the images that the processor beside it makes, None for no processor
    "vit": (lambda: pruned_once(of("vit")(), end_activation="relu"), None),
    "vit without an attention": (lambda: pruned_once(of("vit")(), Form.ATTENTION_DROP), None),
    "convnext": (lambda: pruned_once(of("convnext")(), end_activation="relu"), SIZE),
    "mobilenetv2": (lambda: pruned_once(of("mobilenetv2")(), numbers=(1, 4), end_activation="relu"), SIZE),
    "resnet of timm": (lambda: pruned_once(resnet(), end_activation="relu"), (32, 64)),
    "vit of timm": (lambda: pruned_once(of("timm-wrapper")()), (32, 32)),
    "stock": (of("convnextv2"), (47, 33)),
    "stock of timm": (resnet, SIZE),
}


def save(model, folder, size=None):
    model.save_pretrained(folder)
    if size is not None:
        ViTImageProcessor(size={"height": size[0], "width": size[1]}).save_pretrained(folder)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a model that has been exported, for an export takes seconds."""
    folder = tmp_path_factory.mktemp("exported")
    save(MODELS["vit"][0](), folder)
    export_onnx(folder, batch_sizes=())
    return folder


@pytest.fixture
def vit(exported, tmp_path):
    """A copy of the same model, not exported."""
    return shutil.copytree(exported, tmp_path / "vit", ignore=shutil.ignore_patterns("onnx"))


@pytest.fixture
def copied(exported, monkeypatch):
    """Copies the file of the same model instead of exporting it once more."""
    monkeypatch.setattr(
        torch.onnx, "export", lambda model, args, file, **options: shutil.copy(exported / "onnx" / "model.onnx", file)
    )


def run(file, images):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])


@torch.no_grad()
def expected_of(folder, images):
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    return logits_of(model, {"pixel_values": images})


def files_in(folder):
    return {str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "vit")) for name in MODELS])
def test_file_computes_what_the_saved_model_computes(name, tmp_path):
    build, size = MODELS[name]
    save(build(), tmp_path, size)
    before = files_in(tmp_path)
    found = export_onnx(tmp_path, batch_sizes=())
    assert isinstance(found, OnnxExport)
    assert found.file == tmp_path / "onnx" / "model.onnx"
    assert files_in(tmp_path) - before == {str(Path("onnx") / "model.onnx")}
    assert 0 <= found.difference <= 1e-5
    assert (found.latency, found.conditions, found.columns()) == ({}, None, {})
    for batch_size in (1, 3):
        images = torch.randn(batch_size, 3, *(size or (32, 32)))
        logits = run(found.file, images)
        assert logits.shape == (batch_size, CLASSES)
        assert distance(expected_of(tmp_path, images), logits) <= 1e-4
    graph = onnx.load(found.file)
    assert next(entry.version for entry in graph.opset_import if entry.domain == "") == found.opset >= 18
    (image,), (logits,) = graph.graph.input, graph.graph.output
    assert (image.name, logits.name) == ("pixel_values", "logits")
    dims = [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, *(size or (32, 32))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_exported_in_float32(vit, dtype):
    AutoModelForImageClassification.from_pretrained(vit, dtype=dtype).save_pretrained(vit)
    file = export_onnx(vit, batch_sizes=()).file
    kinds = {tensor.data_type for tensor in onnx.load(file).graph.initializer}
    assert onnx.TensorProto.FLOAT in kinds
    assert not kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    images = torch.randn(3, 3, 32, 32)
    assert distance(expected_of(vit, images), run(file, images)) <= 1e-4


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it(vit, monkeypatch):
    monkeypatch.setattr(runtimes, "LARGEST_FILE", 0)
    file = export_onnx(vit, batch_sizes=()).file
    assert {path.name for path in file.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    images = torch.randn(3, 3, 32, 32)
    assert distance(expected_of(vit, images), run(file, images)) <= 1e-4


@pytest.mark.slow
def test_weights_beside_an_earlier_file_go_with_it(vit, copied):
    (vit / "onnx").mkdir()
    (vit / "onnx" / "model.onnx.data").write_bytes(b"of an earlier export")
    assert {path.name for path in export_onnx(vit, batch_sizes=()).file.parent.iterdir()} == {"model.onnx"}


# latency


def test_latency_is_measured_beside_pytorch(vit, copied, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # which takes its time
    found = export_onnx(vit, batch_sizes=(1, 3), rounds=2)
    assert set(found.latency) == {"PyTorch eager", "PyTorch compiled", "ONNX Runtime"}
    assert all(set(medians) == {"1", "3"} for medians in found.latency.values())
    assert all(0 < seconds < 10 for medians in found.latency.values() for seconds in medians.values())
    assert (found.conditions.threads, found.conditions.rounds) == (torch.get_num_threads(), 2)
    assert found.columns()["ONNX Runtime"]["latency, batch 3"].endswith(" ms")


def test_compiled_model_that_does_not_work_is_not_measured_and_the_log_says_why(vit, copied, monkeypatch, caplog):
    def compile(model, **options):
        def forward(**inputs):
            raise RuntimeError("No C compiler found.\nmore of it")

        return forward

    monkeypatch.setattr(torch, "compile", compile)
    with caplog.at_level(logging.WARNING, "updp_hf.deployment.runtimes"):
        found = export_onnx(vit, batch_sizes=(1,), rounds=1)
    assert set(found.latency) == {"PyTorch eager", "ONNX Runtime"}
    assert "PyTorch compiled: not measured" in caplog.text
    assert "(RuntimeError: No C compiler found)" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no compiler")
def test_compiled_model_is_measured_where_there_is_a_compiler(vit):
    assert "PyTorch compiled" in export_onnx(vit, batch_sizes=(1,), rounds=3).latency


# what cannot be exported


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_library_is_asked_for(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ImportError, match=r"needs onnx, onnxscript and onnxruntime .*: `pip install 'updp-hf\[onnx\]'`"
    ):
        export_onnx(tmp_path)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UPDPError, match=r"nowhere holds no config\.json"):
        export_onnx(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        export_onnx(tmp_path)


def test_training_checkpoint_is_refused(tmp_path):
    model = tiny_model("vit").float()
    gate_(model, Plan(find_sites(model, ["merge"]).sites))
    save_checkpoint(model, tmp_path)
    with pytest.raises(ValueError, match="unfinished pruning run"):
        export_onnx(tmp_path)


def test_model_without_a_head_is_refused(tmp_path):
    ViTModel(ViTConfig(**HF_FFN)).save_pretrained(tmp_path)
    with pytest.raises(UPDPError, match=r"no weights that fit classifier\.bias, .* of ViTForImageClassification"):
        export_onnx(tmp_path)


def test_model_of_another_task_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertConfig"):
        export_onnx(tmp_path)


def test_processor_of_another_model_is_refused(vit):
    ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(vit)
    with pytest.raises(ExportError, match="does not classify images of 3 × 48 × 48"):
        export_onnx(vit)


def fails(*args, **options):
    raise RuntimeError("cannot trace this.\nmore of it") from NotImplementedError("no such operator")


def writes_nonsense(model, args, file, **options):
    Path(file).write_bytes(b"not ONNX at all")


@pytest.mark.parametrize(
    ("export", "message"),
    [(fails, r"cannot export .* \(NotImplementedError: no such operator\)"), (writes_nonsense, "no valid ONNX")],
    ids=["exporter fails", "file is nonsense"],
)
def test_broken_file_never_takes_the_place_of_an_earlier_one(vit, export, message, monkeypatch):
    (vit / "onnx").mkdir()
    (vit / "onnx" / "model.onnx").write_bytes(b"of an earlier export")
    before = files_in(vit)
    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(ExportError, match=message):
        export_onnx(vit, batch_sizes=())
    assert files_in(vit) == before
    assert (vit / "onnx" / "model.onnx").read_bytes() == b"of an earlier export"
    assert not [entry for entry in os.listdir(vit) if entry.startswith(".unfinished")]


def test_file_of_other_weights_is_refused(vit, copied):
    model = AutoModelForImageClassification.from_pretrained(vit)
    randomise_(model, seed=2)
    model.save_pretrained(vit)
    with pytest.raises(ExportError, match="The exported logits differ by"):
        export_onnx(vit, batch_sizes=())
    assert not (vit / "onnx").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits * float("nan"), "differ by nan"),
        (lambda logits: logits[:1], r"are of shape \(1, 5\), PyTorch's of \(2, 5\)"),
    ],
    ids=["not a number", "one image"],
)
def test_logits_that_are_none_are_refused(vit, copied, change, message, monkeypatch):
    original = runtimes.OnnxSession.forward
    monkeypatch.setattr(
        runtimes.OnnxSession, "forward", lambda self, pixel_values: change(original(self, pixel_values))
    )
    with pytest.raises(ExportError, match=message):
        export_onnx(vit, batch_sizes=())
    assert not (vit / "onnx").exists()
