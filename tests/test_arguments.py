from dataclasses import dataclass

import pytest
import yaml

from updp_hf import UPDPTrainingArguments
from updp_hf.arguments import parse_arguments


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
