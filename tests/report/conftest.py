"""A run folder for every test, written once and copied."""

import shutil
from pathlib import Path

import pytest
from synthetic_run import write_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished five-stage run; not to be changed."""
    return write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run_folder(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(finished_run, tmp_path / "demo"))
