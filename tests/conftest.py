"""Rules for every test: GPU tests are skipped where there is no GPU, instead of failing in the middle."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds the skip; torch is imported only when a GPU test was chosen."""
    chosen = [item for item in items if item.get_closest_marker("gpu")]
    if not chosen:
        return
    import torch

    if not torch.cuda.is_available():
        for item in chosen:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
