"""For Python processes that `stage_steps.py` starts through a launcher. Python imports this file by its name.

Leaves each of mamba-ssm's autotuned kernels one configuration (`triton_choices.py`), which saves a process 80 s, and
writes the peak of PyTorch's allocations when a process that used a GPU ends.
"""

import atexit
import importlib.util
import json
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path

KERNELS = "mamba_ssm.ops.triton.ssd_combined"
"""Imports all modules with kernels that are tuned."""
PEAKS = "NEMOVL_BENCHMARK_PEAKS"
"""Environment variable: folder for the peaks."""


class _Chosen(Loader):
    """The module's own loader, and then the choices."""

    def __init__(self, own):
        self.own = own

    def create_module(self, spec):
        return self.own.create_module(spec)

    def exec_module(self, module):
        self.own.exec_module(module)
        sys.path.append(str(Path(__file__).resolve().parents[1]))
        from triton_choices import use_choices

        use_choices()


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != KERNELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Chosen(spec.loader)
        return spec


def _write_peak() -> None:
    torch = sys.modules.get("torch")
    if torch is None or "RANK" not in os.environ or not torch.cuda.is_initialized():
        return
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    free, total = torch.cuda.mem_get_info()
    peaks["device_used"] = total - free
    Path(os.environ[PEAKS], f"{os.environ['RANK']}.json").write_text(json.dumps(peaks))


if PEAKS in os.environ:
    sys.meta_path.insert(0, _Finder())
    atexit.register(_write_peak)
