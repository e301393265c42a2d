"""Pushes and loads that fail: what the user is told, and what is left whole."""

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import safetensors
import torch
from huggingface_hub import constants
from loopback import Fault
from pushing import FOR_EVER, REPO, assert_holds, contents, model_files
from tiny_training import logits

from updp_hf import UPDPForImageClassification
from updp_hf.errors import HubError
from updp_hf.hub.push import push_folder
from updp_hf.reporting.card import CARD_NAME

STEPS = {
    "making the repo": ("POST", "/api/repos/create"),
    "checking the card": ("POST", "/api/validate-yaml"),
    "asking how to upload": ("POST", "/preupload/"),
    "asking where to upload": ("POST", "/lfs/objects/batch"),
    "uploading": ("PUT", "/lfs/"),
    "verifying": ("POST", "^/lfs/"),
    "committing": ("POST", "/commit/"),
}
RETRIED = ("asking how to upload", "asking where to upload", "uploading", "verifying")
"""What the client tries again by itself."""


def mostly_slow(steps, *first):
    """Return the mark that goes through `steps`, all but the `first` of them in the slow ring."""
    return pytest.mark.parametrize(
        "step", [pytest.param(step, marks=[pytest.mark.slow] * (step not in first)) for step in steps]
    )


every_step = mostly_slow(STEPS, "uploading", "committing")
every_retried_step = mostly_slow(RETRIED, "uploading")


def assert_failure(error, folder):
    """Check the sentence that the user reads."""
    text = str(error)
    assert isinstance(error, ValueError)
    assert str(folder) in text
    assert "\n" not in text
    assert "<html>" not in text
    assert "hf_" not in text
    assert len(text) < 400


def pushed_in_vain(hub, folder, repo=REPO, **options):
    """Push, and return the error, having checked that nothing has changed anywhere."""
    local, remote = contents(folder), hub.files(repo) if repo in hub.repos else None
    with pytest.raises(HubError) as caught:
        push_folder(folder, repo, **options)
    assert_failure(caught.value, folder)
    assert contents(folder) == local
    assert (hub.files(repo) if repo in hub.repos else None) in (remote, {})
    return str(caught.value)


# who may not push


@pytest.mark.parametrize(
    ("repo", "token", "told"),
    [
        (REPO, False, r"log in|token"),
        (REPO, "hf_stolen", r"log in|token"),
        (REPO, "hf_reader", r"token|rights|write|allowed"),
        ("bob/pruned", None, r"rights|write|allowed|bob"),
        ("nobody/pruned", None, r"nobody"),
    ],
    ids=["without a token", "with a token that is not one", "with a token to read", "to another", "to nobody"],
)
def test_who_may_not_push_is_told_why(hub, folder, repo, token, told):
    assert re.search(told, pushed_in_vain(hub, folder, repo, token=token))
    assert repo not in hub.repos


