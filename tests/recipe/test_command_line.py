from dataclasses import dataclass

import pytest
import yaml

from updp_hf import UPDPTrainingArguments
from updp_hf.recipe.command_line import parse_arguments


@dataclass
class Extra:
    depth: int
    name: str = "vit"


def test_command_line_wins_over_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"depth": 3, "learning_rate": 0.5, "num_pruned_blocks": 2, "name": "deit"}))
    argv = ["--config", str(file), "--learning_rate", "0.25", "--output_dir", str(tmp_path)]
    extra, args = parse_arguments(Extra, UPDPTrainingArguments, argv=argv)
    assert (extra.depth, extra.name, args.learning_rate, args.num_pruned_blocks) == (3, "deit", 0.25, 2)


def test_required_field_may_come_from_file_only(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(Extra, argv=[])
    assert "--depth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [({"depht": 3}, "depht"), (["depth"], "expected names and values"), (None, "no such file")],
)
def test_bad_file_is_refused(tmp_path, capsys, content, message):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit):
        parse_arguments(Extra, argv=["--config", str(file), "--depth", "1"])
    assert message in capsys.readouterr().err


def write(file, **values):
    file.write_text(yaml.safe_dump(values))
    return file


def test_files_are_laid_over_one_another_and_the_command_line_over_all(tmp_path):
    under = write(tmp_path / "under.yaml", depth=1, name="under", learning_rate=0.1, weight_decay=0.1, max_steps=1)
    config = write(tmp_path / "config.yaml", name="config", learning_rate=0.2, weight_decay=0.2, max_steps=2)
    over = write(tmp_path / "over.yaml", weight_decay=0.3, max_steps=3)
    options = ["--output_dir", str(tmp_path), "--num_pruned_blocks", "1", "--max-steps=4", f"--config={config}"]
    extra, args = parse_arguments(Extra, UPDPTrainingArguments, argv=options, under=[under], over=[over])
    found = (extra.depth, extra.name, args.learning_rate, args.weight_decay, args.max_steps)
    assert found == (1, "config", 0.2, 0.3, 4)


@pytest.mark.parametrize("way", ["config", "over", "command line"])
def test_an_alternative_takes_the_place_of_the_others(way, tmp_path):
    under = write(tmp_path / "under.yaml", num_pruned_blocks=2, output_dir=str(tmp_path))
    other = write(tmp_path / "other.yaml", target_macs=0.5)
    options = {"config": ["--config", str(other)], "over": [], "command line": ["--target_macs", "0.5"]}[way]
    over = [other] if way == "over" else []
    (args,) = parse_arguments(UPDPTrainingArguments, argv=options, under=[under], over=over)
    assert (args.num_pruned_blocks, args.target_macs) == (None, 0.5)


def test_two_alternatives_said_at_once_are_refused(tmp_path):
    both = write(tmp_path / "both.yaml", num_pruned_blocks=2, target_macs=0.5, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="`num_pruned_blocks` and `target_macs`"):
        parse_arguments(UPDPTrainingArguments, argv=["--config", str(both)])
