"""A run that is killed at random moments and started again ends with the same weights, to the bit."""

import json
import subprocess
import sys

import pytest
from project import SCRIPTS

SCRIPT = SCRIPTS / "survive.py"
KILLS = 8


@pytest.mark.slow
def test_a_recipe_survives_being_killed_at_random_moments(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), "0", str(KILLS)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    found = json.loads(output.splitlines()[-1])
    assert found["differing"] == []
    assert len(found["killed"]) >= KILLS
    assert {phase for phase, _ in found["killed"]} == {"supernet", "search", "ramp", "fine-tuning"}
    assert {name for _, name in found["killed"]} == {"SIGKILL", "SIGTERM"}
    assert found["torn"] > 0  # some checkpoints were half written
