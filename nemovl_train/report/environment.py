"""What a run ran on: versions, machine, command, source. Imports none of the packages it names."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nemovl_train
from nemovl_train.config.dump import redact

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
    "tokenizers",
    "datasets",
    "webdataset",
    "av",
    "hydra-core",
)


def collect_environment() -> dict[str, Any]:
    """Describe this process, for `environment.json`.

    Returns:
        `nemovl`, `python`, one entry per installed package of `PACKAGES` (dashes as underscores), `platform`,
        `cpu_count`, `device`, `processes`, `command`, `git` (commit and whether files differ from it; None
        outside a checkout) and `date`.
    """
    return {
        "nemovl": nemovl_train.__version__,
        "python": platform.python_version(),
        **{name.replace("-", "_"): found for name in PACKAGES if (found := _version(name))},
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "device": _devices(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "command": _command(sys.argv),
        "git": _git(Path(nemovl_train.__file__).parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record_environment(run_folder: Path) -> None:
    """Write `environment.json` once per run: the first process of its first start does, a restart keeps it.

    A folder that cannot be written is left to the run itself, which says what to do about it.

    Args:
        run_folder: `runs/NAME`; made when missing.
    """
    if os.environ.get("RANK", "0") != "0" or (run_folder / "environment.json").exists():
        return
    with contextlib.suppress(OSError):
        run_folder.mkdir(parents=True, exist_ok=True)
        write_environment(run_folder)


def write_environment(run_folder: Path) -> Path:
    """Write `RUN/environment.json` in one move; for the first process of a run.

    Args:
        run_folder: `runs/NAME`.

    Returns:
        The file.

    Raises:
        OSError: The folder cannot be written.
    """
    path = run_folder / "environment.json"
    work = path.with_suffix(".tmp")
    work.write_text(json.dumps(collect_environment(), indent=1) + "\n", encoding="utf-8")
    work.replace(path)
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _command(arguments: list[str]) -> str:
    """The command line without the path of the program, and without values that look like secrets."""
    words = [Path(arguments[0]).name, *arguments[1:]] if arguments else []
    return shlex.join(_without_secret(word) for word in words)


def _without_secret(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}={redact(value, key.rpartition('.')[2])}" if equals else redact(word)


def _devices() -> str:
    """Names of the GPUs, as the driver's own tool gives them, or the processor's."""
    names = _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()
    if names:
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"CPU, {model.group(1).strip()}" if model else f"CPU, {platform.machine()}"


def _git(package: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds the package."""
    git = ["git", "-C", str(package)]
    # An installed package may lie inside someone else's checkout; only a tracked file makes it ours.
    if not _output([*git, "ls-files", "__init__.py"]):
        return None
    commit = _output([*git, "rev-parse", "HEAD"])
    return {"commit": commit, "changed_files": bool(_output([*git, "status", "--porcelain"]))} if commit else None


def _output(command: list[str]) -> str:
    """Standard output of a command; empty when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
