"""Whatever an untrusted file holds, loading it gives the equal model or one clear error, and touches nothing else."""

import contextlib
import copy
import dataclasses
import json
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from rings import slow_but, slow_if
from tiny_models import edit_config, logits
from transformers import AutoModelForImageClassification
from transformers.utils import logging

import updp_hf
from updp_hf import Plan, Report, UPDPForImageClassification
from updp_hf.errors import UPDPError
from updp_hf.reporting.report import Cost

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MIB = 2**20
MEMORY = 200 * MIB
SECONDS = 20
PICKLE = b"cposix\nsystem\n(S'true'\ntR."
CODE = (sys.prefix, sys.base_prefix, Path(torch.__file__).parent.parent, Path(updp_hf.__file__).parent)
PYTHON = tuple(str(Path(place).resolve()) for place in CODE)
FORBIDDEN = (
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "os.remove",
    "shutil.",
    "urllib",
)

# the watch


class Watch:
    """What the interpreter does while it is on. An audit hook stays for good, so there is one."""

    def __init__(self):
        self.folder = None
        self.seen = []
        sys.addaudithook(self.note)

    def note(self, event, arguments):
        if self.folder is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            if not place.startswith((self.folder, *PYTHON, "/proc/", "/sys/")):
                self.seen.append(f"open {place}")
        elif event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {arguments}")

    @contextlib.contextmanager
    def on(self, folder):
        """Say no to whatever leaves `folder`, takes much memory, or takes long."""
        unlimited = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        self.folder, self.seen = os.path.realpath(folder), []
        resource.setrlimit(resource.RLIMIT_AS, (taken + 4 * MEMORY, unlimited[1]))
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            self.folder = None
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
        assert self.seen == []
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MEMORY
        assert time.process_time() - start < SECONDS


WATCH = Watch()
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # it keeps tables even without a database


def is_clear(error):
    """Whether an error is one of ours, in one sentence."""
    message = str(error)
    is_ours = isinstance(error, UPDPError) or (type(error) is OSError and "not a valid JSON file" in message)
    exhausted = "MemoryError" in message or "allocate" in message
    return is_ours and "\n" not in message and 30 < len(message) < 1500 and message[-1] in ".?" and not exhausted


def attempt(folder, load):
    """Return what `load` returns, None if it refuses `folder` clearly."""
    with WATCH.on(folder):
        try:
            return load(folder)
        except Exception as error:
            if not is_clear(error):
                raise
            return None


