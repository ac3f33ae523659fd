"""What GPUs and links can do, for plans. Measured rates say so; the others are marked as assumed."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One type of GPU.

    Attributes:
        name: As in messages.
        memory_bytes: Memory of the device.
        outside_pool_bytes: Memory that CUDA contexts, NCCL and loaded kernels take beside PyTorch's pool.
        peak_flops: Dense bfloat16 FLOP/s of the data sheet: what MFU counts against.
        gemm_flops: FLOP/s of large matrix products inside a training step.
        attention_flops: FLOP/s of the attention core, causal work counted at half the square, forward and backward.
        copy_bytes: Device memory traffic a second, of a plain copy.
        nvlink_bytes: Bytes a second of NCCL collectives inside a node, waiting for the slowest rank included.
        host_link_bytes: Bytes a second that one direction carries between the device and pinned host memory.
        measured: False when the rates follow from another type's by the data sheet's ratios.
    """

    name: str
    memory_bytes: int
    outside_pool_bytes: int
    peak_flops: float
    gemm_flops: float
    attention_flops: float
    copy_bytes: float
    nvlink_bytes: float
    host_link_bytes: float
    measured: bool


_PCIE_4, _PCIE_5 = 25e9, 50e9
"""Assumed, not measured: four fifths of what 16 lanes carry in one direction, 31.5 and 63 GB/s by the standard (16 and
32 GT/s a lane, 128 of 130 bits). The data sheets give both directions: 64 GB/s of the A100, 128 of the H100."""

GPU_TYPES = {
    # Rates from a profile of megatron-core training the 12B language model on four of them (calibration.py): GEMMs at
    # 732 TFLOP/s; attention 630 forward, 530 backward with its 2.5 times the work, which is 476 over both passes;
    # 8 to 10 GiB outside the pool. NVLink: over the 227 of 352 ms of
    # NCCL during which nothing else ran (an all-reduce alone reached 355 GB/s).
    "h100_80gb": Gpu(
        name="H100 80 GB",
        memory_bytes=81559 * 2**20,
        outside_pool_bytes=9 * GIB,
        peak_flops=989e12,
        gemm_flops=732e12,
        attention_flops=476e12,
        copy_bytes=3.0e12,
        nvlink_bytes=344e9,
        host_link_bytes=_PCIE_5,
        measured=True,
    ),
    # The same chip with more and faster memory: 4.8 against 3.35 TB/s on the data sheets.
    "h200_141gb": Gpu(
        name="H200 141 GB",
        memory_bytes=143771 * 2**20,
        outside_pool_bytes=9 * GIB,
        peak_flops=989e12,
        gemm_flops=732e12,
        attention_flops=476e12,
        copy_bytes=4.3e12,
        nvlink_bytes=344e9,
        host_link_bytes=_PCIE_5,
        measured=False,
    ),
    # Data sheet, dense bfloat16 312 TFLOP/s, 2.04 TB/s, NVLink 600 against 900 GB/s; the H100's shares of those.
    "a100_80gb": Gpu(
        name="A100 80 GB",
        memory_bytes=81920 * 2**20,
        outside_pool_bytes=9 * GIB,
        peak_flops=312e12,
        gemm_flops=231e12,
        attention_flops=150e12,
        copy_bytes=1.83e12,
        nvlink_bytes=229e9,
        host_link_bytes=_PCIE_4,
        measured=False,
    ),
    # Data sheet of the eight-GPU board: dense bfloat16 2.25 PFLOP/s, 180 GB and 8 TB/s a GPU, NVLink 1,800 GB/s.
    "b200_180gb": Gpu(
        name="B200 180 GB",
        memory_bytes=180 * 10**9,
        outside_pool_bytes=9 * GIB,
        peak_flops=2250e12,
        gemm_flops=1665e12,
        attention_flops=1083e12,
        copy_bytes=7.2e12,
        nvlink_bytes=688e9,
        host_link_bytes=_PCIE_5,
        measured=False,
    ),
}
"""By the value of `cluster.gpu`."""

NETWORK_BYTES = 45e9
"""Bytes a second and GPU between nodes. Assumed, not measured: one 400 Gb/s adapter for each GPU at 90 percent."""

STORAGE_BYTES = 2e9
"""Bytes a second that all nodes together write to shared storage. Assumed, not measured."""