@pytest.mark.parametrize("token", [None, True])
def test_who_is_not_logged_in_is_told_so(hub, folder, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN")
    assert re.search(r"log in|token", pushed_in_vain(hub, folder, token=token))


def test_who_is_offline_by_choice_is_told_so(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert re.search(r"(?i)offline", pushed_in_vain(hub, folder))


def test_another_ones_repo_is_left_as_it_is(hub, folder):
    hub.add("bob/pruned", {"config.json": b"{}"})
    pushed_in_vain(hub, folder, "bob/pruned")
    assert hub.files("bob/pruned") == {"config.json": b"{}"}


def test_a_repo_that_cannot_have_this_name_is_refused_before_anything_is_sent(hub, folder):
    with pytest.raises(ValueError, match="alice/pruned/vit"):
        push_folder(folder, "alice/pruned/vit")
    assert hub.requests == []


# what goes wrong on the way


@pytest.mark.parametrize("status", [500, *(pytest.param(status, marks=pytest.mark.slow) for status in (429, 503))])
@every_step
def test_a_hub_that_is_ill_is_told_apart_from_the_model_wherever_it_is(hub, folder, step, status):
    hub.faults.append(Fault(*STEPS[step], status=status, times=FOR_EVER))
    told = pushed_in_vain(hub, folder)
    assert str(status) in told or step == "checking the card"  # there the client looks for JSON, whatever the status


@every_step
def test_a_connection_that_is_lost_leaves_no_half_a_model(hub, folder, step):
    hub.faults.append(Fault(*STEPS[step], drop=True, times=FOR_EVER))
    assert "connect" in pushed_in_vain(hub, folder)


def test_a_hub_that_is_not_there_is_told(hub, folder, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "connect" in pushed_in_vain(hub, folder)


@every_step
def test_a_push_that_failed_is_finished_by_the_next(hub, folder, step):
    hub.faults.append(Fault(*STEPS[step], drop=True, times=FOR_EVER))
    pushed_in_vain(hub, folder)
    hub.faults.clear()
    push_folder(folder, REPO)
    assert_holds(hub, folder)
    assert len(hub.messages(REPO)) == 1


def test_an_update_that_fails_leaves_the_old_model_whole(hub, folder, other_folder):
    push_folder(other_folder, REPO)
    hub.faults.append(Fault(*STEPS["committing"], status=500, times=FOR_EVER))
    pushed_in_vain(hub, folder)
    assert_holds(hub, other_folder)


RATE_LIMIT = pytest.param({"status": 429, "headers": {"Retry-After": "3"}}, marks=pytest.mark.slow)


@every_retried_step
@pytest.mark.parametrize("fault", [{"status": 500}, RATE_LIMIT, {"drop": True}])
def test_a_fault_that_passes_goes_unnoticed(hub, folder, waits, step, fault):
    hub.faults.append(Fault(*STEPS[step], times=2, **fault))
    push_folder(folder, REPO)
    assert_holds(hub, folder)
    assert len(hub.messages(REPO)) == 1
    assert len(waits) == 2


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, folder):
    hub.faults.append(Fault(*STEPS["committing"], cut=True))
    try:
        push_folder(folder, REPO)
    except HubError as error:
        assert_failure(error, folder)
        push_folder(folder, REPO)
    assert_holds(hub, folder)
    assert len(hub.messages(REPO)) == 1


def test_a_model_that_fails_to_push_itself_names_no_folder_that_is_gone(hub, folder):
    model = UPDPForImageClassification.from_pretrained(folder)
    hub.faults.append(Fault(*STEPS["uploading"], status=500, times=FOR_EVER))
    with pytest.raises(HubError) as caught:
        model.push_to_hub(REPO)
    assert all(Path(path).exists() for path in re.findall(r"(?<![\w:/])/[\w./-]+\w", str(caught.value)))


def test_a_trainer_whose_push_fails_has_the_model_where_it_says(hub, trained):
    run, folder = trained()
    hub.faults.append(Fault(*STEPS["committing"], status=500, times=FOR_EVER))
    before = contents(folder)
    with pytest.raises(HubError) as caught:
        run.push_to_hub()
    assert_failure(caught.value, folder)
    assert contents(folder).keys() == before.keys()
    assert UPDPForImageClassification.from_pretrained(folder)
    assert hub.files(REPO) == {}


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}])
def test_a_card_that_could_not_be_looked_at_is_not_written_over(hub, folder, fault):
    hub.add(REPO, {CARD_NAME: b"# Mine"})
    hub.faults.append(Fault("HEAD", CARD_NAME, times=FOR_EVER, **fault))
    hub.faults.append(Fault("GET", CARD_NAME, times=FOR_EVER, **fault))
    attempt(folder)
    assert hub.files(REPO)[CARD_NAME] == b"# Mine"


# two at once


def attempt(folder):
    try:
        return push_folder(folder, REPO)
    except HubError as error:
        return error


