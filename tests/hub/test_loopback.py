"""The server that the other tests push to, seen through the Hub's own client."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    create_branch,
    create_commit,
    create_repo,
    hf_hub_download,
    list_repo_files,
    model_info,
    snapshot_download,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from loopback import Fault

REPO = "alice/model"
FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "onnx/model.onnx": b"graph"}
FOR_EVER = float("inf")


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        file = tmp_path / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "folder"


def upload(folder, repo=REPO, **options):
    create_repo(repo, exist_ok=True, token=options.get("token"))
    return upload_folder(repo_id=repo, folder_path=folder, commit_message="files", **options)


def test_what_is_uploaded_comes_back(hub, folder):
    commit = upload(folder)
    assert hub.files(REPO) == FILES
    info = model_info(REPO)
    assert (info.id, info.sha, info.private) == (REPO, commit.oid, False)
    assert set(list_repo_files(REPO)) == {*FILES, ".gitattributes"}
    snapshot = Path(snapshot_download(REPO))
    assert snapshot.name == commit.oid
    assert {name: (snapshot / name).read_bytes() for name in FILES} == FILES


def test_second_upload_without_changes_makes_no_commit(hub, folder):
    first, second = upload(folder), upload(folder)
    assert hub.messages(REPO) == ["files"]
    assert first.oid == second.oid


def test_branch_leaves_main_alone(hub, folder):
    create_repo(REPO)
    create_branch(REPO, branch="small/1")
    create_branch(REPO, branch="small/1", exist_ok=True)
    upload(folder, revision="small/1")
    assert hub.files(REPO) == {}
    assert hub.files(REPO, "small/1") == FILES
    assert hf_hub_download(REPO, "config.json", revision="small/1")


def test_pull_request_leaves_main_alone(hub, folder):
    assert upload(folder, create_pr=True).pr_url.startswith(f"{hub.url}/{REPO}/discussions/")
    assert hub.files(REPO) == {}
    assert hub.files(REPO, "refs/pr/1") == FILES


def test_private_repo_is_there_for_its_owner_only(hub):
    create_repo(REPO, private=True)
    assert model_info(REPO).private
    assert model_info(REPO, token="hf_reader").private
    for token in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            model_info(REPO, token=token)


@pytest.mark.parametrize(
    ("repo", "token", "status"),
    [
        (REPO, False, 401),
        (REPO, "hf_stolen", 401),
        (REPO, "hf_reader", 403),
        (REPO, "hf_bob", 403),
        ("atelier/model", "hf_bob", 403),
        ("nobody/model", None, 404),
    ],
)
def test_who_may_not_write_is_told_why(hub, repo, token, status):
    with pytest.raises(HfHubHTTPError) as caught:
        create_repo(repo, token=token)
    assert caught.value.response.status_code == status
    assert repo not in hub.repos


def test_member_writes_to_the_organisation(hub, folder):
    upload(folder, repo="atelier/model")
    assert hub.files("atelier/model") == FILES
    assert [org["name"] for org in whoami()["orgs"]] == ["atelier"]


def test_what_is_not_there_is_told_apart(hub):
    hub.add(REPO, FILES)
    with pytest.raises(RepositoryNotFoundError):
        model_info("alice/other")
    with pytest.raises(RevisionNotFoundError):
        model_info(REPO, revision="other")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "other.json")
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo(REPO)


def test_stale_parent_is_refused(hub):
    hub.add(REPO, FILES)
    parent = model_info(REPO).sha
    hub.add(REPO, {"config.json": b"[]"})
    operation = CommitOperationAdd("config.json", b"{ }")
    with pytest.raises(HfHubHTTPError, match="412"):
        create_commit(REPO, [operation], commit_message="late", parent_commit=parent)
    assert hub.files(REPO)["config.json"] == b"[]"


def test_commits_at_once_all_count(hub):
    create_repo(REPO)
    together = Barrier(4, timeout=30)
    hub.faults.append(Fault("POST", "/commit/", times=4, meanwhile=together.wait))
    with ThreadPoolExecutor(4) as threads:
        additions = [[CommitOperationAdd(f"{i}.json", b"{}")] for i in range(4)]
        list(threads.map(lambda addition: create_commit(REPO, addition, commit_message="one"), additions))
    assert set(hub.files(REPO)) == {f"{i}.json" for i in range(4)}
    assert hub.messages(REPO) == ["one"] * 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_client_gets_over_a_fault_that_passes(hub, folder, waits, status):
    hub.faults.append(Fault("PUT", "/lfs/", status=status, times=2, headers={"Retry-After": "7"}))
    upload(folder)
    assert hub.files(REPO) == FILES
    assert waits == [8.0, 8.0]


def test_dropped_upload_is_sent_again(hub, folder, waits):
    hub.faults.append(Fault("PUT", "/lfs/", drop=True))
    upload(folder)
    assert hub.files(REPO) == FILES
    assert waits == [1]


def test_fault_that_lasts_reaches_the_caller(hub, folder):
    create_repo(REPO)
    hub.faults.append(Fault("PUT", "/lfs/", status=503, times=FOR_EVER))
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        upload(folder)
    assert caught.value.__cause__.response.status_code == 503
    hub.faults[:] = [Fault("POST", "/commit/", drop=True, times=FOR_EVER)]
    with pytest.raises(httpx.TransportError):
        upload(folder)
    assert hub.files(REPO) == {}


def test_cut_download_is_resumed(hub):
    hub.add(REPO, FILES)
    hub.faults.append(Fault("GET", "/resolve/", cut=True))
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == FILES["model.safetensors"]


def test_download_that_stays_cut_is_an_error_and_leaves_nothing(hub):
    hub.add(REPO, FILES)
    for fault, error in (
        (Fault("GET", "/resolve/", cut=True, times=FOR_EVER), httpx.RemoteProtocolError),
        (Fault("GET", "/resolve/", change=lambda content: content[:-1]), OSError),
    ):
        hub.faults[:] = [fault]
        with pytest.raises(error):
            hf_hub_download(REPO, "model.safetensors")
    hub.faults.clear()
    assert Path(hf_hub_download(REPO, "model.safetensors")).read_bytes() == FILES["model.safetensors"]


FRESH_PROCESS = f"""
from huggingface_hub import hf_hub_download, upload_file
content = open(hf_hub_download({REPO!r}, "model.safetensors"), "rb").read()
upload_file(repo_id={REPO!r}, path_or_fileobj=content + b"!", path_in_repo="model.safetensors", commit_message="fresh")
"""


def test_fresh_process_finds_the_same_hub(hub, hub_environment):
    hub.add(REPO, FILES)
    run = subprocess.run([sys.executable, "-c", FRESH_PROCESS], env=hub_environment, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert hub.files(REPO)["model.safetensors"] == FILES["model.safetensors"] + b"!"
