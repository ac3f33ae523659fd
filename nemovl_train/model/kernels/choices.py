"""Which configuration Triton's autotuner chose for each of mamba-ssm's kernels, to be stored and handed on.

Tuning times about 200 configurations, 80 to 105 s a process. Triton can keep timings itself (TRITON_CACHE_AUTOTUNING),
but its key is the architecture, not the GPU, and every rank would still tune, at the same time as all others, and could
choose otherwise than they: the last bits of a result would depend on the rank.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from triton.runtime.autotuner import Autotuner, Config

Choices = dict[str, list[dict[str, Any]]]
"""By kernel: `key` (what the autotuner looks up: sizes and dtypes) and `config` (block sizes, warps, stages)."""


def tuned_kernels() -> dict[str, Autotuner]:
    """mamba-ssm's kernels that have a choice, by module and name. Only where it is installed."""
    kernels = importlib.import_module("mamba_ssm.ops.triton")
    found = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        if info.ispkg:
            continue
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, kernel in vars(module).items():
            if isinstance(kernel, Autotuner) and len(kernel.configs) > 1:
                found[f"{info.name}.{name}"] = kernel
    return found


def choices_of(kernels: Mapping[str, Autotuner]) -> Choices:
    """What the kernels of this process have chosen so far."""
    return {
        name: [{"key": list(key), "config": config.all_kwargs()} for key, config in kernel.cache.items()]
        for name, kernel in kernels.items()
        if kernel.cache
    }


def use_choices(kernels: Mapping[str, Autotuner], choices: Choices) -> int:
    """Let kernels take choices for the keys that they are for. A configuration that a kernel has not got is left out.

    Returns:
        Choices taken.
    """
    taken = 0
    for name, rows in choices.items():
        kernel = kernels.get(name)
        for row in rows if kernel is not None else ():
            assert kernel is not None
            if (config := _configuration(kernel, row["config"])) is not None:
                kernel.cache[tuple(row["key"])] = config
                taken += 1
    return taken


def _configuration(kernel: Autotuner, wanted: dict[str, Any]) -> Config | None:
    return next((config for config in kernel.configs if config.all_kwargs() == wanted), None)
