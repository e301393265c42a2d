"""`updp-hf sites` prints what `find_sites` finds, and one sentence where there is nothing to print."""

import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
from printed import LARGE_ENOUGH, large_vit, loud_libraries, number, tables  # noqa: F401  # a fixture
from project import ROOT
from rings import slow_but
from tiny_training import timm_vit, vit
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTModel,
)

from updp_hf import Budget, LatencyTable, UPDPForImageClassification, cli, find_sites, prune
from updp_hf.core.cost import count_macs, count_parameters
from updp_hf.core.kinds import DEFAULT_FORM
from updp_hf.surgery.model_io import example_inputs_of


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """Let a forward take a microsecond for each image and parameter, so that every measurement gives the same."""

    def seconds_of(model, batch):
        return 1e-6 * count_parameters(model) * len(next(iter(batch.values())))

    monkeypatch.setattr("updp_hf.core.cost.forward_seconds", seconds_of)


def timm(architecture, **arguments):
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, **arguments))


def large_timm_vit():
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}
    return timm("vit_tiny_patch16_224", model_args=shape)


def bottleneck_resnet():
    shape = {"embedding_size": 16, "hidden_sizes": [64, 128], "depths": [2, 3], "layer_type": "bottleneck"}
    return ResNetForImageClassification(ResNetConfig(**shape, image_size=64))


def pruned():
    return prune(large_vit(), [torch.randn(4, 3, 32, 32)], Budget(num_blocks=1), selector="last")


def run(capsys, *arguments):
    """Return the exit status, and what was printed to stdout and stderr."""
    capsys.readouterr()  # of what saving the model printed
    status = cli.main(["sites", *map(str, arguments)])
    return status, *capsys.readouterr()


def share(cell):
    return float(re.search(r"\((.*)%\)", cell)[1]) / 100


BUILDS = [large_vit, large_timm_vit, bottleneck_resnet, pruned]


@pytest.mark.parametrize("build", slow_but(BUILDS, bottleneck_resnet, pruned))
def test_rows_are_what_find_sites_finds(build, tmp_path, capsys):
    build().save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    sites = find_sites(model, latencies=LatencyTable(2)).sites
    status, printed, chatter = run(capsys, tmp_path, "--batch_size", 2)
    assert (status, chatter) == (0, "")
    header, rows = tables(printed)

    facts = {fact: row[str(tmp_path)] for fact, row in header.items()}
    macs, parameters = count_macs(model, example_inputs_of(model)), count_parameters(model)
    assert facts["model class"] == type(model).__name__
    assert (facts["dtype"], facts["threads"]) == ("float32", str(torch.get_num_threads()))
    assert number(facts["parameters"]) == pytest.approx(parameters / 1e6, abs=0.005)
    assert number(facts["MACs per image"]) == pytest.approx(macs / 1e6, abs=0.05)
    assert number(facts["latency, batch 2"]) == pytest.approx(2e-3 * parameters, abs=0.005)

    assert list(rows) == [*(str(index) for index in range(len(sites))), DEFAULT_FORM]
    for row, site in zip(rows.values(), sites, strict=False):
        assert (row["block"], row["form"], row["saves compute"]) == (
            site.block,
            site.form,
            "yes" if site.saves_compute else "no",
        )
        assert [f"{site.block}.{slot}" for slot in row["closes"].split(", ")] == [*site.norms, *site.activations]
        assert_saves(row, site.saving.macs, site.saving.parameters, site.saving.seconds, macs, parameters)
    paying = [site for site in sites if site.saves_compute]
    assert rows[DEFAULT_FORM]["block"] == f"{len(paying)} of {len(sites)} sites save compute"
    sums = [sum(getattr(site.saving, what) for site in paying) for what in ("macs", "parameters", "seconds")]
    assert_saves(rows[DEFAULT_FORM], *sums, macs, parameters)


def assert_saves(row, macs_saved, params_saved, seconds_saved, macs, parameters):
    assert number(row["MACs saved"]) == pytest.approx(macs_saved / 1e6, abs=0.05)
    assert number(row["parameters saved"]) == pytest.approx(params_saved / 1e6, abs=0.005)
    assert number(row["latency saved"]) == pytest.approx(seconds_saved * 1e3, abs=0.005)
    shares = [share(row[f"{fact} saved"]) for fact in ("MACs", "parameters", "latency")]
    expected = [macs_saved / macs, params_saved / parameters, seconds_saved / (2e-6 * parameters)]
    assert shares == pytest.approx(expected, abs=0.0005)


def test_the_models_above_have_sites_of_all_kinds():
    counts = {build: [site.saves_compute for site in find_sites(build()).sites] for build in BUILDS}
    assert [len(pays) for pays in counts.values()] == [3, 2, 5, 2]
    assert [build for build, pays in counts.items() if not all(pays)] == [bottleneck_resnet]


