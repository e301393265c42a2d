"""The subcommands that make something of models: what they write is right, and an error is one sentence."""

import contextlib
import io
import itertools
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from printed import large_vit, loud_libraries, number, tables  # noqa: F401  # a fixture
from reports import full_report
from rings import slow_if
from tiny_training import RandomImages, assert_equal, logits, resnet, timm_vit, trainer, vit
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTForImageClassification
from transformers import ViTImageProcessor as Processor

from updp_hf import Budget, Report, UPDPForImageClassification, cli, close_, find_sites, gate_, prune
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.plan.plan import Plan
from updp_hf.reporting.card import PICTURES, is_generated, render_card
from updp_hf.surgery.model_io import example_inputs_of
from updp_hf.training.checkpoints import gated_model_in, save_checkpoint

SIZE = {"height": 16, "width": 16}
LARGE = RandomImages(count=8, size=32, seed=1)


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """Let a forward take a microsecond for each image and parameter, and a bit more each time, so that none repeats."""
    calls = itertools.count()

    def seconds_of(model, batch):
        return 1e-6 * count_parameters(model) * len(next(iter(batch.values()))) * (1 + 1e-4 * next(calls))

    with monkeypatch.context() as patched:
        patched.setattr("updp_hf.core.cost.forward_seconds", seconds_of)
        yield patched


@pytest.fixture(autouse=True)
def sketches(monkeypatch):
    """Draw no pictures, which takes its time; what is in them is tested elsewhere."""
    for name in PICTURES:
        monkeypatch.setitem(PICTURES, name, lambda report, file: file.write_bytes(b"a picture"))


@pytest.fixture(scope="module")
def run_of_training(tmp_path_factory):
    """Train a tiny model; checkpoint-2 is half-open, checkpoint-8 is closed."""
    folder = tmp_path_factory.mktemp("training")
    options = {"save_strategy": "steps", "save_steps": 2, "processing_class": Processor(size=SIZE)}
    run = trainer(folder, model=large_vit(), train_dataset=LARGE, eval_dataset=LARGE, **options)
    run.train()
    return run


