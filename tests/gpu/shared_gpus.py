"""More ranks than GPUs: what a layout for four GPUs computes, checked on one or two.

NCCL from 2.30 on lets several ranks use one GPU when `NCCL_MULTI_RANK_GPU_ENABLE=1`; older ones stop with "Duplicate
GPU detected". Where torch brings an older one, put a newer library before it: `LD_PRELOAD=/path/to/libnccl.so.2`.
Ranks that share a GPU take turns on it, so their results say what is computed, never how fast.
"""

import os


def local_rank(rank: int, gpus: int) -> int:
    """The GPU that a rank uses, and NCCL's leave to share it. Before torch.distributed starts.

    Args:
        rank: This process among those of the host.
        gpus: GPUs of the host, at least one.
    """
    if rank >= gpus:
        os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    return rank % gpus
