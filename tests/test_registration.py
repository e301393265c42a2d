"""`import updp_hf` costs next to nothing, and pruned models are known to the libraries whatever is imported first."""

import importlib
import json
import subprocess
import sys

import pytest
from project import ROOT, SCRIPTS
from tiny_models import tiny_model

import updp_hf

ORDERS = ("import updp_hf", "import timm; import updp_hf")
MORE_ORDERS = (
    "from transformers import AutoModelForImageClassification; import updp_hf",
    "import updp_hf; from transformers import Trainer",
    "from updp_hf import UPDPConfig",
    "from updp_hf import UPDPForImageClassification",
    "from updp_hf import UPDPTrainer",
    "import updp_hf.hub.timm_models",
    "import updp_hf; import timm",
    "import updp_hf; from transformers import pipeline",
    "import updp_hf; from transformers import PreTrainedModel",
    "import updp_hf; from transformers import ViTForImageClassification, TimmWrapperConfig",
    "import updp_hf; import transformers.models.auto.modeling_auto",
    "from transformers import AutoConfig; import updp_hf",
    "from transformers import Trainer; import updp_hf",
    "from transformers import pipeline; import updp_hf",
    *(f"import updp_hf.model.{file.stem}" for file in sorted((ROOT / "updp_hf" / "model").glob("*_updp.py"))),
)


def in_a_fresh_process(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("orders", [ORDERS, MORE_ORDERS], ids=["few", "more"])
def test_pruned_models_are_known_in_every_order_of_imports(orders, folders):
    code = (SCRIPTS / "import_orders.py").read_text(encoding="utf-8")
    errors = in_a_fresh_process(code, folders["vit"], folders["timm-wrapper"], *orders)
    assert errors == dict.fromkeys(orders, "")


def test_importing_the_package_imports_no_library_that_it_is_for():
    code = """
import json, sys
import updp_hf
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))))
"""
    found = {name for name in in_a_fresh_process(code) if not name.startswith("_")}
    assert found <= {"updp_hf", "lazy_loader", "wrapt", "sitecustomize", "distutils-precedence"}


@pytest.mark.slow
def test_loading_a_pruned_model_imports_what_a_stock_model_does(folders, tmp_path):
    """And besides its own files only what waits for the imports of others."""
    tiny_model("vit").float().save_pretrained(tmp_path)
    code = """
import json, sys
from transformers import AutoModelForImageClassification
AutoModelForImageClassification.from_pretrained(sys.argv[1])
stock = set(sys.modules)
import updp_hf
AutoModelForImageClassification.from_pretrained(sys.argv[2])
print(json.dumps(sorted(set(sys.modules) - stock)))
"""
    found = in_a_fresh_process(code, tmp_path, folders["vit"])
    ours = {name for name in found if name.startswith("updp_hf")}
    assert {name.split(".")[0] for name in found} <= {"updp_hf", "lazy_loader", "wrapt"}
    assert all(name in ("updp_hf", "updp_hf.registration") or name.startswith("updp_hf.model") for name in ours)


def test_every_public_name_is_there():
    assert {"UPDPError", "UPDPTrainer", "find_sites", "prune"} <= set(updp_hf.__all__)
    assert all(getattr(updp_hf, name) is not None for name in updp_hf.__all__)
    assert set(updp_hf.__all__) <= set(dir(updp_hf))
    assert updp_hf.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = updp_hf.no_such_name


def test_prune_is_the_function_even_after_its_module_was_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "updp_hf.prune", raising=False)
    module = importlib.import_module("updp_hf.prune")
    assert callable(updp_hf.prune)
    assert updp_hf.prune is not module


def test_model_files_of_the_first_release_find_what_pushes_them():
    from updp_hf.hub import HubError, push_folder, push_model

    assert (push_folder, HubError) == (updp_hf.push_folder, updp_hf.HubError)
    assert callable(push_model)