def knows_us(folder):
    """Whether `AutoConfig` of transformers hands the configuration over to us: what it refuses itself is its own."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (RecursionError, ValueError):
        return False
    return (
        isinstance(config, dict)
        and config.get("model_type") == "updp"
        and not {"auto_map", "configuration_files"} & set(config)
    )


def loaded(folder):
    """Load the model in `folder`; if there is one, its weights must be those in the file."""
    library = AutoModelForImageClassification if knows_us(folder) else UPDPForImageClassification
    model = attempt(folder, library.from_pretrained)
    if model is not None:
        assert type(model) is UPDPForImageClassification
        files = sorted(Path(folder).glob("*.safetensors"))
        stored = {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
        state = model.state_dict()
        assert set(state) == set(stored)
        assert all(torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in state.items())
    return model


@pytest.fixture(scope="module")
def originals(folders, tmp_path_factory):
    """Saved models, their logits, and a folder to spoil a copy of each in, where a pickle waits to be loaded."""
    logging.set_verbosity(logging.CRITICAL)
    found = {}
    for name, folder in folders.items():
        model = UPDPForImageClassification.from_pretrained(folder)
        copies = {"": folder, "-sharded": tmp_path_factory.mktemp("sharded")}
        model.save_pretrained(copies["-sharded"], max_shard_size="20KB")
        assert (copies["-sharded"] / INDEX).is_file()
        for suffix, source in copies.items():
            spoilt = shutil.copytree(source, tmp_path_factory.mktemp("spoilt") / "model")
            for bait in ("pytorch_model.bin", "adapter_model.bin"):
                (spoilt / bait).write_bytes(PICKLE)
            found[name + suffix] = (source, spoilt, logits(model))
    yield found
    logging.set_verbosity_warning()


# mutations

NASTY = [
    *(None, True, False, 0, -1, 1, 2, 3, 7, 65536, 65537, 2**31, 10**9, 2**63, 10**400),
    *(0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "a", "0", "relu", "nn", "load", "float16", "int8", "\ud800", "\0", "x" * 10**5, "9" * 400),
    *("../../etc/passwd", "/etc/passwd", "hf-hub:evil/repo", "local-dir:/etc", "evil/repo", "evil/repo--file.Class"),
    *("kernels-community/flash-attn", "flash_attention_2", "pytorch_model.bin", "resnet50", "swin", "__class__"),
    *([], {}, [[]], [1, 2], [0] * 10**5, [1024] * 1024, {"": {}}, {"kind": "zero", "outputs": 2}, {"a": [{"b": None}]}),
    *({"quant_method": "gptq"}, {str(i): "a" for i in range(10**4)}),
]
KEYS = [
    *("quantization_config", "transformers_weights", "auto_map", "fusion_config", "configuration_files", "backbone"),
    *("use_pretrained_backbone", "attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "per_layer_config", "num_labels", "num_classes", "torch_dtype", "dtype", "_class"),
    *("to_dict", "__class__", "__dict__", "attribute_map", "sub_configs_defaults", "name_or_path", "text_config"),
    *("rope_scaling", "gguf_file", "check", "checkpoint_path", "", "a.b", "timm_model.head", "vit.layers.0"),
]


def holders(document):
    """Return the containers in `document` that hold anything, with the keys of what they hold."""
    if not isinstance(document, dict | list) or not document:
        return []
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    return [(document, keys)] + [found for key in keys for found in holders(document[key])]


@st.composite
def spoilt(draw, original):
    """Draw what a document may have become: values exchanged, dropped, doubled, added."""
    document = [copy.deepcopy(original)]  # so that the document as a whole may be exchanged as well
    for _ in range(draw(st.integers(1, 2))):
        places = [(holder, key) for holder, keys in holders(document) for key in keys[:50]]
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        other, where = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "replace", "replace", "delete", "insert", "swap", "double", "deepen"])):
            case "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
            case "delete" if holder is not document:
                del holder[key]
            case "insert" if isinstance(holder, dict):
                holder[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(NASTY)))
            case "swap":
                holder[key], other[where] = copy.deepcopy(other[where]), copy.deepcopy(holder[key])
            case "double" if isinstance(holder, dict):
                holder[str(draw(st.sampled_from(KEYS)))] = copy.deepcopy(holder[key])
            case "deepen":
                for _ in range(draw(st.sampled_from([1, 20, 300]))):
                    holder[key] = [holder[key]]
    return document[0]


@st.composite
def flipped(draw, content):
    """Draw what bytes may have become: some exchanged, cut off, taken out, doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "write", "cut", "drop", "double", "nest"])):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "write" if content:
                content[at] = draw(st.sampled_from(b'0123456789-.eE"{}[],:aNI \xff\x00'))
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + draw(st.integers(1, 9))]
            case "double":
                content[at:at] = content[at : at + 40]
            case "nest":
                content[at:at] = b"[" * 10**5
    return bytes(content)


def header_of(content):
    length = struct.unpack("<Q", content[:8])[0]
    return content[8 : 8 + length], content[8 + length :]