@pytest.fixture
def checkpoints(run_of_training):
    folder = run_of_training.args.output_dir
    return {step: f"{folder}/checkpoint-{step}" for step in (2, 8)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save models of several kinds in folders of their own, by name."""
    root = tmp_path_factory.mktemp("models")
    checkpoint = large_vit()
    models = {
        "checkpoint": checkpoint,
        "pruned": prune(checkpoint, [LARGE.images], Budget(num_blocks=2), selector="last"),
        "shallow": large_vit().__class__(
            type(checkpoint.config)(**{**checkpoint.config.to_dict(), "num_hidden_layers": 2})
        ),
        "halves": large_vit().to(torch.bfloat16),
        "resnet": resnet(),
        "resnet-halves": resnet().to(torch.bfloat16),
        "small": vit(),
        "timm": timm_vit(),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture
def pruned(saved, tmp_path):
    """Copy the pruned model, to be written beside."""
    return shutil.copytree(saved["pruned"], tmp_path / "vit-p2")


def run(capsys, *arguments):
    """Return the exit status, and what was printed to stdout and stderr."""
    capsys.readouterr()  # of what saving the model printed
    status = cli.main([*map(str, arguments)])
    return status, *capsys.readouterr()


def assert_refused(capsys, *arguments, match):
    status, printed, sentence = run(capsys, *arguments)
    assert (status, printed) == (1, "")
    assert sentence.startswith("updp-hf: ")
    assert sentence.count("\n") == 1
    assert sentence.endswith("\n")
    assert "Traceback" not in sentence
    assert re.search(match, sentence)


# merge


@pytest.fixture(scope="module")
def merged(run_of_training, tmp_path_factory):
    """Merge the closed checkpoint; return the status, what was printed to stdout and stderr, and the folder."""
    output = tmp_path_factory.mktemp("merged") / "vit-p2"
    printed, chatter = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(chatter):
        status = cli.main(["merge", f"{run_of_training.args.output_dir}/checkpoint-8", str(output)])
    return status, printed.getvalue(), chatter.getvalue(), output


def test_the_merged_checkpoint_computes_what_the_closed_model_does(run_of_training, merged):
    status, printed, chatter, output = merged
    assert (status, printed, chatter) == (0, f"Saved the merged model in {output}.\n", "")
    model = AutoModelForImageClassification.from_pretrained(output)
    assert isinstance(model, UPDPForImageClassification)
    expected = logits(run_of_training.model, LARGE)
    assert float((logits(model, LARGE) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert model.num_parameters() < run_of_training.base.num_parameters()


def test_processor_report_and_card_lie_beside_the_merged_model(run_of_training, merged):
    *_, output = merged
    found = AutoImageProcessor.from_pretrained(output)
    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        *(p(image, return_tensors="pt")["pixel_values"] for p in (found, run_of_training.processing_class))
    )
    report = Report.load(output)
    assert report.plan["sites"] == run_of_training.plan.to_dict()["sites"]
    assert report.before.parameters == run_of_training.base.num_parameters()
    assert set(report.before.latency) == set(report.after.latency) == {"1", "8"}
    assert report.blocks == ["vit.layers.0", "vit.layers.1", "vit.layers.2"]
    pictures = [name for name in PICTURES if (output / name).is_file()]
    assert pictures == ["before_after.png", "blocks.png"]
    assert (output / "README.md").read_text(encoding="utf-8") == render_card(report, "vit-p2", pictures)
    for path in (output.parent, run_of_training.args.output_dir):
        for file in ("README.md", "updp_report.json", "config.json"):
            assert str(path) not in (output / file).read_text(encoding="utf-8")


def test_without_a_processor_none_is_made_up(tmp_path, capsys):
    model = vit()
    gate_(model, Plan(find_sites(model, ["merge"]).sites[:1]))
    close_(model)
    save_checkpoint(model, tmp_path / "checkpoint-1")
    assert run(capsys, "merge", tmp_path / "checkpoint-1", tmp_path / "merged")[0] == 0
    assert not (tmp_path / "merged" / "preprocessor_config.json").exists()


def test_a_folder_may_be_named_by_a_dot(checkpoints, tmp_path, capsys, monkeypatch):
    (tmp_path / "vit-p2").mkdir()
    monkeypatch.chdir(tmp_path / "vit-p2")
    assert run(capsys, "merge", checkpoints[8], ".")[0] == 0
    assert "\n# vit-p2\n" in (tmp_path / "vit-p2" / "README.md").read_text(encoding="utf-8")


def test_a_half_open_checkpoint_is_refused(checkpoints, tmp_path, capsys):
    assert_refused(capsys, "merge", checkpoints[2], tmp_path / "merged", match=r"gates are not closed .* λ = 0\.\d+")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_holds_a_model_is_not_written_over(checkpoints, pruned, capsys):
    before = {path.name: path.read_bytes() for path in pruned.iterdir()}
    assert_refused(capsys, "merge", checkpoints[8], pruned, match="holds a model already: choose a new folder")
    assert_refused(capsys, "merge", checkpoints[8], checkpoints[8], match="holds a model already")
    assert {path.name: path.read_bytes() for path in pruned.iterdir()} == before


def lost_weights(folder):
    (folder / "model.safetensors").unlink()


def damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"damaged")


def other_weights(folder):
    vit().save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "model.safetensors", folder)


def damaged_config(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def edited_config(change):
    def edit(folder):
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        change(config)
        file.write_text(json.dumps(config), encoding="utf-8")

    return edit


BROKEN_CHECKPOINTS = {
    "no folder": (shutil.rmtree, "checkpoint"),
    "empty": (empty_folder, "checkpoint"),
    "no weights": (lost_weights, r"holds no model\.safetensors"),
    "damaged weights": (damaged_weights, "does not fit the model"),
    "weights of another model": (other_weights, "does not fit the model"),
    "damaged configuration": (damaged_config, "JSON"),
    "no plan": (edited_config(lambda config: config.pop("plan")), "is no checkpoint of a pruning run"),
    "no gates": (edited_config(lambda config: config.pop("is_gated")), "is no checkpoint of a pruning run"),
    "plan of tomorrow": (edited_config(lambda config: config["plan"].update(format_version=9)), "format version 9"),
    "plan of another model": (
        edited_config(lambda c: c["base_config"].update(num_hidden_layers=1)),
        "another checkpoint",
    ),
    "unknown model": (edited_config(lambda c: c["base_config"].update(model_type="nonesuch")), "'nonesuch'"),
}


@pytest.mark.parametrize(("damage", "match"), BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS)
def test_what_is_no_checkpoint_of_a_pruning_run_is_refused_in_one_sentence(
    damage, match, checkpoints, tmp_path, capsys
):
    folder = shutil.copytree(checkpoints[8], tmp_path / "checkpoint-8")
    damage(folder)
    assert_refused(capsys, "merge", folder, tmp_path / "merged", match=match)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["checkpoint", "pruned"])
def test_a_model_that_is_not_in_training_cannot_be_merged(name, saved, tmp_path, capsys):
    assert_refused(capsys, "merge", saved[name], tmp_path / "merged", match="is no checkpoint of a pruning run")


def test_a_file_is_no_folder(checkpoints, tmp_path, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert_refused(capsys, "merge", checkpoints[8], tmp_path / "file", match="file")


# benchmark


def benchmarked(capsys, *arguments):
    status, printed, chatter = run(capsys, "benchmark", *arguments)
    assert (status, chatter) == (0, "")
    (rows,) = tables(printed)
    return rows, printed


def test_the_ratios_are_those_of_the_latencies_printed(saved, capsys):
    names = [str(saved[name]) for name in ("checkpoint", "pruned", "shallow")]
    rows, printed = benchmarked(capsys, *names, "--batch_size", 2, 5, "--rounds", 3)
    assert list(rows["parameters"]) == names
    for size in (2, 5):
        latencies, ratios = rows[f"latency, batch {size}"], rows[f"speed-up, batch {size}"]
        assert ratios[names[0]] == "1"
        for name in names[1:]:
            expected = number(latencies[names[0]]) / number(latencies[name])
            assert float(ratios[name].removesuffix("×")) == pytest.approx(expected, abs=0.0051)
            assert expected > 1
    assert "rounds: 3" in printed
    assert f"threads: {torch.get_num_threads()}" in printed


def test_costs_are_those_that_are_counted(saved, capsys):
    rows, _ = benchmarked(capsys, saved["checkpoint"], saved["pruned"], "--rounds", 1)
    for name in ("checkpoint", "pruned"):
        model = AutoModelForImageClassification.from_pretrained(saved[name])
        macs = count_macs(model, example_inputs_of(model))
        assert number(rows["parameters"][str(saved[name])]) == pytest.approx(count_parameters(model) / 1e6, abs=0.005)
        assert number(rows["MACs per image"][str(saved[name])]) == pytest.approx(macs / 1e6, abs=0.05)
    assert {row for row in rows if row.startswith("latency")} == {"latency, batch 1", "latency, batch 8"}


def test_compiled_models_have_rows_and_ratios_of_their_own(saved, capsys, monkeypatch):
    compiled = []

    def compile_(model):
        compiled.append(model)
        return nn.ParameterList(list(model.parameters())[: -2 * len(compiled)])  # of which each is faster than it was

    monkeypatch.setattr(torch, "compile", compile_)
    names = [str(saved[name]) for name in ("checkpoint", "pruned")]
    rows, _ = benchmarked(capsys, *names, "--batch_size", 4, "--rounds", 2, "--compile")
    latencies, ratios = rows["latency, batch 4, compiled"], rows["speed-up, batch 4, compiled"]
    assert all(number(latencies[name]) < number(rows["latency, batch 4"][name]) for name in names)
    expected = number(latencies[names[0]]) / number(latencies[names[1]])
    assert (ratios[names[0]], float(ratios[names[1]][:-1])) == ("1", pytest.approx(expected, abs=0.0051))
    assert [type(model) for model in compiled] == [ViTForImageClassification, UPDPForImageClassification]


def test_nothing_is_compiled_unless_asked(saved, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: pytest.fail("compiled"))
    rows, _ = benchmarked(capsys, saved["checkpoint"], "--rounds", 1)
    assert not [row for row in rows if "compiled" in row or "speed-up" in row]


def test_a_model_that_cannot_be_compiled_is_one_sentence(saved, capsys, monkeypatch):
    def compile_(model):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch, "compile", compile_)
    assert_refused(capsys, "benchmark", saved["small"], "--rounds", 1, "--compile", match="no compiler")


def test_the_same_model_given_twice_is_measured_once(saved, capsys):
    rows, _ = benchmarked(capsys, saved["small"], saved["small"], "--rounds", 1)
    assert list(rows["parameters"]) == [str(saved["small"])]


@pytest.mark.parametrize("names", [("checkpoint", "halves"), ("resnet", "resnet-halves"), ("resnet-halves", "resnet")])
def test_models_in_other_precisions_are_compared_or_refused_in_one_sentence(names, saved, capsys, seconds):
    seconds.undo()  # each runs indeed
    status, printed, chatter = run(capsys, "benchmark", *(saved[name] for name in names), "--rounds", 1)
    assert (status, chatter.count("\n")) in ((0, 0), (1, 1))
    assert status == 1 or "×" in printed


@pytest.mark.parametrize("others", [("checkpoint", "small"), ("checkpoint", "pruned", "timm")])
def test_models_for_images_of_other_sizes_are_refused(others, saved, capsys):
    assert_refused(
        capsys,
        *("benchmark", *(saved[name] for name in others), "--rounds", 1),
        match=r"takes images of \(3, 16, 16\) in .* of \(3, 32, 32\) in ",
    )


@pytest.mark.parametrize("option", [("--batch_size", 0), ("--batch_size", 1, -1), ("--rounds", 0)])
def test_numbers_below_one_are_refused_before_anything_is_loaded(option, capsys):
    assert_refused(capsys, "benchmark", "nowhere", *option, match="expected at least 1")


def test_the_sentence_about_a_number_names_its_option(capsys):
    assert_refused(capsys, "benchmark", "nowhere", "--rounds", 0, match=r"updp-hf: --rounds is 0, expected at least 1")


def test_what_cannot_be_loaded_cannot_be_compared(saved, capsys):
    assert_refused(capsys, "benchmark", saved["small"], "./nowhere", match="No image classifier could be loaded from")


# card


def test_the_card_is_that_of_the_report(merged, tmp_path, capsys):
    output = shutil.copytree(merged[-1], tmp_path / "vit-p2")
    report = Report.load(output)
    report.metrics_after["accuracy"] = 0.4321
    report.save(output)
    status, printed, chatter = run(capsys, "card", output, "--repo_id", "someone/vit-p2")
    assert (status, printed, chatter) == (0, f"Wrote {output / 'README.md'}.\n", "")
    text = (output / "README.md").read_text(encoding="utf-8")
    assert 'model="someone/vit-p2"' in text
    assert "43.21 %" in text
    assert Report.load(output) == replace(report, metadata={**report.metadata, "repo_id": "someone/vit-p2"})
    run(capsys, "card", output)
    assert (output / "README.md").read_text(encoding="utf-8") == text  # the name is remembered


def test_a_model_without_a_report_has_a_card_of_what_can_be_counted(pruned, capsys):
    assert run(capsys, "card", pruned)[0] == 0
    text = (pruned / "README.md").read_text(encoding="utf-8")
    assert "**2 of 3 blocks pruned** (2 merged)" in text
    assert 'model="vit-p2"' in text
    assert "speed: not measured" in text
    assert ModelCard(text).data.library_name == "transformers"
    assert Report.load(pruned).metrics_after == {}
    assert {"README.md", "updp_report.json", "before_after.png", "blocks.png"} <= {
        path.name for path in pruned.iterdir()
    }


def test_figures_of_other_weights_are_left_out(pruned, capsys):
    replace(full_report(), metrics_after={"accuracy": 0.4321}).save(pruned)
    assert run(capsys, "card", pruned)[0] == 0
    assert "43.21" not in (pruned / "README.md").read_text(encoding="utf-8")
    assert Report.load(pruned).metrics_after == {"accuracy": 0.4321}  # not lost either


def test_the_same_command_writes_the_same_files(pruned, capsys):
    written = []
    for _ in range(2):
        run(capsys, "card", pruned)
        written.append({path.name: path.read_bytes() for path in pruned.iterdir()})
    assert written[0] == written[1]


def test_a_card_edited_by_hand_is_written_over_by_force_only(pruned, capsys):
    card = pruned / "README.md"
    card.write_text("# My own card\n", encoding="utf-8")
    assert_refused(capsys, "card", pruned, match=r"was edited by hand, .* `--force`")
    assert card.read_text(encoding="utf-8") == "# My own card\n"
    assert run(capsys, "card", pruned, "--force")[0] == 0
    assert is_generated(card)


def test_a_card_that_could_not_be_written_is_an_error_and_the_old_one_stays(pruned, capsys, monkeypatch):
    def render(*arguments):
        raise RuntimeError("it failed")

    card = pruned / "README.md"
    card.write_text("# My own card\n", encoding="utf-8")
    monkeypatch.setattr("updp_hf.reporting.card.render_card", render)
    assert_refused(capsys, "card", pruned, "--force", match="it failed")
    assert card.read_text(encoding="utf-8") == "# My own card\n"


BROKEN_REPORTS = {
    "no JSON": "{",
    "no report": "{}",
    "a list": "[]",
    "a cost is missing": '{"plan": {}, "before": {"parameters": 1}, "after": {"parameters": 1}}',
    "of tomorrow": json.dumps(
        {"plan": {}, "before": {"parameters": 1, "macs": 1}, "after": {"parameters": 1, "macs": 1}, "new": 1}
    ),
}


@pytest.mark.parametrize("text", slow_if(BROKEN_REPORTS, ("no report", "a list", "a cost is missing")))
@pytest.mark.parametrize("command", ["card", "push"])
def test_a_report_that_cannot_be_read_is_one_sentence(command, text, pruned, capsys):
    (pruned / "updp_report.json").write_text(text, encoding="utf-8")
    repo = ["someone/vit-p2"] if command == "push" else []
    assert_refused(capsys, command, pruned, *repo, match="report")
    assert (pruned / "updp_report.json").read_text(encoding="utf-8") == text


# all of them


def arguments_of(command, folder):
    return {
        "merge": [folder, folder / "merged"],
        "benchmark": [folder],
        "card": [folder],
        "export": [folder],
        "push": [folder, "someone/vit-p2"],
    }[command]


FOLDER_COMMANDS = ("card", "export", "push")
COMMANDS = ("merge", "benchmark", *FOLDER_COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_not_there_is_one_sentence(command, tmp_path, capsys):
    assert_refused(capsys, command, *arguments_of(command, tmp_path / "nowhere"), match=str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_folder_is_one_sentence(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert_refused(capsys, command, *arguments_of(command, tmp_path / "empty"), match=str(tmp_path / "empty"))
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("command", FOLDER_COMMANDS)
def test_an_id_on_the_hub_is_no_folder_of_a_merged_model(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, command, "someone/vit", *arguments_of(command, tmp_path)[1:], match="folder|holds no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", FOLDER_COMMANDS)
def test_a_training_checkpoint_is_not_published(command, checkpoints, tmp_path, capsys):
    folder = shutil.copytree(checkpoints[8], tmp_path / "checkpoint-8")
    before = sorted(path.name for path in folder.iterdir())
    assert_refused(
        capsys,
        command,
        *arguments_of(command, folder),
        match=r"unfinished pruning run|updp-hf merge|training checkpoint",
    )
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_model_that_was_not_pruned_is_not_pushed(saved, capsys):
    assert_refused(capsys, "push", saved["checkpoint"], "someone/vit", match=r"has not pruned: push it by its own")


def test_a_hub_that_is_not_reached_is_one_sentence_and_the_model_stays(pruned, capsys):
    before = {path.name: path.read_bytes() for path in pruned.iterdir()}
    assert_refused(capsys, "push", pruned, "someone/vit-p2", "--token", "hf_secret", match="Hub")
    assert {path.name: path.read_bytes() for path in pruned.iterdir()} == before


def test_an_export_without_its_libraries_says_what_to_install(pruned, capsys, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("updp_hf.deployment.runtimes.import_module", missing)
    assert_refused(capsys, "export", pruned, match=re.escape("pip install 'updp-hf[onnx]'"))
    assert not (pruned / "onnx").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_debug_raises(command, tmp_path):
    with pytest.raises((ValueError, OSError)):
        cli.main([command, *map(str, arguments_of(command, tmp_path / "nowhere")), "--debug"])


@pytest.mark.parametrize("command", COMMANDS)
def test_without_its_arguments_a_subcommand_shows_its_usage(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"usage: updp-hf {command}")


def test_a_checkpoint_that_is_merged_is_left_as_it_is(run_of_training, merged):
    found = gated_model_in(f"{run_of_training.args.output_dir}/checkpoint-8").state_dict()
    assert_equal(found, run_of_training.model.state_dict())
