"""Data of the mini run, written once."""

import gc
from pathlib import Path

import pytest
import tiny_runs
import torch


@pytest.fixture(scope="session", autouse=True)
def _quick() -> None:
    torch.set_num_threads(1)
    # megatron-core collects garbage at every save: a fifth of a second over all that the imports left.
    gc.freeze()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_data(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def layout():
    from nemovl_train.config.schema import ParallelConfig
    from nemovl_train.parallel.layout import Layout

    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()
