"""`nemovl doctor`: does this machine and installation have what a run needs?"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from nemovl_train.doctor.facts import ask_links, open_file_limit, shared_memory_bytes
from nemovl_train.doctor.judge import MIN_OPEN_FILES, MIN_SHARED_MEMORY
from nemovl_train.exit_codes import ExitCode

REQUIRED = ("torch", "megatron-core", "hydra-core", "transformers", "datasets", "webdataset", "av", "safetensors")
GPU_ONLY = ("transformer-engine", "mamba-ssm", "causal-conv1d")
GIB = 2**30
MIN_MEMORY_GIB = 6.0
MIN_DISK_GIB = 2.0


@dataclass(frozen=True)
class Check:
    """One finding: `status` is ok, warn or fail; `hint` says what to type where there is something to do."""

    name: str
    status: str
    value: str
    hint: str = ""


def run(folder: Path, *, as_json: bool) -> int:
    """Prints all findings.

    Args:
        folder: Where runs would be written.
        as_json: One JSON document instead of a table.

    Returns:
        0, or 1 when a check failed.
    """
    checks = collect(folder)
    if as_json:
        print(json.dumps({"ok": _passed(checks), "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        for check in checks:
            hint = f"  ({check.hint})" if check.hint else ""
            print(f"{check.status:<5}{check.name:<20}{check.value}{hint}")
    return ExitCode.OK if _passed(checks) else ExitCode.FAILED


def collect(folder: Path) -> list[Check]:
    """All findings, in the order in which they are printed."""
    checks = [_python(), _platform(), *_versions(), _guarded("accelerator", _accelerator)]
    if importlib.util.find_spec("torch") and _cuda():
        checks += [_gpu_package(name) for name in GPU_ONLY]
        checks.append(_guarded("links", _links))
    return [*checks, _memory(), _cores(), _open_files(), _shared_memory(), *_folder(folder)]


def _passed(checks: list[Check]) -> bool:
    return all(check.status != "fail" for check in checks)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A broken installation is a finding, not a crash of the tool that looks for it."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}", "reinstall: pip install -e '.[dev]'")


def _python() -> Check:
    good = sys.version_info >= (3, 12)
    return Check("python", "ok" if good else "fail", platform.python_version(), "" if good else "install Python 3.12")


def _platform() -> Check:
    value = f"{platform.system()} {platform.machine()}"
    good = value == "Linux x86_64"
    return Check("platform", "ok" if good else "fail", value, "" if good else "use Linux x86-64, or WSL2 on Windows")


def _versions() -> list[Check]:
    return [_version(name) for name in REQUIRED]


def _version(name: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", "pip install -e '.[dev]'")


def _gpu_package(name: str) -> Check:
    found = _version(name)
    return found if found.status == "ok" else Check(name, "warn", "not installed", "pip install 'nemovl[gpu]'")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _accelerator() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("accelerator", "ok", "none, runs use the CPU")
    count = torch.cuda.device_count()
    properties: Any = torch.cuda.get_device_properties(0)
    value = f"{count} x {properties.name}, {properties.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}"
    return Check("accelerator", "ok", value)


def _memory() -> Check:
    free = psutil.virtual_memory().available / GIB
    status = "ok" if free >= MIN_MEMORY_GIB else "warn"
    return Check("free memory", status, f"{free:.1f} GiB", "" if status == "ok" else "the demo wants 6 GiB")


def _links() -> Check:
    """Where some pairs of GPUs have NVLink, a pair without it is a fault and not a kind of machine."""
    links = ask_links()
    value = ", ".join(f"{count} pairs over {kind}" for kind, count in links.items()) or "one GPU"
    mixed = "NVLink" in links and len(links) > 1
    return Check("links", "fail" if mixed else "ok", value, "a link is down: have the node looked at" if mixed else "")


def _open_files() -> Check:
    limit = open_file_limit()
    good = limit >= MIN_OPEN_FILES
    return Check("open files", "ok" if good else "warn", str(limit), "" if good else f"ulimit -n {MIN_OPEN_FILES}")


def _shared_memory() -> Check:
    size = shared_memory_bytes()
    good = size >= MIN_SHARED_MEMORY
    hint = "" if good else "data workers hand packs over there: a container wants --shm-size=16g"
    return Check("shared memory", "ok" if good else "warn", f"{size / GIB:.1f} GiB", hint)


def _cores() -> Check:
    return Check("cores", "ok", str(len(os.sched_getaffinity(0))))


def _folder(folder: Path) -> list[Check]:
    """Looks at the nearest folder that exists: nothing is created by looking."""
    existing = folder.absolute()
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    writable = os.access(existing, os.W_OK | os.X_OK)
    free = shutil.disk_usage(existing).free / GIB
    hint = "" if writable else "choose another with run.root=FOLDER"
    enough = free >= MIN_DISK_GIB
    return [
        Check("run folder", "ok" if writable else "fail", f"{folder}{'' if writable else ' not'} writable", hint),
        Check("free disk", "ok" if enough else "warn", f"{free:.1f} GiB", "" if enough else "checkpoints need room"),
    ]
