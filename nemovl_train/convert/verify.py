"""Proves an exported folder: inventory, bitwise round trip, reload in a clean process, logits against our model.

Writes `verification.json` and `verification.md` beside the weights.
"""

import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

from nemovl_train.checkpoint.files import sha256, write_whole
from nemovl_train.convert.disk import explain_writes
from nemovl_train.convert.fp8 import quantize
from nemovl_train.convert.hf_export import MANIFEST
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.lazy import Tensors
from nemovl_train.convert.mapping import hf_tensors
from nemovl_train.convert.names import constant_names, is_llama, table
from nemovl_train.convert.tensor_files import raw_bytes, read_json
from nemovl_train.exceptions import ConversionError

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
_LEFT_OUT = "not compared"
PROCESS_BYTES = 2 * 2**30
"""What a process takes before it has a model."""
TIMEOUT_S = 3600
_COPY_IT = "the card is written beside the weights; copy the folder to where it can be, and verify the copy"
PACKAGES = ("nemovl", "torch", "transformers", "safetensors", "megatron-core")
# A clean process inherits only this: no tokens, no launcher's ranks, no Hugging Face settings.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass
class Check:
    """Outcome of one check; `detail` holds what was measured, or what is wrong."""

    name: str
    ok: bool = True
    detail: dict[str, Any] = field(default_factory=dict)


