"""Names of starts under torchrun: what a restart must not find, and where agents that count differently meet."""

import pytest
import torch.distributed as dist

from nemovl_train.parallel.attempt import own_part


@pytest.mark.parametrize(
    ("shared", "counts", "meet"),
    [
        ("True", (0, 1), False),  # one agent, before and after a restart: the addresses there are the old ones
        ("True", (1, 1), True),
        ("False", (1, 0), True),  # a node that came back counts from 0, and the store is new anyway
        (None, (0, 0), True),  # without torchrun
    ],
)
def test_who_meets_whom(monkeypatch, shared, counts, meet):
    store = dist.HashStore()
    if shared is None:
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    seen = []
    for count in counts:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        part = own_part(store)
        seen.append(part.check(["address"]))
        part.set("address", "here")
    assert seen == [False, meet]
