"""An export that was cut off is continued, and only with what is still right."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from nemovl_train.convert import hf_export
from nemovl_train.convert.hf_export import PROGRESS, export_canonical
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors


class Counted:
    """Counts the shards that are written, and breaks at one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, stop_at: int | None = None, error: object = None) -> None:
        self.files: list[str] = []
        write = hf_export.write_shard

        def counted(path: Path, *args: object) -> object:
            if stop_at is not None and len(self.files) == stop_at:
                path.write_bytes(b"half of a shard")
                raise error
            self.files.append(path.name)
            return write(path, *args)

        monkeypatch.setattr(hf_export, "write_shard", counted)


def export(out: Path, *, identity: str | None = "a", **options) -> Path:
    options = {"tensors": random_tensors(kind="vision"), "dtype": None} | options
    return export_canonical(
        options["tensors"],
        CONFIG,
        out,
        kind="vision",
        tokenizer=None,
        card={},
        identity=identity,
        dtype=options["dtype"],
        max_shard_bytes=20_000,
    )


def cut_off(out: Path, monkeypatch: pytest.MonkeyPatch, error: object = None, **options) -> Path:
    with monkeypatch.context() as patch:
        Counted(patch, stop_at=2, error=error or KeyboardInterrupt())
        with pytest.raises((KeyboardInterrupt, ConversionError)):
            export(out, **options)
    assert not out.exists()
    return out.parent / f".{out.name}.partial"


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_complete_shards_are_kept(error: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights(export(tmp_path / "whole"))
    partial = cut_off(tmp_path / "x", monkeypatch, error)
    assert len(json.loads((partial / PROGRESS).read_text())["shards"]) == 2
    counted = Counted(monkeypatch)
    out = export(tmp_path / "x")
    shards = [name for name in whole if name.endswith(".safetensors")]
    assert sorted(counted.files) == sorted(shards)[2:]
    assert weights(out) == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole", "x"]


def test_a_kept_shard_that_changed_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights(export(tmp_path / "whole"))
    partial = cut_off(tmp_path / "x", monkeypatch)
    first = sorted(partial.glob("*.safetensors"))[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    counted = Counted(monkeypatch)
    assert weights(export(tmp_path / "x")) == whole
    assert first.name in counted.files


@pytest.mark.parametrize("other", [{"identity": "b"}, {"identity": None}, {"dtype": torch.bfloat16}])
def test_other_weights_start_anew(other: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(tmp_path / "x", monkeypatch)
    counted = Counted(monkeypatch)
    out = export(tmp_path / "x", **other)
    assert len(counted.files) == len(list(out.glob("*.safetensors")))


def test_without_an_identity_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cut_off(tmp_path / "x", monkeypatch, identity=None).exists()


def test_wrong_weights_leave_nothing(tmp_path: Path) -> None:
    tensors = random_tensors(kind="vision")
    tensors.pop("vision_model.class_token")
    with pytest.raises(ConversionError, match=r"missing vision_model\.class_token"):
        export(tmp_path / "x", tensors=tensors)
    assert list(tmp_path.iterdir()) == []