def test_what_does_not_pay_is_shown_and_not_summed(tmp_path, capsys):
    bottleneck_resnet().save_pretrained(tmp_path)
    _, rows = tables(run(capsys, tmp_path)[1])
    first, *dearer, total = rows.values()  # the first block reads few channels
    assert (first["saves compute"], {site["saves compute"] for site in dearer}) == ("yes", {"no"})
    assert all(number(site["latency saved"]) < 0 and share(site["MACs saved"]) < 0 for site in dearer)
    assert total["block"] == f"1 of {1 + len(dearer)} sites save compute"
    assert all(total[f"{fact} saved"] == first[f"{fact} saved"] for fact in ("MACs", "parameters", "latency"))


def test_each_form_has_its_rows_and_its_sum_and_only_merges_are_measured(tmp_path, capsys):
    large_vit().save_pretrained(tmp_path)
    forms = ["block-drop", "merge", "attention-drop"]
    _, printed, _ = run(capsys, tmp_path, *(word for form in [*forms, "merge"] for word in ("--form", form)))
    _, rows = tables(printed)
    sites = find_sites(large_vit(), forms, latencies=LatencyTable()).sites
    assert [(row["block"], row["form"]) for row in rows.values()][:-3] == [(site.block, site.form) for site in sites]
    measured = {row["form"]: row["latency saved"] != "not measured" for row in rows.values() if row["form"]}
    assert measured == {form: form == "merge" for form in forms}
    closes = {row["form"]: row["closes"] for row in rows.values()}
    assert (closes["block-drop"], closes["attention-drop"]) == ("all of it", "layernorm_before, attention")
    for form in forms:
        saved = sum(site.saving.macs for site in sites if site.form == form)
        assert number(rows[form]["MACs saved"]) == pytest.approx(saved / 1e6, abs=0.05)


def test_macs_may_be_what_counts(tmp_path, capsys, monkeypatch):
    def measured(*_):
        raise AssertionError

    monkeypatch.setattr("updp_hf.core.cost.forward_seconds", measured)
    large_vit().save_pretrained(tmp_path)
    header, rows = tables(run(capsys, tmp_path, "--cost", "macs")[1])
    assert list(header) == ["model class", "parameters", "MACs per image"]
    assert [row["saves compute"] for row in rows.values()] == ["yes"] * 3 + [""]
    assert {row["latency saved"] for row in rows.values()} == {"not measured"}


def test_blocks_unsupported_for_the_same_reason_share_a_line(tmp_path, capsys):
    model = prune(vit(num_hidden_layers=6), [torch.randn(4, 3, 16, 16)], Budget(num_blocks=5), selector="last")
    model.save_pretrained(tmp_path)
    _, printed, _ = run(capsys, tmp_path)
    head, line = printed.split("\n\n")[-1].splitlines()
    assert head == "Blocks without a site:"
    unsupported = find_sites(model).unsupported
    assert [none.block for none in unsupported] == [f"base.vit.layers.{layer}" for layer in range(1, 6)]
    reason = unsupported[0].reason.replace("base.vit.layers.1.", "")
    named = ", ".join(none.block for none in unsupported[:3])
    assert line == f"- {named} and 2 more ({DEFAULT_FORM}): {reason}."


def test_nothing_found_is_one_sentence_and_the_reasons(tmp_path, capsys):
    shape = {"img_size": 28, "embed_dim": 24, "depth": 2, "num_heads": 2}
    timm("eva02_tiny_patch14_224", model_args=shape).save_pretrained(tmp_path)
    status, printed, _ = run(capsys, tmp_path)
    _, sentence, reasons = printed.split("\n\n")
    assert status == 0
    assert sentence == f"TimmWrapperForImageClassification has no site of the form {DEFAULT_FORM}. Try another --form."
    assert f"- timm_model.blocks.0, timm_model.blocks.1 ({DEFAULT_FORM}): looked for two Linears" in reasons


def test_a_model_without_blocks_is_told_so(tmp_path, capsys):
    vit(num_hidden_layers=0).save_pretrained(tmp_path)
    _, printed, _ = run(capsys, tmp_path)
    assert printed.endswith(
        f"\n\nViTForImageClassification has no site of the form {DEFAULT_FORM}, for no repeated blocks with Linears or "
        "convolutions were found. Try another --form.\n"
    )


def no_model(folder):
    folder.mkdir()


def language_model(folder):
    BertConfig().save_pretrained(folder)


def no_head(folder):
    ViTModel(vit().config).save_pretrained(folder)


def other_shapes(folder):
    vit().save_pretrained(folder)
    vit(hidden_size=32).config.save_pretrained(folder)


def no_weights(folder):
    vit().config.save_pretrained(folder)


def damaged_weights(folder):
    vit().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")


def pointer_to_weights(folder):
    vit().config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")


def unknown_architecture(folder):
    timm_vit().save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("vit_tiny_patch16_224", "nonesuch"), encoding="utf-8")


