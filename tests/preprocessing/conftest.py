"""A small data set in COCO's layout, copied for each test."""

import shutil
from pathlib import Path

import pytest

from preprocessing.synthetic import SyntheticConfig, write_set
from tests.support.coco_folder import CocoFolder
from tests.support.ray_local import ray_local  # noqa: F401


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("coco"), SyntheticConfig(train=12, val=1, size=(48, 48), seed=1))


@pytest.fixture
def coco(pristine: Path, tmp_path: Path) -> CocoFolder:
    return CocoFolder(Path(shutil.copytree(pristine, tmp_path / "coco")))