def examples(count):
    """Run the same `count` examples each time; many more where `-m slow` is asked for."""
    return [
        pytest.param(count // 2, id="few"),
        pytest.param(12 * count, marks=pytest.mark.slow, id="many"),
    ]


def explore(count, strategy, test):
    """Run `test` on `count` examples of `strategy`, the same ones each time."""
    quiet = settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    quiet(given(strategy)(test))()


NAMES = ["vit", "timm-wrapper"]
COMPUTES = ("base_config", "layout", "dtype", "torch_dtype")
"""The fields that may say, validly, that something else is to be computed with the same weights."""


@pytest.mark.parametrize("name", slow_but(NAMES, "vit"))
@pytest.mark.parametrize("count", examples(60))
def test_a_spoilt_configuration(originals, name, count):
    source, folder, expected = originals[name]
    original = json.loads((source / CONFIG).read_text())

    def test(document):
        (folder / CONFIG).write_text(json.dumps(document))
        model = loaded(folder)
        if model is not None and all(document.get(field) == original.get(field) for field in COMPUTES):
            assert torch.equal(logits(model), expected)

    explore(count, spoilt(original), test)
    shutil.copy(source / CONFIG, folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", examples(25))
def test_a_configuration_with_spoilt_bytes(originals, name, count):
    source, folder, _ = originals[name]

    def test(content):
        (folder / CONFIG).write_bytes(content)
        loaded(folder)

    explore(count, flipped((source / CONFIG).read_bytes()), test)
    shutil.copy(source / CONFIG, folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", examples(25))
def test_weights_with_a_spoilt_header(originals, name, count):
    source, folder, _ = originals[name]
    header, values = header_of((source / WEIGHTS).read_bytes())

    def test(document):
        text = json.dumps(document).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + values)
        loaded(folder)

    explore(count, spoilt(json.loads(header)), test)
    shutil.copy(source / WEIGHTS, folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", examples(25))
def test_weights_with_spoilt_bytes(originals, name, count):
    source, folder, _ = originals[name]
    content = (source / WEIGHTS).read_bytes()
    header, values = header_of(content)

    def test(start):
        (folder / WEIGHTS).write_bytes(start + values)
        loaded(folder)

    explore(count, flipped(content[:8] + header), test)
    shutil.copy(source / WEIGHTS, folder)


@pytest.mark.parametrize("count", examples(20))
def test_a_spoilt_index(originals, count):
    source, folder, expected = originals["vit-sharded"]
    original = json.loads((source / INDEX).read_text())

    def test(document):
        (folder / INDEX).write_text(json.dumps(document))
        model = loaded(folder)
        if model is not None:
            assert torch.equal(logits(model), expected)

    test(original)
    explore(count, spoilt(original), test)
    shutil.copy(source / INDEX, folder)


DOCUMENTS = {
    "plan": (Plan, lambda folder: json.loads((folder / CONFIG).read_text())["plan"]),
    "report": (Report, lambda folder: json.loads(json.dumps(dataclasses.asdict(REPORT)))),
}
PARTS = ("evaluated_on", "latencies", "latency_conditions", "model", "onnx", "selection", "training")
"""What release 0.1 wrote as an empty object where it was not measured, and is None now."""
REPORT = Report(plan={}, before=Cost(10, 100, {"1": 0.5}), after=Cost(5, 50), metrics_after={"loss": 1.5}, seed=3)


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("count", examples(100))
def test_a_spoilt_document(folders, kind, count):
    cls, original = DOCUMENTS[kind]

    def test(document):
        found = attempt(folders["vit"], lambda _: cls.from_dict(document))
        if found is not None:
            read = json.loads(json.dumps(dataclasses.asdict(found)))
            for key in document.keys() - {"sites", "format_version", "before", "after"}:
                is_of_release_0_1 = cls is Report and key in PARTS and document[key] == {}
                expected = None if is_of_release_0_1 else document[key]
                assert read[key] == expected or repr(read[key]) == repr(expected)  # no NaN equals another

    explore(count, spoilt(original(folders["vit"])), test)


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("count", examples(100))
def test_a_document_with_spoilt_bytes(folders, tmp_path, kind, count):
    cls, original = DOCUMENTS[kind]
    file = tmp_path / "updp_report.json"

    def test(content):
        file.write_bytes(content)
        attempt(tmp_path, lambda folder: cls.load(file if cls is Plan else folder))

    explore(count, flipped(json.dumps(original(folders["vit"])).encode()), test)


# every hole that was found, by name


def base(**fields):
    return lambda config: config["base_config"].update(fields)


def arguments(**fields):
    return lambda config: config["base_config"]["model_args"].update(fields)


def top(**fields):
    return lambda config: config.update(fields)


def layout(path, **spec):
    return lambda config: config["layout"].__setitem__(path, spec)


HUGE = 10**9
SWIN = {"model_type": "swin", "num_heads": [2, 2, 2, 2], "num_attention_heads": [2, 2, 2, 2], "embed_dim": 8}
FOREIGN = {"quant_method": "bitsandbytes", "load_in_4bit": True}
VIT = {
    "weights of another name": (top(transformers_weights="../other.safetensors"), r"\(transformers_weights\)"),
    "weights of another name in the base": (base(transformers_weights="a.safetensors"), r"\(transformers_weights\)"),
    "no name of weights": (top(transformers_weights=0), r"\(transformers_weights\)"),
    "no code in the base": (base(auto_map=0.0), r"\(auto_map\)"),
    "quantization": (top(quantization_config=FOREIGN), r"\(quantization_config\)"),
    "quantization in the base": (base(quantization_config=FOREIGN), r"\(quantization_config\)"),
    "fusion": (top(fusion_config={"patch_embeddings": True}), r"\(fusion_config\)"),
    "code in the base": (base(auto_map={"AutoConfig": "evil/repo--code.Config"}), r"\(auto_map\)"),
    "a pretrained backbone": (base(use_pretrained_backbone=True), r"\(use_pretrained_backbone\)"),
    "a backbone deep inside": (base(a=[{"b": {"backbone": "evil/repo"}}]), r"\(backbone\)"),
    "attention from the Hub": (top(attn_implementation="evil/attention"), "attn_implementation = 'evil/attention'"),
    "attention in an inner field": (top(_attn_implementation="evil/attention"), "'evil/attention'.* expected one of"),
    "attention in the base": (base(_attn_implementation="evil/attention"), "'evil/attention'.* expected one of"),
    "flash attention": (base(attn_implementation="flash_attention_2"), "'flash_attention_2'.* expected one of"),
    "experts from the Hub": (base(experts_implementation="evil/experts"), "'evil/experts'.* expected one of"),
    "a dtype that is a function": (top(dtype="load"), "dtype = 'load', expected one of"),
    "a dtype that is a module": (top(dtype=None, torch_dtype="nn"), "torch_dtype = 'nn', expected one of"),
    "a dtype of the base": (base(dtype="int8"), "dtype = 'int8', expected one of"),
    "a dtype that is a number": (top(dtype=3), "dtype = 3, expected one of"),
    "so many labels": (lambda c: (c.pop("id2label"), c.update(num_labels=HUGE)), "num_labels = 1000000000, expected"),
    "fewer than no labels": (lambda c: (c.pop("id2label"), c.update(num_labels=-3)), "num_labels = -3, expected"),
    "labels as text": (lambda c: (c.pop("id2label"), c.update(num_labels="5")), "num_labels = '5', expected"),
    "a label of no number": (top(id2label={"cat": "cat"}), "configuration cannot be read"),
    "labels in a list": (top(id2label=["a", "b"]), "configuration cannot be read"),
    "another number of labels": (top(id2label={"0": "a", "1": "b"}), "mismatched keys: base.classifier.weight"),
    "a base of no kind": (top(base_config=[1]), "configuration cannot be read"),
    "a layout of no kind": (top(layout="identity"), "configuration cannot be read"),
    "a dtype inside the plan": (lambda c: c["plan"]["versions"].update(dtype=[]), "configuration cannot be read"),
    "a method": (lambda c: (c.update(to_dict=1), c.pop("layout")), "no base_config or no layout"),
    "nested deep": (base(a=[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]), "nested more than"),
    "a type of the base that is a list": (base(model_type=["vit"]), r"type \['vit'\], which"),
    "a base that classifies no images": (base(model_type="bert"), "'bert', which this version"),
    "a base that asks the Hub": (base(model_type="detr", backbone="evil/repo"), "'detr', which this version|backbone"),
    "no patches": (base(patch_size=0), "'vit' cannot be built"),
    "negative width": (base(hidden_size=-16), "'vit' cannot be built"),
    "width as text": (base(hidden_size="16"), "base model cannot be read"),
    "heads that do not divide": (base(num_attention_heads=3), "cannot be|mismatched keys"),
    "an activation of no name": (base(hidden_act="system"), "'vit' cannot be built"),
    "not a number": (base(layer_norm_eps=float("nan")), "layer_norm_eps = nan"),
    "infinite": (base(layer_norm_eps=float("inf")), "layer_norm_eps = inf"),
    "more digits than a float has": (base(layer_norm_eps=10**400), "layer_norm_eps = 1000"),
    "depths that add up": (base(**SWIN, depths=[2**19] * 4), "depths = .*, expected at most"),
    "blocks without end": (base(num_hidden_layers=2**20), "more than 8192 modules"),
    "stages without end": (base(**SWIN, depths=[1000] * 4), "more than 8192 modules|operations"),
    "a number to count up to": (base(num_hidden_layers=HUGE), "num_hidden_layers = 1000000000, expected at most"),
    "wider than any tensor": (base(hidden_size=HUGE), "hidden_size = 1000000000, expected at most"),
    "wider than the weights": (base(hidden_size=2**20), "mismatched keys"),
    "wide enough to fill the memory": (
        base(hidden_size=2**16, intermediate_size=2**16, num_hidden_layers=100),
        "cannot be|mismatched|describes a model",
    ),
    "many more blocks than weights": (base(num_hidden_layers=256, intermediate_size=2**16), "mismatched|describes"),
    "images too large for the weights": (base(image_size=2**15), "mismatched keys"),
    "a slot inside what is no mapping": (
        top(layout={"vit.layers.1.mlp": {"kind": "mark"}, "vit.layers.1": "x"}),
        "puts",
    ),
    "the end on another axis": (
        layout("vit.layers.1", kind="end", channels=16, eps=1e-5, channel_axis=1, activation="relu"),
        "unexpected|missing",
    ),
    "an end of other channels": (
        layout("vit.layers.1", kind="end", channels=8, eps=1e-5, channel_axis=-1, activation="relu"),
        "mismatched keys",
    ),
    "a Linear of other features": (
        layout("vit.layers.1.mlp.fc1", kind="linear", in_features=16, out_features=8, bias=True),
        "mismatched keys",
    ),
    "a huge Linear that has no weights": (
        layout("vit.layers.0.mlp.activation_fn", kind="linear", in_features=2**16, out_features=2**16, bias=True),
        "describes a model of",
    ),
}
TIMM = {
    "an architecture on the Hub": (base(architecture="hf-hub:evil/repo"), "expected the plain name of a timm model"),
    "an architecture in a folder": (base(architecture="local-dir:/etc"), "expected the plain name of a timm model"),
    "an architecture with a path": (base(architecture="../resnet18"), "expected the plain name of a timm model"),
    "an architecture of no kind": (base(architecture=["resnet18"]), "expected the plain name of a timm model"),
    "no architecture": (base(architecture=None), "Field 'architecture' expected str"),
    "an architecture of no name": (base(architecture="vit_of_tomorrow"), "cannot be built .* not supported"),
    "an unknown argument": (arguments(code="import os"), "'timm_wrapper' cannot be built"),
    "no patches": (arguments(patch_size=0), "'timm_wrapper' cannot be built"),
    "blocks without end": (arguments(depth=2**20), "computes a tensor of 1048576 values"),
    "more blocks than weights": (arguments(depth=2**14), "more than 8192 modules|operations"),
    "a number to count up to": (arguments(depth=HUGE), "depth = 1000000000, expected at most"),
    "an image of any size": (arguments(img_size=2**20), "mismatched keys"),
    "modules without end": (
        lambda c: c["base_config"].update(architecture="test_efficientnet", model_args={"se_layer": "x", "blocks": 1}),
        "cannot be built",
    ),
    "a factor out of bounds": (arguments(mlp_ratio=1e300), "mlp_ratio = 1e.300, expected at most"),
    "a factor of much memory": (arguments(mlp_ratio=6e4), "mismatched keys"),
    "arguments of no kind": (base(model_args=[1]), "base model cannot be read"),
}


def refuse(folder, message, load=AutoModelForImageClassification.from_pretrained):
    with WATCH.on(folder), pytest.raises(ValueError, match=message) as raised:
        load(folder)
    assert is_clear(raised.value), raised.value


# Alike to others, and each builds a model or the beginning of a large one.
SLOW_VIT = (
    *("no code in the base", "quantization in the base", "a pretrained backbone", "attention in an inner field"),
    *("attention in the base", "experts from the Hub", "a dtype that is a module", "a dtype that is a number"),
    *("fewer than no labels", "labels as text", "labels in a list", "negative width", "width as text"),
    *("heads that do not divide", "stages without end", "wider than any tensor", "many more blocks than weights"),
    *("images too large for the weights", "infinite", "more digits than a float has"),
)
SLOW_TIMM = (
    *("an architecture in a folder", "an architecture of no kind", "no patches", "more blocks than weights"),
    *("an image of any size", "a factor of much memory"),
)


@pytest.fixture
def copy_of(folders, tmp_path):
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


@pytest.mark.parametrize(("change", "message"), slow_if(VIT, SLOW_VIT))
def test_a_configuration_is_refused(copy_of, change, message):
    folder = copy_of("vit")
    edit_config(folder, change)
    refuse(folder, message)


@pytest.mark.parametrize(("change", "message"), slow_if(TIMM, SLOW_TIMM))
def test_a_configuration_of_a_timm_model_is_refused(copy_of, change, message):
    folder = copy_of("timm-wrapper")
    edit_config(folder, change)
    refuse(folder, message)


LABELS = ["backbone", "dtype", "architecture", "auto_map", "quantization_config"]
HARMLESS = {
    "labels of all names": lambda c: [
        part.update(id2label=dict(enumerate(LABELS)), label2id=dict.fromkeys(LABELS, 10**6))
        for part in (c, c["base_config"])
    ],
    "code in another repository": top(auto_map={"AutoModelForImageClassification": "evil/repo--code.Model"}),
    "a method": top(to_dict=1, from_dict=2, __class__=3, __dict__=4),
    "a method of the base": base(to_dict=1, get_text_config=2, __class__=3, attribute_map=4),
    "an inner field": top(_attn_implementation_internal="evil/attention", _auto_class="x"),
    "an inner field of the base": base(_attn_implementation_internal="evil/attention"),
    "layers of their own": top(per_layer_config={"0": {"hidden_size": 5}}),
    "a field that from_pretrained has": base(device_map="auto", check=1, use_safetensors=False, revision="x"),
    "a future field": top(note={"a": [1]}),
    "numbers of the user's own": top(
        num_train_images=1_300_000, seed=2**62, curve=[1e9, 1e300], note={"a": [{"b": HUGE}]}
    ),
    "numbers of the user's own in the base": base(
        num_train_images=1_300_000,
        total_depth=2**62,
        tokens_seen=10**12,
        curve=[1e9] * 10**4,
        note={"a": [{"b": -HUGE}]},
    ),
    "no numbers of the user's own": base(best_loss=float("nan"), worst_loss=float("inf"), large=10**400),
    "labels of the base": base(num_labels=HUGE, num_classes=HUGE, id2label=["a", "b"], label2id=3),
    "eager attention": top(attn_implementation="eager"),
}


@pytest.mark.parametrize("library", [AutoModelForImageClassification, UPDPForImageClassification])
@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_a_configuration_changes_nothing(copy_of, originals, change, library):
    folder = copy_of("vit")
    edit_config(folder, change)
    with WATCH.on(folder):
        model = library.from_pretrained(folder)
    assert torch.allclose(logits(model), originals["vit"][2], rtol=1e-5, atol=1e-6)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"1", b'"updp"', b"null", b"[" * 10**6, b"9" * 5000, b'{"configuration_files": 3}', b"\xff"]
)
def test_a_file_that_holds_no_configuration_is_refused(copy_of, content):
    folder = copy_of("vit")
    (folder / CONFIG).write_bytes(content)
    assert attempt(folder, UPDPForImageClassification.from_pretrained) is None


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.bin"])
@pytest.mark.parametrize("arguments", [{}, {"use_safetensors": False}, {"use_safetensors": None}])
def test_pickles_are_never_read(copy_of, pickled, arguments):
    folder = copy_of("vit")
    (folder / WEIGHTS).rename(folder / "gone")
    (folder / pickled).write_bytes(PICKLE)
    refuse(
        folder,
        "has no model.safetensors, and other formats may hold code",
        lambda f: AutoModelForImageClassification.from_pretrained(f, **arguments),
    )


@pytest.mark.parametrize("file", ["adapter_config.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_nothing_takes_the_place_of_the_weights(copy_of, file):
    folder = copy_of("vit")
    (folder / file).write_text(json.dumps({"base_model_name_or_path": "evil/repo"}))
    refuse(folder, "adapter or parts of a distributed checkpoint", UPDPForImageClassification.from_pretrained)


def change_header(**fields):
    def change(content):
        header, values = header_of(content)
        text = json.dumps(json.loads(header) | fields).encode()
        return struct.pack("<Q", len(text)) + text + values

    return change


def change_dtypes(content):
    header, values = header_of(content)
    text = header.replace(b'"F32"', b'"I32"')
    return struct.pack("<Q", len(text)) + text + values


HEADERS = {
    "empty": (lambda c: b"", "cannot be read"),
    "cut in the header": (lambda c: c[:50], "cannot be read"),
    "cut in the weights": (lambda c: c[:-1], "cannot be read"),
    "longer than it says": (lambda c: c + b"\0", "cannot be read"),
    "a header without end": (lambda c: b"\xff" * 8 + c[8:], "cannot be read"),
    "a header of a gigabyte": (lambda c: struct.pack("<Q", 2**30) + c[8:], "cannot be read"),
    "a tensor beyond the file": (
        change_header(**{"base.x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "cannot be read",
    ),
    "tensors that overlap": (
        change_header(**{"base.x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        "cannot be read",
    ),
    "numbers of another kind": (change_dtypes, "of dtype I32, expected one like torch.float"),
    "metadata of no kind": (change_header(__metadata__=[1]), "cannot be read"),
    "a page of the web": (lambda c: b"<html>not found</html>", "cannot be read"),
}


@pytest.mark.parametrize(("change", "message"), HEADERS.values(), ids=HEADERS)
def test_weights_are_refused(copy_of, change, message):
    folder = copy_of("vit")
    (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))
    refuse(folder, message)


def test_weights_without_metadata_are_the_same(copy_of, originals):
    folder = copy_of("vit")
    safetensors.torch.save_file(safetensors.torch.load_file(folder / WEIGHTS), folder / WEIGHTS)
    model = attempt(folder, UPDPForImageClassification.from_pretrained)
    assert model is None or torch.equal(logits(model), originals["vit"][2])


INDICES = {
    "outside the folder": {"metadata": {}, "weight_map": {"base.x": "../model.safetensors"}},
    "absolute": {"metadata": {}, "weight_map": {"base.x": "/elsewhere/model.safetensors"}},
    "a pickle": {"metadata": {}, "weight_map": {"base.x": "pytorch_model.bin"}},
    "hidden": {"metadata": {}, "weight_map": {"base.x": "..safetensors"}},
    "no files": {"metadata": {}, "weight_map": {}},
    "no map": {"metadata": {}},
    "no metadata": {"weight_map": {"base.x": "model-00001-of-00002.safetensors"}},
    "a dtype that is a function": {"metadata": {"dtype": "load"}, "weight_map": {"a": "model.safetensors"}},
    "a list": [],
    "numbers": {"metadata": {}, "weight_map": {"base.x": 3}},
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_is_refused(originals, tmp_path, index):
    folder = shutil.copytree(originals["vit-sharded"][0], tmp_path / "model")
    (folder / INDEX).write_text(json.dumps(index))
    refuse(folder, "index .* is not one of safetensors files")


@pytest.mark.slow
def test_a_new_head_of_any_size_is_no_absurd_model(copy_of):
    with WATCH.on(folder := copy_of("vit")):
        model = UPDPForImageClassification.from_pretrained(folder, num_labels=2**17, ignore_mismatched_sizes=True)
    assert logits(model).shape == (3, 2**17)


def test_the_caller_may_choose_what_the_file_may_not(copy_of):
    model = AutoModelForImageClassification.from_pretrained(
        copy_of("vit"), attn_implementation="eager", dtype="float16", output_hidden_states=True
    )
    assert model.base.config._attn_implementation == "eager" or model.config._attn_implementation == "eager"
    assert model.dtype is torch.float16
    assert model.config.output_hidden_states


@pytest.mark.parametrize("value", [None, 1, "x", [], [1], {}, {"plan": {}}, {"plan": 1, "before": [], "after": None}])
def test_what_is_no_report_is_refused(value):
    with pytest.raises(ValueError, match="report cannot be read"):
        Report.from_dict(value)


PLANS = {
    "a truth for a version": {"format_version": True},
    "text for slots": {"slots": "abc"},
    "numbers for slots": {"slots": [1]},
    "text for a number": {"channels": "16"},
    "a truth for a number": {"channel_axis": True},
    "a number for a block": {"block": 3},
    "a list for a block": {"block": ["a"]},
    "an endless path": {"slots": [".".join("a" * 10**6)]},
}


@pytest.mark.parametrize("change", PLANS.values(), ids=PLANS)
def test_what_is_no_plan_is_refused(folders, change):
    plan = json.loads((folders["vit"] / CONFIG).read_text())["plan"]
    (plan if "format_version" in change else plan["sites"][0]).update(change)
    refuse(folders["vit"], "plan", lambda _: Plan.from_dict(plan))


def test_a_plan_of_many_sites_takes_no_time(folders):
    plan = json.loads((folders["vit"] / CONFIG).read_text())["plan"]
    plan["sites"] = [plan["sites"][0] | {"slots": [f"a.{i}"]} for i in range(10**4)]
    start = time.process_time()
    assert len(Plan.from_dict(plan).sites) == 10**4
    assert time.process_time() - start < 5
