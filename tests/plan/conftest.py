"""One layout for the tests that compare plans with real modules."""

import pytest


@pytest.fixture(scope="module")
def layout():
    from nemovl_train.config.schema import ParallelConfig
    from nemovl_train.parallel.layout import Layout

    layout = Layout.create(ParallelConfig())
    yield layout
    layout.destroy()
