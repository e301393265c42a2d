import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a test never leaves this machine
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too: they share the cores with other tests

from pathlib import Path

import pytest
import torch
import torch.fx

torch.set_num_threads(1)
torch.fx.config.do_not_emit_stack_traces = True  # where each operation of an export stands takes a fifth of its time


def pytest_collection_finish() -> None:
    """Let the collector pass over what was imported: the Trainer asks for full runs, and each looks at everything."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that the interpreter can take everything down


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved merged models in float32, by name."""
    from tiny_models import pruned_once, tiny_model

    found = {}
    for name in ("vit", "timm-wrapper"):
        found[name] = tmp_path_factory.mktemp(name)
        pruned_once(tiny_model(name).float(), end_activation="relu").save_pretrained(found[name])
    return found
