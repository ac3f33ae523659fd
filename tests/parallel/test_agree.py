"""One process acts for all: results and errors; and a launched process that works as if it were alone."""

import os
import pickle

import pytest
import torch.distributed as dist

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.exceptions import ConfigError
from nemovl_train.parallel.agree import from_every_rank, on_first_rank
from nemovl_train.parallel.layout import Layout, alone, launch_rank, shutdown


@pytest.fixture
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()


@pytest.mark.usefixtures("layout")
def test_results_and_errors_of_the_first_rank():
    assert on_first_rank(lambda: {"a": 1}) == {"a": 1}
    assert from_every_rank("mine") == ["mine"]

    def fail():
        raise ConfigError(["one", "two"])

    with pytest.raises(ConfigError) as error:
        on_first_rank(fail)
    assert error.value.problems == ["one", "two"]


def test_a_config_error_survives_the_way_to_another_process():
    error = pickle.loads(pickle.dumps(ConfigError(["one", "two"])))
    assert (error.problems, str(error)) == (["one", "two"], str(ConfigError(["one", "two"])))


def test_alone_hides_the_launcher_and_leaves_no_world_behind(monkeypatch):
    shutdown()
    launched = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert launch_rank() == 1
    with alone():
        assert launch_rank() == 0
        layout = Layout.create(ParallelConfig())
        assert (layout.world_size, layout.rank) == (1, 0)
        layout.destroy()
    assert not dist.is_initialized()
    assert {name: os.environ[name] for name in launched} == launched
