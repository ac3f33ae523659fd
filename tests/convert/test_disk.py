"""A disk that refuses: an error that says what to do, and nothing half written under the final name."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemovl_train.convert import hf_export
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.verify import verify
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors

REFUSALS = [
    (errno.ENOSPC, "no space left.*free space and run the same command again"),
    (errno.EDQUOT, "no space left.*free space and run the same command again"),
    (errno.EROFS, "is not writable.*choose another --out"),
    (errno.EACCES, "is not writable.*choose another --out"),
    (errno.EPERM, "is not writable.*choose another --out"),
]


def refuse(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def export(out: Path, **options: Any) -> Path:
    tensors = random_tensors(kind="vision").items()
    return export_canonical(tensors, CONFIG, out, kind="vision", tokenizer=None, card={}, **options)


@pytest.mark.parametrize(("number", "words"), REFUSALS)
@pytest.mark.parametrize("where", ["write", "publish"])
def test_export(where: str, number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_export, "write_shard" if where == "write" else "_publish", refuse(number))
    with pytest.raises(ConversionError, match=words) as error:
        export(tmp_path / "x")
    assert "checkpoints" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_take_its_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "x")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        return refuse(errno.EACCES)() if self.suffix == ".partial" else rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ConversionError, match="choose another --out"):
        export(tmp_path / "x", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_export_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConversionError, match="is a file, not a folder: choose another --out"):
        export(tmp_path / "file" / "x")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_verify(number: int, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(folders["vision"], tmp_path / "x")
    (folder / "model.safetensors").write_bytes(b"")  # fails at once: the card is written all the same
    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.setattr(os, "replace", refuse(number))
    with pytest.raises(ConversionError, match="free space" if number == errno.ENOSPC else "verify the copy"):
        verify(folder)
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("where", ["folder", "seal", "tokenizer"])
def test_import(
    where: str, number: int, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemovl_train.checkpoint import sealed
    from nemovl_train.convert.checkpoints import import_checkpoint

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    owner, name = {"folder": (Path, "mkdir"), "seal": (sealed, "fsync"), "tokenizer": (shutil, "copyfile")}[where]
    monkeypatch.setattr(owner, name, refuse(number))
    with pytest.raises(ConversionError, match="free space" if number == errno.ENOSPC else "not writable"):
        import_checkpoint(folders["language"], tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
