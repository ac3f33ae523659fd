"""The whole proof on a tiny VLM, and that it fails when it should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemovl_train.convert import verify as verifying
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.verify import Check, _check_reference, verify
from nemovl_train.convert.verify import run_clean as clean

from .tiny import CONFIG


def test_exported_vlm_passes(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["vlm"], tmp_path / "x")
    card = verify(tmp_path / "x")
    assert card["ok"], card["checks"]
    assert [c["name"] for c in card["checks"]] == ["inventory", "files", "round trip", "reload", "logits"]
    assert set(card["checks"][-1]["detail"]["largest difference"]) == {
        "text_logits",
        "mixed_logits",
        "visual_tokens",
        "tower_features",
    }
    assert card["largest_difference"] <= 1e-4
    assert json.loads((tmp_path / "x" / "verification.json").read_text()) == card
    assert "passed" in (tmp_path / "x" / "verification.md").read_text()


def test_logits_are_compared_where_there_is_room_or_where_asked(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = HFFolder(folders["language"])
    room = 10**9 * (4 + 4) + verifying.PROCESS_BYTES
    for free, fits in ((room - 1, False), (room, True)):
        monkeypatch.setattr(verifying.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert (verifying._why_no_logits(folder, 10**9, None) is None) == fits
        assert verifying._why_no_logits(folder, 10**9, True) is None
        assert "--no-logits" in verifying._why_no_logits(folder, 10**9, False)


@pytest.mark.slow
def test_a_model_that_memory_cannot_hold_is_verified_without_logits(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders["language"], tmp_path / "x")
    ran = []
    monkeypatch.setattr(verifying.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    monkeypatch.setattr(verifying, "run_clean", lambda *args: (ran.append(args), clean(*args)))
    card = verify(tmp_path / "x")
    assert card["ok"], card["checks"]
    checks = {check["name"]: check["detail"] for check in card["checks"]}
    assert card["largest_difference"] is None
    assert "GiB are free" in checks["logits"]["not compared"]
    assert "| logits | left out | " in (tmp_path / "x/verification.md").read_text()
    assert checks["reload"]["classes"]["language"]["missing_keys"] == []
    assert [args[0] for args in ran] == ["nemovl_train.convert.reload_check"]


def test_damaged_folder_fails_before_any_model_runs(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["language"], tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    card = verify(tmp_path / "x")
    assert not card["ok"]
    assert card["largest_difference"] is None
    errors = {c["name"]: c["detail"].get("error", "") for c in card["checks"]}
    assert "model.safetensors" in errors["files"]
    assert "SHA-256 differs" in errors["round trip"]
    assert "reload" not in errors


def test_reload_process_refuses_code_and_network(folders: dict[str, Path], tmp_path: Path) -> None:
    """The guard of the clean process, tried in one of its own because audit hooks cannot be taken back."""
    (tmp_path / "modeling.py").write_text("")
    script = (
        "import sys, socket; from pathlib import Path; from nemovl_train.convert.guard import refuse_code_from\n"
        f"root = Path({str(tmp_path)!r}); refuse_code_from(root)\n"
        "for attempt in (lambda: open(root / 'modeling.py'), lambda: open(str(root / 'modeling.py')),\n"
        "                lambda: socket.create_connection(('127.0.0.1', 9), timeout=1)):\n"
        "    try: attempt()\n"
        "    except PermissionError: continue\n"
        "    sys.exit('not refused')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kind", ["vlm", "language", "vision"])
def test_folder_to_checkpoint_to_folder_is_bitwise(
    kind: str, folders: dict[str, Path], tmp_path: Path, one_process: None
) -> None:
    from nemovl_train.convert.checkpoints import checkpoint_tensors, export_checkpoint, import_checkpoint

    path = import_checkpoint(folders[kind], tmp_path / "ckpt")
    assert (path / "COMPLETE").is_file()
    info, tensors = checkpoint_tensors(tmp_path / "ckpt")
    assert info.config.language.hybrid_pattern == CONFIG.language.hybrid_pattern or kind == "vision"
    assert all(t.dtype == torch.float32 for _, t in tensors)
    again = export_checkpoint(tmp_path / "ckpt", tmp_path / "again")
    same = Check("reference")
    _check_reference(HFFolder(again), path, same)
    assert same.detail["parent"] == kind
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (folders[kind] / name).read_bytes()


def test_command_line(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from nemovl_train.convert.cli import add_convert_commands

    parser = argparse.ArgumentParser()
    add_convert_commands(parser.add_subparsers())
    args = parser.parse_args(["convert", "import", str(folders["vision"]), "--out", str(tmp_path / "c"), "--json"])
    assert args.run(args) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"].endswith("step_00000000")
    args = parser.parse_args(["convert", "export", str(tmp_path / "c"), "--out", str(tmp_path / "h")])
    assert args.run(args) == 0
    assert "nemovl convert verify" in capsys.readouterr().out