def verify(
    hf_dir: Path, *, reference: Path | None = None, tolerance: float = TOLERANCE, logits: bool | None = None
) -> dict[str, Any]:
    """Verify a folder and write its verification card.

    All checks but the last take a tensor at a time, whatever the model's size. Logits take Transformers' model, then
    ours, whole and in float32.

    Args:
        hf_dir: Folder of a VLM, a text model or a tower.
        reference: Checkpoint, stage or run that the folder was exported from; every tensor is then compared with it
            bitwise.
        tolerance: Largest absolute difference of any logit or feature, both sides in float32.
        logits: Whether to compare logits; None does where the machine has the memory, and else says so on the card.

    Returns:
        The card: `ok`, `kind`, `tensors`, `parameters`, `largest_difference`, `checks`, `versions`, `command`, `date`.

    Raises:
        ConversionError: The folder cannot be written, or the disk is full.
    """
    with explain_writes(hf_dir, _COPY_IT):
        tempfile.TemporaryFile(dir=hf_dir).close()  # asked before the long work, not after it
    checks: list[Check] = []
    card: dict[str, Any] = {
        "ok": False,
        "folder": hf_dir.resolve().name,
        # Names, not paths: the card travels with the folder.
        "command": f"nemovl convert verify {hf_dir.resolve().name}"
        + (f" --reference {reference.name}" if reference else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": _versions(),
        "tolerance": tolerance,
    }
    with _check("inventory", checks) as inventory:
        folder = HFFolder(hf_dir)
        card |= _counts(folder)
        inventory.detail = {"number format": str(folder.dtype).removeprefix("torch.")}
    if inventory.ok:
        with _check("files", checks) as files:
            _check_files(hf_dir, files)
        with _check("round trip", checks) as trip:
            _check_round_trip(folder, trip)
        if trip.ok and reference is not None:
            with _check("reference", checks) as same:
                _check_reference(folder, reference, same)
        if trip.ok:
            why_not = _why_no_logits(folder, card["parameters"], logits)
            _check_in_clean_processes(hf_dir, folder, checks, tolerance, why_not)
    card["checks"] = [vars(c) for c in checks]
    card["largest_difference"] = max(
        (v for c in checks if c.name == "logits" for v in c.detail.get("largest difference", {}).values()), default=None
    )
    card["ok"] = all(c.ok for c in checks)
    with explain_writes(hf_dir, _COPY_IT):
        write_whole(hf_dir / "verification.json", json.dumps(card, indent=1) + "\n")
        write_whole(hf_dir / "verification.md", card_text(card))
    return card


@contextmanager
def _check(name: str, checks: list[Check]) -> Iterator[Check]:
    """Adds a check to the list. A user's error is its outcome; any other is a bug of ours and passes through."""
    check = Check(name)
    checks.append(check)
    try:
        yield check
    except ConversionError as error:
        check.ok = False
        check.detail["error"] = str(error)


def _counts(folder: HFFolder) -> dict[str, Any]:
    constants = set(constant_names(folder.kind).values())
    sizes = [torch.Size(s.shape).numel() for n, s in folder.files.specs.items() if n not in constants]
    return {
        "kind": folder.kind,
        "model": folder.config.name,
        "tensors": len(folder.files.specs),
        "parameters": sum(sizes),
    }


def _check_files(hf_dir: Path, check: Check) -> None:
    if not (hf_dir / MANIFEST).is_file():
        check.detail["note"] = f"no {MANIFEST}: the folder was made elsewhere, there are no hashes to compare with"
        return
    listed: Mapping[str, str] = read_json(hf_dir / MANIFEST)["files"]
    wrong = [n for n, h in listed.items() if not (hf_dir / n).is_file() or sha256(hf_dir / n) != h]
    check.detail["files"] = len(listed)
    if wrong:
        raise ConversionError(f"changed or missing since the export: {', '.join(wrong)}; export again")


def _check_round_trip(folder: HFFolder, check: Check) -> None:
    """Folder -> canonical -> folder, tensor by tensor, compared as bytes."""
    entries = table(folder.config, folder.kind)
    back = hf_tensors(folder.tensors(), entries, state_dtype=folder.state_dtype)
    count = 0
    for name, tensor in back:
        if raw_bytes(tensor) != raw_bytes(folder.files.read(name)):
            raise ConversionError(f"{name} changes on the way to canonical form and back")
        count += 1
    check.detail["tensors equal bitwise"] = count


def _check_reference(folder: HFFolder, reference: Path, check: Check) -> None:
    """The folder holds the checkpoint's values, tensor by tensor, compared as bytes."""
    from nemovl_train.convert.checkpoints import checkpoint_tensors

    info, tensors = checkpoint_tensors(reference)
    config = info.config
    check.detail = dict(info.facts)
    if config.language != folder.config.language or config.parts != folder.config.parts:
        raise ConversionError(f"{reference} holds another model than the folder")
    entries = table(folder.config, folder.kind)
    fp8 = {entry.ours for entry in entries if folder.files.fp8.keys() & {*entry.hf}}
    if fp8:
        check.detail["FP8 weights equal bitwise to the reference's, quantised again"] = _check_fp8(
            folder, hf_tensors(tensors, entries, dtype=folder.dtype, state_dtype=folder.state_dtype), reference
        )
    whole = folder.tensors()
    for name in [n for n in whole.specs if n not in fp8]:
        tensor = whole.read(name)
        if name not in tensors.specs or raw_bytes(tensors.read(name).to(tensor.dtype)) != raw_bytes(tensor):
            raise ConversionError(f"{name} differs from {reference}")


def _check_fp8(folder: HFFolder, expected: Tensors, reference: Path) -> int:
    """FP8 weights and scales are those that the reference's weights give, byte by byte; returns how many there are."""
    for name, scale in folder.files.fp8.items():
        values, scales = quantize(expected.read(name), folder.files.stored[scale].dtype)
        for found, wanted in ((name, values), (scale, scales)):
            if raw_bytes(folder.files.read_stored(found)) != raw_bytes(wanted):
                raise ConversionError(f"{found} is not what {reference} gives in FP8")
    return len(folder.files.fp8)


def _why_no_logits(folder: HFFolder, parameters: int, asked: bool | None) -> str | None:
    """Why logits are not to be compared; None where they are."""
    if asked is not None:
        return None if asked else "left out as asked for (--no-logits)"
    # The float32 model, and beside it the tensors that go into it.
    wanted = parameters * (4 + folder.dtype.itemsize) + PROCESS_BYTES
    free = psutil.virtual_memory().available
    if wanted <= free:
        return None
    why = f"they take about {wanted / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free (--logits tries)"
    log.warning("%s: logits are not compared: %s", folder.path, why)
    return why


def _check_in_clean_processes(
    hf_dir: Path, folder: HFFolder, checks: list[Check], tolerance: float, why_not: str | None
) -> None:
    scratch = Path(tempfile.gettempdir())
    with (
        explain_writes(scratch, "set TMPDIR to a folder that can be written"),
        tempfile.TemporaryDirectory(prefix="nemovl_verify_", dir=scratch) as text,
    ):
        work = Path(text)
        with _check("reload", checks) as reload:
            run_clean("nemovl_train.convert.reload_check", hf_dir, work, *(["keys"] if why_not else []))
            reports = read_json(work / "theirs.json")["reports"]
            reload.detail = {"classes": reports}
            _compare_keys(reports, expected_reports(folder))
        if reload.ok and why_not:
            checks.append(Check("logits", detail={_LEFT_OUT: why_not}))
        elif reload.ok:
            with _check("logits", checks) as logits:
                run_clean("nemovl_train.convert.ours_check", hf_dir, work)
                differences = _differences(work)
                logits.detail = {"largest difference": differences}
                too_large = {n: d for n, d in differences.items() if not d <= tolerance}
                if too_large:
                    raise ConversionError(f"differences above {tolerance}: {too_large}")


def run_clean(module: str, hf_dir: Path, work: Path, *words: str) -> None:
    """Run one of our modules in a new process with a minimal environment and no network.

    Args:
        module: Its name.
        hf_dir: Folder that it looks at.
        work: Folder for its results.
        words: Further arguments.

    Raises:
        ConversionError: It failed; the end of its error output is in the message.
    """
    package_root = Path(__file__).resolve().parents[2]
    environment = {k: os.environ[k] for k in KEPT_VARIABLES if k in os.environ}
    environment |= {
        "PYTHONPATH": str(package_root),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(work / "hf_home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    # -P: the working folder is not on the module path, so no file there can pose as a module.
    command = [sys.executable, "-P", "-m", module, str(hf_dir.resolve()), str(work), *words]
    done = subprocess.run(
        command, env=environment, cwd=work, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise ConversionError(f"{module} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def expected_reports(folder: HFFolder) -> dict[str, dict[str, list[str]]]:
    """What each Transformers class must report for this folder: everything else is a defect.

    The Omni class builds an embedder for pairs of video frames that this architecture lacks, and keeps the tower's
    summary tokens as a buffer; it drops the pixel conditioner, because its processor normalises.
    """
    held = {short for short, name in constant_names(folder.kind).items() if name in folder.files.specs}
    conditioner = ["input_conditioner.norm_mean", "input_conditioner.norm_std"]
    out: dict[str, dict[str, list[str]]] = {}
    if folder.kind != "vision":
        out["language"] = {"missing_keys": [], "unexpected_keys": []}
    if folder.kind != "language":
        missing = [n for n in [*conditioner, "summary_idxs"] if n not in held]
        out["vision"] = {"missing_keys": missing, "unexpected_keys": []}
    if folder.kind == "vlm" and not is_llama(folder.config.language):
        out["vlm"] = {
            "missing_keys": ["vision_model.embeddings.video_patch_projection.weight"]
            + ([] if "summary_idxs" in held else ["vision_model.summary_idxs"]),
            "unexpected_keys": [f"vision_model.{n}" for n in conditioner if n in held],
        }
    return out


def _compare_keys(reports: Mapping[str, Any], expected: Mapping[str, Mapping[str, list[str]]]) -> None:
    problems = []
    for part, wanted in expected.items():
        found = reports[part]
        for key in sorted(set(found) | set(wanted)):
            # Besides missing and unexpected keys Transformers lists mismatched shapes and errors: there must be none.
            if sorted(found.get(key, [])) != sorted(wanted.get(key, [])):
                problems.append(f"{part}: {key} are {found.get(key, [])}, expected {wanted.get(key, [])}")
    if problems:
        raise ConversionError("\n".join(problems))


def _differences(work: Path) -> dict[str, float]:
    with (
        safe_open(str(work / "ours.safetensors"), "pt") as ours,
        safe_open(str(work / "theirs.safetensors"), "pt") as theirs,
    ):
        if set(ours.keys()) != set(theirs.keys()):
            raise ConversionError(f"only one side computed {sorted(set(ours.keys()) ^ set(theirs.keys()))}")
        out = {}
        for name in sorted(ours.keys()):
            mine, other = ours.get_tensor(name), theirs.get_tensor(name)
            if mine.shape != other.shape:
                raise ConversionError(f"{name}: ours is {list(mine.shape)}, Transformers' is {list(other.shape)}")
            out[name] = float((mine - other).abs().max())
    return out


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # PackageNotFoundError: run from a source tree that is not installed
            found[package] = "not installed"
    return found


def card_text(card: Mapping[str, Any]) -> str:
    """The verification card as Markdown."""
    lines = [
        f"# Verification of {card['folder']}: {'passed' if card['ok'] else 'FAILED'}",
        "",
        f"`{card['command']}` on {card['date']}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {k} | {card[k]} |" for k in ("kind", "model", "tensors", "parameters") if k in card),
        f"| largest difference | {card['largest_difference']} (allowed {card['tolerance']}) |",
        *(f"| {k} | {v} |" for k, v in card["versions"].items()),
        "",
        "| check | result | |",
        "|---|---|---|",
    ]
    for check in card["checks"]:
        detail = json.dumps(check["detail"]).replace("|", "\\|")
        result = "left out" if _LEFT_OUT in check["detail"] else "ok" if check["ok"] else "FAILED"
        lines.append(f"| {check['name']} | {result} | {detail} |")
    return "\n".join(lines) + "\n"
