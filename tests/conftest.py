import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a test never leaves this machine
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
