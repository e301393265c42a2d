"""The card states the facts of its report, all of them and nothing else."""

import copy
import json
import random
import re
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from project import ROOT
from reports import OPTIONAL, empty_report, full_report, site, stock_report, timm_report, without

from updp_hf import Form, Plan, Report
from updp_hf.core.depth.runs import Run
from updp_hf.core.kinds import kind_of_form
from updp_hf.core.plan.site import Saving
from updp_hf.reporting import card
from updp_hf.reporting.card import PICTURES, add_card, draw_pictures, is_generated, render_card
from updp_hf.reporting.report import Cost, HeldOutSet, ModelFacts, OnnxFacts, SelectionFacts

ID = "someone/deit-p2"


@pytest.fixture(autouse=True)
def sketches(monkeypatch):
    """Draw no pictures here, which takes its time; what is in them is tested elsewhere."""
    for name in PICTURES:
        monkeypatch.setitem(PICTURES, name, lambda report, file: file.write_bytes(b"a picture"))


REPORTS = {"full": full_report, "empty": empty_report, "stock": stock_report, "timm": timm_report}
every_report = pytest.mark.parametrize("report", [build() for build in REPORTS.values()], ids=REPORTS)


def head_of(text):
    return yaml.safe_load(text.split("---\n")[1])


def python_of(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def squeezed(text):
    return " ".join(text.split())


# the head


@every_report
def test_the_head_is_one_that_the_hub_reads(report):
    text = render_card(report, ID)
    parsed = ModelCard(text)
    assert parsed.data.to_dict() == head_of(text)
    assert parsed.data.library_name == "transformers"
    assert parsed.data.pipeline_tag == "image-classification"
    assert set(parsed.data.tags) >= {"pruned", "depth-pruning", "updp"}
    assert len(parsed.data.tags) == len(set(parsed.data.tags))
    assert None not in head_of(text).values()
    assert parsed.text.strip().startswith("<!--")


@pytest.mark.parametrize(("base_model", "is_named"), [("facebook/deit-tiny", True), ("gpt2", True), ("", False)])
@pytest.mark.parametrize("source", ["plan", "metadata"])
def test_the_checkpoint_is_named_with_its_relation_if_it_is_on_the_hub(base_model, is_named, source):
    plan = {"sites": [], "base_model": base_model if source == "plan" else "somebody/else"}
    metadata = {"base_model": base_model} if source == "metadata" else {}
    if source == "metadata" and not base_model:
        plan["base_model"] = ""
    text = render_card(empty_report() if not is_named else replace(empty_report(), plan=plan, metadata=metadata), ID)
    head = head_of(text)
    assert head.get("base_model") == (base_model if is_named else None)
    assert head.get("base_model_relation") == ("finetune" if is_named else None)
    assert (f"[{base_model}](https://huggingface.co/{base_model})" in text) == is_named
    assert ("whose checkpoint is not on the Hub" in text) != is_named


@pytest.mark.parametrize("path", ["/home/somebody/vit", "./vit", "../vit", "runs/vit/checkpoint-4", "~/vit"])
def test_a_folder_is_never_named_as_the_checkpoint(path):
    text = render_card(replace(full_report(), plan={"sites": [], "base_model": path}), ID)
    assert "base_model" not in head_of(text)
    assert "base_model_relation" not in head_of(text)
    assert path not in text
    assert "whose checkpoint is not on the Hub" in text


def test_what_the_checkpoint_is_licensed_and_shown_with_is_inherited():
    metadata = {
        "license": "other",
        "license_name": "a-licence",
        "license_link": "https://example.org/licence",
        "datasets": ["imagenet-1k", "someone/digits"],
        "widget": [{"src": "https://example.org/tiger.jpg", "example_title": "Tiger"}],
    }
    head = head_of(render_card(full_report(metadata=metadata), ID))
    assert {name: head[name] for name in metadata} == metadata
    assert not set(metadata) & set(head_of(render_card(empty_report(), ID)))


def test_the_index_of_results_holds_the_numbers_of_the_report():
    report = full_report()
    (entry,) = head_of(render_card(report, ID))["model-index"]
    (result,) = entry["results"]
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found == {name: value for name, value in report.metrics_after.items() if name != "loss"}
    assert result["dataset"] == {"type": "someone/digits", "name": "digits", "split": "test"}
    assert entry["name"] == "deit-p2"
    assert result["task"]["type"] == "image-classification"


def test_without_results_there_is_no_index_of_them():
    head = head_of(render_card(full_report(metrics_after={"loss": 0.5}), ID))
    assert not {"model-index", "metrics", "model_name"} & set(head)


@pytest.mark.parametrize(
    ("metadata", "repo_id", "name"),
    [
        ({}, "someone/a", "a"),
        ({}, "a", "a"),
        ({}, "runs/a/", "a"),
        ({"model_name": "My model"}, "someone/a", "My model"),
    ],
)
def test_the_title_is_the_name_that_was_given_or_that_of_the_repository(metadata, repo_id, name):
    text = render_card(full_report(metadata=metadata), repo_id)
    assert f"\n# {name}\n" in text
    assert head_of(text)["model-index"][0]["name"] == name


# the numbers

SHOWN = (
    "before",
    "after",
    "merge_error",
    "seed",
    "training",
    "onnx",
    "evaluated_on",
    "latency_conditions",
    "arguments",
)
SHOWN += ("metrics_before", "metrics_after", "metrics_without_training", "selection")


def numbers_of(document, path=()):
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from numbers_of(value, (*path, key))
    elif isinstance(document, int | float):
        yield path


NUMBERS = [path for path in numbers_of(asdict(full_report())) if path[0] in SHOWN]
SITE_NUMBERS = [("plan", "sites", index, "saving", saved) for index in (0, 1) for saved in ("macs", "parameters")]


@pytest.mark.parametrize("path", [*NUMBERS, *SITE_NUMBERS], ids=lambda path: ".".join(map(str, path)))
def test_another_number_in_the_report_makes_another_card(path):
    report = (
        full_report(before=Cost(9_000, 70_000, {"1": 0.02513, "8": 0.18764})) if path[0] == "plan" else full_report()
    )
    document = copy.deepcopy(asdict(report))
    *parents, last = path
    inner = document
    for key in parents:
        inner = inner[key]
    inner[last] = 2 * inner[last]
    assert render_card(Report.from_dict(document), ID) != render_card(report, ID)


def test_the_numbers_are_counted():
    assert len(NUMBERS) == 36  # else the test above would not be asked about some


EXPECTED = {
    "accuracies": ["- accuracy 83.12 % before, 81.45 % after;", "-1.67 points", "accuracy 22.84 %"],
    "metrics": ["| 0.7719 ", "| 0.7566 ", "| -0.0153 ", "| 0.6437 ", "| 0.6921 ", "| +0.0484 "],
    "costs": ["| 61.07 M ", "| 47.39 M ", "| 1234.5 M ", "| 901.7 M ", "to 78%", "to 73%"],
    "shares": ["0.73 of the multiply-accumulates, 0.78 of the parameters;"],
    "latencies": ["| 25.13 ms ", "| 14.27 ms ", "| 187.64 ms ", "| 93.58 ms "],
    "speed-ups": [
        "1.76× as fast at batch size 1, 2.01× as fast at batch size 8 (cpu (a kind, 4 cores)).",
        "| 2.01× as",
    ],
    "conditions": ["median, the models in turn, 17 rounds; cpu (a kind, 4 cores), float32, eager, 3 threads."],
    "merging": ["no logit of two random images by more than 3e-07 of the largest one"],
    "choice": ["selector `greedy` for the budget of 2 sites, among 3 candidates, in 41 s."],
    "schedule": ["between 7 % and 59 % of 120 steps, cosine;", "(2.5 epochs). 2 processes on a GPU, 93 s."],
    "held-out set": ["on 360 held-out images of digits, split `test`."],
    "runtimes": ["opset 18", "within 4e-07", "| 15.36 ms ", "| 102.47 ms ", "| 9.72 ms ", "| 76.31 ms ", "5 threads"],
    "arguments": ["| `learning_rate` | `0.01` |", "| `num_pruned_blocks` | `2` |"],
    "versions": ["timm 1.0.20, torch 2.8.0; seed 11."],
    "checkpoint": ["[facebook/deit-tiny](https://huggingface.co/facebook/deit-tiny) at `0123456789ab`"],
}


@pytest.mark.parametrize("texts", EXPECTED.values(), ids=EXPECTED)
def test_numbers_read_as_people_write_them(texts):
    card = squeezed(render_card(full_report(), ID))
    assert [text for text in texts if text not in card + " "] == []


def test_metrics_without_training_read_like_all_others():
    text = render_card(full_report(metrics_without_training={"accuracy": 0.25, "loss": 1.5}), ID)
    assert "accuracy 25.00 %" in text
    assert "loss 1.5000" in text
    assert "150.00 %" not in text


@pytest.mark.parametrize(
    ("sites", "sentence"),
    [
        ([("merge", 1)], "with **1 of 4 blocks pruned** (1 merged):"),
        ([("merge", 1), ("attention-drop", 2)], "with **2 of 4 blocks pruned** (1 merged, 1 without attention):"),
        (
            [("merge", 1), ("attention-drop", 1)],
            "with **1 of 4 blocks pruned** (1 merged and without attention; 2 sites",
        ),
        ([("merge", 1), ("merge-keep-norm", 1)], "with **1 of 4 blocks pruned** (1 merged; 2 sites in all):"),
        ([("block-drop", 1), ("block-drop", 3)], "with **2 of 4 blocks pruned** (2 dropped):"),
        ([("merge-keep-norm", 0), ("block-drop", 3)], "with **2 of 4 blocks pruned** (1 merged, 1 dropped):"),
        ([], "with **0 of 4 blocks pruned**"),
    ],
)
def test_the_first_sentence_counts_the_blocks(sites, sentence):
    plan = Plan(tuple(site(form, f"blocks.{index}", f"blocks.{index}.{form}") for form, index in sites))
    report = full_report(plan=plan.to_dict(), blocks=[f"blocks.{index}" for index in range(4)])
    assert sentence in squeezed(render_card(report, ID))


def test_how_many_blocks_there_are_is_left_out_if_it_was_not_recorded():
    text = squeezed(render_card(full_report(blocks=[]), ID))
    assert "**2 blocks pruned**" in text


@pytest.mark.parametrize(("is_trained", "words"), [(True, "annealed away while fine-tuning"), (False, "taken away")])
def test_only_what_was_trained_is_said_to_be_annealed(is_trained, words):
    report = full_report() if is_trained else full_report(training=None)
    assert f"non-linearities were {words}" in squeezed(render_card(report, ID))


@pytest.mark.parametrize(("seconds", "text"), [(93.4, "a GPU, 93 s."), (7_200, "a GPU, 2.0 h."), (None, "a GPU.")])
def test_training_took_seconds_or_hours(seconds, text):
    training = replace(full_report().training, seconds=seconds)
    assert text in squeezed(render_card(full_report(training=training), ID))


@pytest.mark.parametrize("form", list(map(str, Form)))
def test_each_form_of_site_has_a_row_that_tells_what_is_left(form):
    kind = kind_of_form(form)
    closes = {"activations": ("net.b.act",), "norms": ("net.b.norm",), "norm_channels": (2,)}
    changes = closes if kind is Run else {}
    pruned = kind(form, "net.b", ("net.b.norm", "net.b.act"), saving=Saving(3, 1), **changes)
    plan = Plan((pruned,)).to_dict()
    lines = render_card(full_report(plan=plan, before=Cost(8, 10)), ID).splitlines()
    (row,) = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| 1 "))
    closed = "`norm`, `act`" if changes else "all of it"
    assert row == ["1", "`net.b`", closed, pruned.left, "30.0%", "12.5%"]


# what is missing


def assert_whole(text):
    """Assert that nothing of a template or of Python shows in the text, and that the head and the code are valid."""
    assert not re.search(r"\{\{|\{%|%\}|\bNone\b|\bnan\b|Undefined|\bKeyError\b|updp_hf\.\w+ object", text)
    assert "  - null" not in text
    ModelCard(text)
    for source in python_of(text):
        compile(source, "card", "exec")
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert not re.search(r"\n{4}| ,|,,|;;|: ;|: \n\n-| \.\n", text)


FACTS = {*OPTIONAL, "latency", "sites"}


def combinations_of_missing_facts():
    yield from ({name} for name in sorted(FACTS))
    yield from (FACTS - {name} for name in sorted(FACTS))
    draw = random.Random(0)
    yield from (set(draw.sample(sorted(FACTS), draw.randint(2, len(FACTS) - 2))) for _ in range(4))
    yield FACTS


@pytest.mark.parametrize("names", list(combinations_of_missing_facts()), ids=lambda names: f"{len(names)}")
def test_whatever_is_missing_the_card_is_whole(names):
    assert_whole(render_card(without(full_report(), names), ID))


MISSING = {
    "metrics_before": ["accuracy before: not measured, 81.45 % after;", "| held-out accuracy | not measured | 81.45 %"],
    "metrics_after": ["accuracy 83.12 % before, after: not measured;", "| held-out accuracy | 83.12 % | not measured"],
    "latency": ["speed: not measured", "| latency | not measured | not measured | not measured |"],
    "latency_conditions": ["(device not recorded)", "- Latency: not measured."],
    "merge_error": ["logits of trained and merged network: not measured"],
    "selection": ["a plan was given, or it was not recorded"],
    "training": ["Schedule of λ: not recorded"],
    "arguments": ["Training arguments: not recorded"],
    "evaluated_on": ["the images it was measured on were not recorded"],
    "seed": ["seed not recorded"],
}


@pytest.mark.parametrize(("name", "texts"), MISSING.items(), ids=MISSING)
def test_what_is_missing_is_said_to_be(name, texts):
    card = squeezed(render_card(without(full_report(), {name}), ID))
    assert [text for text in texts if text not in card] == []
    full = squeezed(render_card(full_report(), ID))
    assert [text for text in texts if text in full] == []


def test_versions_that_are_missing_are_said_to_be():
    assert "Versions: not recorded; seed 11." in render_card(full_report(versions={}), ID)


def test_a_class_that_is_missing_is_not_taken_for_a_stock_one():
    text = render_card(full_report(model=None), ID)
    assert "It is an ordinary transformers model" not in text
    assert "import updp_hf" in text


def test_a_plan_that_is_missing_is_no_error():
    report = replace(full_report(), plan={})
    assert "blocks pruned**" in render_card(report, ID)


PARTIAL = {
    "speed-up of a resumed run": {"selection": SelectionFacts(speed_up=1.5)},
    "latency of one batch size": {"after": Cost(5, 5, {"8": 0.01})},
    "no latency after": {"after": Cost(5, 5)},
    "time of training": {"training": replace(full_report().training, seconds=None)},
    "no runtime was measured": {"onnx": OnnxFacts(18, 1e-7)},
    "no base model": {"plan": {"sites": [], "base_model": "", "revision": None}},
    "no metric but the loss": {"metrics_before": {"loss": 1.0}, "metrics_after": {"loss": 1.5}},
    "one metric after": {"metrics_before": {}, "metrics_after": {"f1": 0.5}},
    "numbers of a list": {"metrics_after": {"accuracy": 1.0, "accuracy_top_5": 1.0}},
    **{
        f"held-out set: {', '.join(names) or 'nothing'}": {
            "evaluated_on": HeldOutSet(**{n: getattr(full_report().evaluated_on, n) for n in names})
        }
        for count in range(4)
        for names in combinations(("name", "id", "split", "images"), count)
    },
}


@pytest.mark.parametrize("changes", PARTIAL.values(), ids=PARTIAL)
def test_facts_may_be_known_in_part(changes):
    assert_whole(render_card(full_report(**changes), ID))


# the same for the same facts


def test_the_same_arguments_give_the_same_bytes():
    assert render_card(full_report(), ID) == render_card(full_report(), ID)


def test_the_card_of_a_report_that_was_read_is_that_of_the_one_written(tmp_path):
    latency = {"1": 0.02, "8": 0.1, "16": 0.2}
    report = full_report(
        arguments={"num_pruned_blocks": 2, "learning_rate": 0.01}, before=Cost(9, 9, latency), after=Cost(7, 7, latency)
    )
    report.save(tmp_path)
    text = render_card(Report.load(tmp_path), ID)
    assert text == render_card(report, ID)
    assert re.findall(r"^\| latency, batch (\d+)", text, flags=re.MULTILINE)[:3] == ["1", "8", "16"]


# how it is used


@every_report
@pytest.mark.parametrize("repo_id", [ID, "deit-p2", "runs/deit-p2"])
def test_the_examples_are_python_and_load_this_model(report, repo_id):
    text = render_card(report, repo_id)
    examples = python_of(text)
    assert examples
    for source in examples:
        compile(source, "card", "exec")
        assert re.search(rf'"(hf-hub:)?{re.escape(repo_id)}"', source)
    assert_whole(text)


def test_a_stock_result_needs_nothing_of_ours():
    text = render_card(stock_report(), ID)
    assert "It is an ordinary transformers model" in text
    assert "import updp_hf" not in text
    assert "trust_remote_code" not in text
    assert "pip install updp-hf" not in text


def test_what_was_pruned_twice_is_no_stock_result():
    names = ModelFacts("UPDPForImageClassification", "UPDPForImageClassification")
    assert "import updp_hf" in render_card(full_report(model=names), ID)


def test_any_other_result_is_loaded_with_our_import_or_its_own_code():
    ours, theirs, *_ = python_of(render_card(full_report(), ID))
    assert "import updp_hf" in ours
    assert "trust_remote_code" not in ours
    assert "import updp_hf" not in theirs
    assert "trust_remote_code=True" in theirs


@pytest.mark.parametrize(("build", "count"), [(timm_report, 1), (full_report, 0), (stock_report, 0)])
def test_what_timm_knows_is_made_by_timm_too(build, count):
    examples = [source for source in python_of(render_card(build(), ID)) if "timm.create_model" in source]
    assert len(examples) == count
    assert all(f'"hf-hub:{ID}"' in source for source in examples)
    assert ("vit_tiny_patch16_224" in render_card(replace(build(), plan={"sites": []}), ID)) == bool(count)


@pytest.mark.parametrize("is_exported", [True, False])
def test_onnx_runtime_is_shown_if_the_model_was_exported(is_exported):
    text = render_card(full_report() if is_exported else full_report(onnx=None), ID)
    assert ("import onnxruntime" in text) == is_exported
    assert ("Exported to ONNX" in text) == is_exported


@pytest.mark.parametrize("pictures", [(), ("blocks.png",), tuple(PICTURES)])
def test_pictures_that_do_not_lie_beside_the_card_are_not_shown(pictures):
    shown = re.findall(r"!\[[^\]]+\]\((.*?)\)", render_card(full_report(), ID, pictures))
    assert sorted(shown) == sorted(pictures)


# on disk


@pytest.fixture
def warnings_of_card(monkeypatch):
    found = []
    monkeypatch.setattr(card.logger, "warning", found.append)
    return found


def test_the_card_and_its_pictures_are_written(tmp_path, warnings_of_card):
    report = full_report()
    add_card(report, tmp_path, ID)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", *PICTURES}
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == render_card(report, ID)
    assert is_generated(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"
    assert warnings_of_card == []


@pytest.mark.parametrize("build", REPORTS.values(), ids=REPORTS)
def test_only_pictures_that_there_are_facts_for_are_drawn_and_shown(build, tmp_path):
    report = build()
    add_card(report, tmp_path, ID)
    expected = {"before_after.png"} if report == empty_report() else set(PICTURES)
    assert {path.name for path in tmp_path.glob("*.png")} == expected
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\((\w+\.png)\)", text)) == expected


def test_pictures_of_earlier_facts_do_not_stay(tmp_path):
    draw_pictures(full_report(), tmp_path)
    assert draw_pictures(empty_report(), tmp_path) == ["before_after.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["before_after.png"]


def test_a_generated_card_is_written_over(tmp_path):
    for report in (full_report(), full_report(seed=12)):
        add_card(report, tmp_path, ID)
    assert "seed 12" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["# My own card\n", ""])
def test_a_card_that_was_edited_by_hand_stays(text, tmp_path, warnings_of_card):
    file = tmp_path / "README.md"
    file.write_text(text, encoding="utf-8")
    assert not is_generated(file)
    add_card(full_report(), tmp_path, ID)
    assert file.read_text(encoding="utf-8") == text
    (warning,) = warnings_of_card
    assert "was edited by hand" in warning
    assert "--force" in warning


def test_a_draft_of_the_trainer_is_written_over(tmp_path, warnings_of_card):
    file = tmp_path / "README.md"
    comment = "This model card has been generated automatically according to the information the Trainer had access to."
    file.write_text(f"<!-- {comment} -->\n", encoding="utf-8")
    add_card(full_report(), tmp_path, ID)
    assert file.read_text(encoding="utf-8") == render_card(full_report(), ID)
    assert warnings_of_card == []


@pytest.mark.parametrize("edit", [lambda text: f"{text}More.\n", lambda text: text.replace("Limits", "What to know")])
def test_an_edited_card_is_known_by_its_digest(edit, tmp_path):
    file = tmp_path / "README.md"
    add_card(full_report(), tmp_path, ID)
    assert is_generated(file)
    file.write_text(edit(file.read_text(encoding="utf-8")), encoding="utf-8")
    assert not is_generated(file)


def test_without_its_comment_a_card_counts_as_edited_by_hand(tmp_path):
    file = tmp_path / "README.md"
    add_card(full_report(), tmp_path, ID)
    file.write_text(re.sub(r"<!--.*?-->", "", file.read_text(encoding="utf-8"), flags=re.DOTALL), encoding="utf-8")
    assert not is_generated(file)


def fails(*args, **kwargs):
    raise RuntimeError("it failed")


@pytest.mark.parametrize("broken", ["render_card", "draw_pictures"])
def test_a_failure_is_one_warning_and_no_error(broken, tmp_path, monkeypatch, warnings_of_card):
    monkeypatch.setattr(card, broken, fails)
    add_card(full_report(), tmp_path, ID)
    (warning,) = warnings_of_card
    assert "RuntimeError: it failed" in warning
    assert "updp-hf card" in warning
    assert not (tmp_path / "README.md").exists()


def test_a_picture_that_cannot_be_drawn_is_one_warning_and_no_error(tmp_path, monkeypatch, warnings_of_card):
    monkeypatch.setitem(PICTURES, "blocks.png", fails)
    add_card(full_report(), tmp_path, ID)
    assert len(warnings_of_card) == 1


@every_report
@pytest.mark.parametrize("repo_id", [ID, "folder"])
def test_no_path_of_a_machine_stands_in_a_card(report, repo_id, tmp_path):
    add_card(report, tmp_path, repo_id)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for path in (tmp_path, Path.home(), Path.cwd(), ROOT):
        assert str(path) not in text.replace("https://", "")
    assert not re.search(r"(?<![\w:/.])/(home|root|tmp|work|usr|var|Users)\b", text)


@pytest.mark.parametrize("name", list(PICTURES))
def test_each_picture_has_a_text_that_tells_what_it_shows(name):
    text = render_card(full_report(), ID, [name])
    (alternative,) = re.findall(rf"!\[(.*?)\]\({re.escape(name)}\)", text)
    assert len(alternative.split()) > 3


def test_a_card_may_be_made_of_any_file_that_holds_a_report(tmp_path):
    (tmp_path / "updp_report.json").write_text(json.dumps(asdict(full_report())), encoding="utf-8")
    assert render_card(Report.load(tmp_path), ID) == render_card(full_report(), ID)