def test_two_pushes_at_once_leave_one_of_the_two_models(hub, folder, other_folder):
    together = Barrier(2, timeout=60)
    hub.faults.append(Fault(*STEPS["committing"], times=2, meanwhile=together.wait))
    with ThreadPoolExecutor(2) as threads:
        ends = list(threads.map(attempt, (folder, other_folder)))
    assert model_files(hub.files(REPO)) in (model_files(contents(folder)), model_files(contents(other_folder)))
    for end, source in zip(ends, (folder, other_folder), strict=True):
        if isinstance(end, HubError):
            assert_failure(end, source)
    assert any(isinstance(end, str) for end in ends)


def test_a_push_in_between_does_not_mix_two_models(hub, folder, other_folder):
    """Some files are already there as they are, so the commit leaves them out; the push in between changes them."""
    hub.add(REPO, {**contents(folder), "model.safetensors": b"old"})
    (other_folder / "config.json").write_text((other_folder / "config.json").read_text() + "\n")
    meanwhile = lambda: hub.add(REPO, contents(other_folder))  # noqa: E731
    hub.faults.append(Fault(*STEPS["committing"], meanwhile=meanwhile))
    end = attempt(folder)
    if isinstance(end, HubError):
        assert_failure(end, folder)
        assert_holds(hub, other_folder)
    else:
        assert_holds(hub, folder)


def test_a_card_written_while_we_push_is_left_alone(hub, folder):
    hub.add(REPO, {})
    hub.faults.append(Fault(*STEPS["committing"], meanwhile=lambda: hub.add(REPO, {CARD_NAME: b"# Mine"})))
    attempt(folder)
    assert hub.files(REPO)[CARD_NAME] == b"# Mine"


# what goes wrong on the way back

WEIGHTS = ("GET", r"/resolve/.*/model\.safetensors")
DAMAGE = (OSError, ValueError, safetensors.SafetensorError)


def assert_loads(folder, **options):
    saved = UPDPForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(UPDPForImageClassification.from_pretrained(REPO, **options)), logits(saved))


@pytest.mark.parametrize(
    "fault",
    [
        {"cut": True},
        {"change": lambda content: content[: len(content) // 2]},
        {"change": lambda content: content + b"more"},
        {"change": lambda content: b""},
        {"status": 503},
    ],
    ids=["cut off", "too short", "too long", "empty", "not served"],
)
def test_weights_that_do_not_come_whole_are_not_loaded_and_not_kept(hub, folder, fault):
    hub.add(REPO, contents(folder))
    hub.faults.append(Fault(*WEIGHTS, times=FOR_EVER, **fault))
    for _ in range(2):
        with pytest.raises(DAMAGE):
            UPDPForImageClassification.from_pretrained(REPO)
    hub.faults.clear()
    assert_loads(folder)


def test_a_download_that_is_cut_once_goes_on(hub, folder):
    hub.add(REPO, contents(folder))
    hub.faults.append(Fault(*WEIGHTS, cut=True))
    assert_loads(folder)


def test_damaged_weights_of_the_right_length_are_not_loaded(hub, folder):
    hub.add(REPO, contents(folder))
    hub.faults.append(Fault(*WEIGHTS, change=lambda content: bytes(len(content))))
    with pytest.raises(DAMAGE):
        UPDPForImageClassification.from_pretrained(REPO)
    assert_loads(folder, force_download=True)


def test_a_repo_that_holds_half_the_weights_is_not_loaded_until_it_is_mended(hub, folder):
    whole = contents(folder)
    hub.add(REPO, {**whole, "model.safetensors": whole["model.safetensors"][:-100]})
    with pytest.raises(DAMAGE):
        UPDPForImageClassification.from_pretrained(REPO)
    push_folder(folder, REPO)
    assert_loads(folder)


def test_a_hub_that_falls_ill_after_a_load_leaves_the_model_usable(hub, folder):
    hub.add(REPO, contents(folder))
    assert_loads(folder)
    hub.faults.append(Fault("GET", "/", status=503, times=FOR_EVER))
    hub.faults.append(Fault("HEAD", "/", status=503, times=FOR_EVER))
    assert_loads(folder)