def other_images(folder):
    model = timm_vit()
    model.config.image_size = 32
    model.save_pretrained(folder)


def lost_weights(folder):
    pruned().save_pretrained(folder)
    shutil.copy(folder / "config.json", folder.parent / "config.json")
    large_vit().save_pretrained(folder)
    shutil.move(folder.parent / "config.json", folder / "config.json")


NO_CLASSIFIER = "updp-hf: No image classifier could be loaded from the folder '{}': "
ADVICE = " Give a folder that `save_pretrained` wrote, or a Hub id, of an image classifier.\n"
WRONG = {
    no_model: (NO_CLASSIFIER + "Unrecognized model in", ADVICE),
    language_model: (NO_CLASSIFIER + "Unrecognized configuration class <class 'transformers.models.bert", ADVICE),
    no_weights: (NO_CLASSIFIER + "Error no file named model.safetensors", ADVICE),
    damaged_weights: (NO_CLASSIFIER, ADVICE),
    pointer_to_weights: (NO_CLASSIFIER, ADVICE),
    lost_weights: ("updp-hf: The weights in {} do not fit its configuration (", "or ask who made it.\n"),
    unknown_architecture: (NO_CLASSIFIER + "The model architecture 'nonesuch' is not supported", ADVICE),
    no_head: (
        "updp-hf: '{}' has no weights that fit classifier.bias, classifier.weight of ViTForImageClassification.",
        ADVICE,
    ),
    other_shapes: ("updp-hf: '{}' has no weights that fit classifier.weight, vit.embeddings.cls_token,", ADVICE),
    other_images: (
        "updp-hf: torch.export fails on TimmWrapperForImageClassification with AssertionError: Input height (32)",
        " That takes Python: `updp_hf.find_sites(model, example_inputs=...)`.\n",
    ),
}


@pytest.mark.parametrize("write", WRONG)
def test_what_cannot_be_searched_is_one_sentence_and_no_traceback(write, tmp_path, capsys):
    folder = tmp_path / "model"
    write(folder)
    status, printed, sentence = run(capsys, folder)
    begin, end = WRONG[write]
    assert (status, printed) == (1, "")
    assert sentence.startswith(begin.format(folder))
    assert sentence.endswith(end)
    assert sentence.count("\n") == 1


@pytest.mark.parametrize("name", ["nobody/nothing", "./nowhere", "no id"])
def test_what_is_no_folder_is_taken_for_a_hub_id(name, capsys):
    status, printed, sentence = run(capsys, name)
    assert (status, printed) == (1, "")
    assert sentence.startswith(
        f"updp-hf: No image classifier could be loaded from {name!r}, which is no folder here and was taken for a Hub "
    )
    assert sentence.endswith(ADVICE)


def test_batches_without_images_are_refused_before_anything_is_loaded(capsys):
    expected = "updp-hf: --batch_size is 0, expected at least 1: give a larger number.\n"
    assert run(capsys, "nowhere", "--batch_size", 0) == (1, "", expected)


@pytest.mark.parametrize("arguments", [[], ["sites"], ["sites", "model", "--form", "nonesuch"], ["nonesuch", "model"]])
def test_what_argparse_refuses_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: updp-hf")


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match=r"^No image classifier could be loaded") as caught:
        cli.main(["sites", str(tmp_path), "--debug"])
    assert isinstance(caught.value.__cause__, ValueError)


SUBCOMMANDS = {
    "sites": "sites google/vit-base-patch16-224 --batch_size 8",
    "merge": "merge deit-small-p6/checkpoint-5000 deit-small-p6-merged",
    "benchmark": "benchmark facebook/deit-small-patch16-224 deit-small-p6 --compile",
    "export": "export deit-small-p6",
    "card": "card deit-small-p6 --repo_id me/deit-small-p6",
    "push": "push deit-small-p6 me/deit-small-p6 --private",
}


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("subcommand", "example"), SUBCOMMANDS.items(), ids=SUBCOMMANDS)
def test_help_gives_an_example(subcommand, example, capsys):
    assert f"Example: updp-hf {example}" in " ".join(help_of(capsys, subcommand).split())
    cli._parser().parse_args(example.split())  # which can be run


def test_the_help_names_the_subcommands(capsys):
    named = re.findall(r"^ {4}(\w+)(?:  |$)", help_of(capsys), flags=re.MULTILINE)
    assert named == list(SUBCOMMANDS)


@pytest.mark.slow
def test_the_script_is_main_and_prints_nothing_but_the_tables(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["updp-hf"]) is cli.main
    model = pruned()
    assert isinstance(model, UPDPForImageClassification)
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "updp_hf.cli", "sites", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    header, rows = tables(done.stdout)
    assert header["model class"][str(tmp_path)] == "UPDPForImageClassification"
    assert [row["block"] for row in rows.values()][:-1] == [site.block for site in find_sites(model).sites]
