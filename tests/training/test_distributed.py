"""Two processes on the CPU. They are started once; importing the libraries is most of what that costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from project import SCRIPTS
from safetensors.torch import load_model
from tiny_training import RandomImages, assert_equal, logits, vit
from transformers import AutoModelForImageClassification

from updp_hf import Plan, gate_

RUNS = ["batch-norm", "evaluated", "no-batch-norm"]
SELECTORS = ["sensitivity", "greedy", "taylor", "random", "supernet"]


def run(script: str, folder: Path, processes: int, batch_size: int) -> Path:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*launch, str(SCRIPTS / script), str(folder), str(batch_size)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run("train_two_processes.py", tmp_path_factory.mktemp("two"), processes=2, batch_size=2)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run("train_two_processes.py", tmp_path_factory.mktemp("one"), processes=1, batch_size=4)


def ended(folder: Path, name: str, rank: int) -> dict:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_all_processes_end_with_the_same_network(two, name):
    main, other = (ended(two, name, rank) for rank in range(2))
    assert main["blocks"] == other["blocks"]
    assert_equal(other["weights"], main["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_only_the_main_process_writes(two, name):
    names = {path.name for path in (two / f"{name}-0").iterdir() if not path.name.startswith("checkpoint-")}
    assert {"config.json", "model.safetensors", "updp_report.json", "README.md"} <= names
    written = {path.name for path in (two / f"{name}-1").rglob("*") if path.is_file()}
    # The Trainer itself keeps the state of each process's random generators.
    assert written == ({"rng_state_1.pth"} if name == "evaluated" else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_only_the_main_process_pushes(two, name):
    assert [ended(two, name, rank)["pushes"] for rank in range(2)] == [1, 0]


@pytest.mark.slow
def test_what_was_saved_is_what_all_processes_hold(two):
    loaded = AutoModelForImageClassification.from_pretrained(two / "no-batch-norm-0")
    classifier = ended(two, "no-batch-norm", 1)["weights"]["classifier.weight"]
    assert torch.equal(loaded.base.classifier.weight, classifier)
    assert logits(loaded).isfinite().all()


@pytest.mark.slow
def test_all_processes_evaluate_what_is_saved(two):
    logged = {entry["step"]: entry["eval_loss"] for entry in ended(two, "evaluated", 0)["log"] if "eval_loss" in entry}
    folder = two / "evaluated-0" / "checkpoint-4"
    model = vit()
    gate_(model, Plan.from_dict(json.loads((folder / "config.json").read_text())["plan"]))
    load_model(model, folder / "model.safetensors")
    images = RandomImages(count=8, seed=1)
    assert logged[4] == pytest.approx(float(F.cross_entropy(logits(model), images.labels)), abs=1e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_the_same_batches(one, two):
    alone, together = (ended(folder, "no-batch-norm", 0) for folder in (one, two))
    assert together["blocks"] == alone["blocks"]
    assert_equal(together["weights"], alone["weights"], tolerance=1e-6)


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """Select in two processes and in one, and return where each wrote down what it chose."""
    return [
        run("select_in_processes.py", tmp_path_factory.mktemp("selected"), processes=count, batch_size=4 // count)
        for count in (2, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SELECTORS, "speed-up"])
def test_all_processes_select_alike(selected, name):
    two, _ = selected
    main, other = (ended(two, name, rank) for rank in range(2))
    assert main["blocks"] == other["blocks"]
    assert_equal(other["supernet"], main["supernet"])


@pytest.mark.slow
def test_all_processes_say_that_a_budget_is_impossible(selected):
    two, _ = selected
    main, other = ((two / f"impossible-{rank}.txt").read_text() for rank in range(2))
    assert main == other
    assert "The budget is 10% of the MACs" in main


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTORS)
def test_two_processes_select_what_one_selects(selected, name):
    together, alone = (ended(folder, name, 0) for folder in selected)
    assert together["blocks"] == alone["blocks"]
    assert_equal(together["supernet"], alone["supernet"], tolerance=1e-6)


@pytest.mark.slow
def test_the_processes_score_each_choice_once_and_one_writes(selected):
    files = [(folder / "supernet" / "updp_selection" / "scores.jsonl").read_text().splitlines() for folder in selected]
    together, alone = ([json.loads(line) for line in lines[1:]] for lines in files)
    assert [choice for choice, _ in together] == [choice for choice, _ in alone] == [[0, 1], [0, 2], [1, 2]]
    assert [score for _, score in together] == pytest.approx([score for _, score in alone], abs=1e-5)
