"""The published cards are what their reports render to."""

import pytest
from PIL import Image
from project import ROOT

from updp_hf.reporting.card import CARD_NAME, PICTURES, draw_pictures, render_card
from updp_hf.reporting.report import REPORT_NAME, Report

FOLDERS = sorted(file.parent for file in (ROOT / "model_cards").glob(f"*/{REPORT_NAME}"))


def made_by(picture):
    with Image.open(picture) as opened:
        return opened.info["Software"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_what_its_report_renders_to(folder, tmp_path):
    report = Report.load(folder)
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    assert (folder / CARD_NAME).read_bytes() == render_card(report, folder.name, pictures).encode()
    report.save(tmp_path)
    assert Report.load(tmp_path) == report


@pytest.mark.parametrize(
    "folder",
    [pytest.param(folder, marks=[pytest.mark.slow] * (index > 0)) for index, folder in enumerate(FOLDERS)],
    ids=lambda folder: folder.name,
)
def test_its_pictures_are_what_is_drawn_of_the_report(folder, tmp_path):
    pictures = draw_pictures(Report.load(folder), tmp_path)
    assert {file.name for file in folder.iterdir()} == {CARD_NAME, REPORT_NAME, *pictures}
    for name in pictures:
        if made_by(tmp_path / name) == made_by(folder / name):  # else another version of matplotlib drew it
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_there_are_cards_of_all_networks_of_the_recipe():
    assert {folder.name for folder in FOLDERS} == {
        f"digits_{name}" for name in ("convnext", "mobilenetv2", "resnet", "vit")
    }
    assert all(set(PICTURES) <= {file.name for file in folder.iterdir()} for folder in FOLDERS)
