import os
import shutil
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import transformers.dynamic_module_utils
import transformers.utils.hub
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from loopback import LoopbackHub
from tiny_training import trainer, vit
from transformers import ViTImageProcessor

from updp_hf.reporting.card import PICTURES


def pytest_itemcollected(item):
    item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))  # the client's own


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client would have waited between its attempts."""
    seconds = []
    impatient = SimpleNamespace(**{**vars(time), "sleep": seconds.append})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)
    return seconds


@pytest.fixture
def sketches(monkeypatch):
    """Draw no pictures, which takes its time."""
    for name in PICTURES:
        monkeypatch.setitem(PICTURES, name, lambda report, file: file.write_bytes(b"a picture"))


@pytest.fixture
def hub(monkeypatch, tmp_path, waits, sketches):
    """A Hub of this test's own, which this process takes for the only one; alice is logged in."""
    with LoopbackHub() as server:
        home = tmp_path / "huggingface"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "AGENT_HARNESSES_PATH": str(home / "agent_harnesses.json"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        # The package's attribute of this name is a class.
        monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        for module in (transformers.utils.hub, transformers.dynamic_module_utils):
            monkeypatch.setattr(module, "HF_MODULES_CACHE", str(home / "modules"))
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        huggingface_hub.close_session()
        try:
            yield server
        finally:
            huggingface_hub.close_session()


@pytest.fixture
def hub_environment(hub, tmp_path):
    """The environment of a fresh process that knows no other Hub, with an empty cache."""
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HF_MODULES_CACHE")
    inherited = {name: value for name, value in os.environ.items() if name not in offline}
    switches = ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS")
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "fresh"), "HF_TOKEN": "hf_alice"}
    return {**inherited, **place, **{f"HF_HUB_{switch}": "1" for switch in switches}}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A trained run, and the folder that it saved its model in, with a checkpoint beside it; by seed of the weights."""
    runs = {}

    def train(seed=0):
        if seed not in runs:
            folder = tmp_path_factory.mktemp("run")
            processor = ViTImageProcessor(size={"height": 16, "width": 16})
            run = trainer(
                folder,
                vit(seed),
                processing_class=processor,
                save_strategy="steps",
                save_steps=8,
                hub_model_id="alice/pruned",
                hub_token="hf_alice",
            )
            run.train()
            run.save_model()
            runs[seed] = run, folder
        return runs[seed]

    return train


@pytest.fixture
def folder(trained, tmp_path):
    """A saved model, all of which is meant for the Hub."""
    return copy_of_model(trained()[1], tmp_path / "pruned")


@pytest.fixture
def other_folder(trained, tmp_path):
    """A model of the same shape with other weights."""
    return copy_of_model(trained(seed=1)[1], tmp_path / "other")


def copy_of_model(source, target):
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*", "runs", "pareto*"))
