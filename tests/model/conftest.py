"""One process, one layout for the model tests of a file."""

import pytest

from nemovl_train.config.schema import ParallelConfig
from nemovl_train.parallel.layout import Layout


@pytest.fixture(scope="module")
def layout():
    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()
