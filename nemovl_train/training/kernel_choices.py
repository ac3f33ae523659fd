"""Kernels are tuned by one rank, once for a kind of GPU: the other ranks and later starts are told what it chose."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemovl_train.checkpoint.files import write_whole
from nemovl_train.model.kernels.dispatch import has_kernels
from nemovl_train.model.mixer import PackedMambaMixer
from nemovl_train.parallel.agree import on_first_rank

if TYPE_CHECKING:
    from nemovl_train.model.kernels.choices import Choices
    from nemovl_train.model.vlm import NemotronVL
    from nemovl_train.parallel.layout import Layout

log = logging.getLogger(__name__)


def tune_once(model: NemotronVL, layout: Layout, seq_length: int) -> None:
    """Settle the choices of the Mamba layers' kernels at this run's sizes. Collective; without such kernels, nothing.

    Args:
        model: The built model; all of its Mamba layers are alike.
        layout: Owner of the device and of the groups.
        seq_length: Tokens of a pack.
    """
    mixers = [module for module in model.modules() if isinstance(module, PackedMambaMixer)]
    if layout.device.type != "cuda" or not mixers or not has_kernels(layout.device):
        return
    from nemovl_train.model.kernels.choices import tuned_kernels, use_choices

    kernels = tuned_kernels()
    path = choices_file(torch.cuda.get_device_name(layout.device))
    tokens = seq_length // layout.cp
    chosen = on_first_rank(lambda: settle(kernels, path, lambda: mixers[0].rehearse(tokens)))
    use_choices(kernels, chosen)


def settle(kernels: dict[str, Any], path: Path, rehearse: Callable[[], None]) -> Choices:
    """Take stored choices, tune what they leave open, and store what is new.

    Args:
        kernels: As of `tuned_kernels`.
        path: Where choices are stored. A file that cannot be read or written costs time, not the run.
        rehearse: Runs every kernel at the run's sizes.
    """
    from nemovl_train.model.kernels.choices import choices_of, use_choices

    taken = use_choices(kernels, _stored(path))
    began, before = time.perf_counter(), choices_of(kernels)
    rehearse()
    found = choices_of(kernels)
    new = sum(len(rows) for rows in found.values()) - sum(len(rows) for rows in before.values())
    if new:
        log.info("tuned %d kernels in %.0f s; their settings are kept in %s", new, time.perf_counter() - began, path)
        _store(path, found)
    else:
        log.info("%d kernel settings from %s", taken, path)
    return found


def choices_file(gpu: str) -> Path:
    """The file for a type of GPU and these versions of Triton and mamba-ssm, in the user's cache folder."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = re.sub(r"[^A-Za-z0-9]+", "_", gpu)
    return root / "nemovl" / "kernels" / f"{kind}-triton{version('triton')}-mamba_ssm{version('mamba-ssm')}.json"


def _stored(path: Path) -> Choices:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(name): [{"key": list(row["key"]), "config": dict(row["config"])} for row in rows]
            for name, rows in found.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read and is made again (%s)", path, error)
        return {}


def _store(path: Path, choices: Choices) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(choices, indent=1))
    except OSError as error:
        log.warning("%s cannot be written, so that the next start tunes again (%s)", path, error)
