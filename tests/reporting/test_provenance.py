"""What is said of where a model comes from is what the Hub and the images say, and nothing of this machine."""

import datasets
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from tiny_training import RandomImages

from updp_hf.reporting.provenance import dataset_facts, is_hub_id, metadata_of
from updp_hf.reporting.report import HeldOutSet

IDS = ["google/vit-base-patch16-224", "timm/resnet50.a1_in1k", "gpt2", "a/b"]
FOLDERS = [
    "",
    "/home/somebody/vit",
    "./vit",
    "../vit",
    "~/vit",
    "runs/vit/checkpoint-4",
    "C:\\models\\vit",
    "vit/",
    "a vit",
]


@pytest.mark.parametrize(("name", "expected"), [*((name, True) for name in IDS), *((name, False) for name in FOLDERS)])
def test_the_id_of_a_repository_is_no_folder(name, expected):
    assert is_hub_id(name) is expected


@pytest.fixture
def cards(monkeypatch, tmp_path):
    """Let the Hub have the cards that are put here, by id; return what was asked of it, too."""
    texts, asked = {}, []

    def download(repo_id, filename, *, token=None, **options):
        asked.append((repo_id, token))
        if isinstance(texts.get(repo_id), Exception):
            raise texts[repo_id]
        file = tmp_path / filename
        file.write_bytes(texts[repo_id])
        return str(file)

    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", download)
    return texts, asked


HEAD = """---
license: other
license_name: a-licence
license_link: https://example.org/licence
datasets:
- imagenet-1k
widget:
- src: https://example.org/tiger.jpg
  example_title: Tiger
tags:
- vision
library_name: timm
pipeline_tag: image-classification
metrics:
- accuracy
base_model: somebody/else
model-index:
- name: vit
  results: []
---
# A model, with its λ
"""


def test_what_holds_for_a_pruned_model_too_is_taken_over_and_nothing_else(cards):
    texts, asked = cards
    texts["someone/vit"] = HEAD.encode()
    assert metadata_of("someone/vit", token="a-token") == {
        "base_model": "someone/vit",
        "license": "other",
        "license_name": "a-licence",
        "license_link": "https://example.org/licence",
        "datasets": ["imagenet-1k"],
        "widget": [{"src": "https://example.org/tiger.jpg", "example_title": "Tiger"}],
    }
    assert asked == [("someone/vit", "a-token")]


UNREADABLE = {
    "no head": b"# A model",
    "empty": b"",
    "an empty head": b"---\n---\n# A model",
    "nothing that holds": b"---\ntags: [vision]\n---\n",
    "nothing given": b"---\nlicense:\ndatasets: []\n---\n",
    "broken YAML": b"---\nlicense: [\n---\n",
    "a list": b"---\n- license\n---\n",
    "no text": b"---\nlicense: \xff\xfe\n---\n",
    "not reached": LocalEntryNotFoundError("offline"),
    "no network": ConnectionError("no network"),
    "no such repository": RepositoryNotFoundError.__new__(RepositoryNotFoundError),
    "refused": HfHubHTTPError.__new__(HfHubHTTPError),
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_of_a_card_that_cannot_be_read_only_the_name_is_known(text, cards):
    cards[0]["someone/vit"] = text
    assert metadata_of("someone/vit") == {"base_model": "someone/vit"}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_hub_is_not_asked_for_a_folder(name, cards):
    assert metadata_of(name) == {}
    assert cards[1] == []


def test_without_a_network_only_the_name_is_known():
    assert metadata_of("someone/vit-that-nobody-has") == {"base_model": "someone/vit-that-nobody-has"}


def test_an_index_of_results_that_is_broken_does_not_cost_the_licence(cards):
    cards[0]["someone/vit"] = b"---\nlicense: mit\nmodel-index:\n- name: vit\n  results:\n  - task: 3\n---\n"
    assert metadata_of("someone/vit") == {"base_model": "someone/vit", "license": "mit"}


# images


def images(count=3, **info):
    dataset = datasets.Dataset.from_dict({"label": list(range(count))}, split=info.pop("split", None))
    for name, value in info.items():
        setattr(dataset.info, name, value)
    return dataset


def streamed(**info):
    dataset = images().to_iterable_dataset()
    for name, value in info.items():
        setattr(dataset.info, name, value)
    return dataset


def checksums(*files):
    return {file: {"num_bytes": 1, "checksum": None} for file in files}


FROM_HUB = checksums("hf://datasets/someone/digits@0123456789/data/test.parquet")
FACTS = {
    "from the Hub": (
        images(5, dataset_name="digits", download_checksums=FROM_HUB, split="test"),
        {"id": "someone/digits", "name": "digits", "split": "test", "images": 5},
    ),
    "from the Hub, without a user": (
        images(dataset_name="beans", download_checksums=checksums("hf://datasets/beans@01/a.zip")),
        {"id": "beans", "name": "beans", "images": 3},
    ),
    "from the Hub, without a name": (
        images(download_checksums=FROM_HUB),
        {"id": "someone/digits", "name": "someone/digits", "images": 3},
    ),
    "from a folder": (
        images(dataset_name="imagefolder", download_checksums=checksums("/home/somebody/images/1.png"), split="train"),
        {"name": "imagefolder", "split": "train", "images": 3},
    ),
    "from memory": (images(), {"images": 3}),
    "a part of one": (
        images(5, dataset_name="digits", download_checksums=FROM_HUB, split="test").select(range(2)),
        {"id": "someone/digits", "name": "digits", "split": "test", "images": 2},
    ),
    "read one after another": (
        streamed(dataset_name="digits", download_checksums=FROM_HUB),
        {"id": "someone/digits", "name": "digits"},
    ),
    "of torch": (RandomImages(count=7), {"images": 7}),
    "nothing": (None, {}),
    "without a length": (iter(()), {}),
}


@pytest.mark.parametrize(("dataset", "facts"), FACTS.values(), ids=FACTS)
def test_images_tell_where_they_are_from_as_far_as_they_know(dataset, facts):
    assert dataset_facts(dataset) == (HeldOutSet(**facts) if facts else None)


def test_info_of_another_kind_is_not_taken_for_that_of_a_dataset():
    images = RandomImages(count=2)
    images.info = {"dataset_name": "/home/somebody/images"}
    assert dataset_facts(images) == HeldOutSet(images=2)


def test_several_sets_are_not_counted_as_images():
    assert dataset_facts({"test": RandomImages(count=7), "other": RandomImages(count=8)}) is None


def test_what_was_trained_on_is_named_beside_what_the_checkpoint_was():
    source = "hf://datasets/someone/birds@0123/train.parquet"
    info = datasets.DatasetInfo(download_checksums={source: {}})
    birds = datasets.Dataset.from_dict({"label": [0]}, info=info)
    assert metadata_of("", birds) == {"datasets": ["someone/birds"]}
    assert metadata_of("", datasets.Dataset.from_dict({"label": [0]})) == {}
