"""One small demo, built once for all tests of this folder."""

from pathlib import Path

import pytest

from data_pipelines.demo.make import make_demo

SCALE = 0.02


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo folder at a fiftieth of the size."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    make_demo(out, scale=SCALE)
    return out
