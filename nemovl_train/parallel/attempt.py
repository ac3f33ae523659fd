"""A name for one start of the processes under torchrun, so that they do not find what those before them left."""

import os

import torch.distributed as dist


def own_part(store: dist.Store) -> dist.Store:
    """The part of a launcher's store that belongs to this start.

    torchrun's agents share their store with the processes and keep it over restarts: gloo would find the addresses of
    the processes before. Each agent counts its own restarts, and one that came back begins at 0, so the count is a
    name for all processes only where the store lives as long as one agent. Without a shared store
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE, as `launch/node.py` sets it for nodes that may come back) every start has a new
    one, and needs no name.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
