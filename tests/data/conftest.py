from pathlib import Path

import datasets
import pytest
from tiny_pictures import write_folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_folder(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> datasets.DatasetDict:
    cache = tmp_path_factory.mktemp("cache")
    return datasets.load_dataset("imagefolder", data_dir=str(picture_folder), cache_dir=str(cache))
