"""One configuration for each of mamba-ssm's autotuned kernels, so that benchmarks start in seconds and alike.

Tuning all of them cold takes 80 to 105 s a process. These were chosen by mamba-ssm 2.3.2.post1's own autotuning on an
H100 in bf16 at the 12B's shapes (head width 80, state 128, chunk 128; 16,384 packed tokens, 32 heads, 2 groups).
"""

import importlib
from typing import Any

_M64 = {"BLOCK_SIZE_M": 64}
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "ssd_chunk_state": {
        "_chunk_cumsum_bwd_kernel": {"BLOCK_SIZE_H": 8},
        "_chunk_cumsum_fwd_kernel": {"BLOCK_SIZE_H": 16},
        "_chunk_state_bwd_db_kernel": _M64 | {"BLOCK_SIZE_N": 64},
        "_chunk_state_fwd_kernel": {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32},
    },
    "ssd_chunk_scan": {
        "_chunk_scan_bwd_dc_kernel": _M64 | {"BLOCK_SIZE_N": 64},
        "_chunk_scan_bwd_dcb_kernel": _M64 | {"BLOCK_SIZE_N": 64},
        "_chunk_scan_bwd_ddAcs_stable_kernel": _M64 | {"BLOCK_SIZE_N": 32},
        "_chunk_scan_bwd_dstates_kernel": _M64 | {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32},
        "_chunk_scan_bwd_dz_kernel": {"BLOCK_SIZE_M": 32},
        "_chunk_scan_fwd_kernel": _M64 | {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32},
    },
    "ssd_bmm": {
        "_bmm_chunk_bwd_kernel": _M64 | {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_CS": 32},
        "_bmm_chunk_fwd_kernel": {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32},
    },
    "ssd_state_passing": {
        "_state_passing_bwd_kernel": {"BLOCK_SIZE": 256},
        "_state_passing_fwd_kernel": {"BLOCK_SIZE": 256},
    },
    "ssd_combined": {
        "_chunk_scan_chunk_state_bwd_dx_kernel": _M64 | {"BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32},
    },
}


def use_choices() -> None:
    """Leave each kernel its one configuration. Of several with these block sizes the first is taken."""
    for module, kernels in CHOICES.items():
        owner = importlib.import_module(f"mamba_ssm.ops.triton.{module}")
        for name, blocks in kernels.items():
            kernel = getattr(owner, name)
            matching = [c for c in kernel.configs if all(c.kwargs.get(key) == size for key, size in blocks.items())]
            assert matching, f"{module}.{name} has no configuration {blocks}"
            kernel.configs = matching[:1]
