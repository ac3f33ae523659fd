"""Checkpoints are data: pickles that name code are refused unread, real ones pass."""

import io
import os
import pickle
from pathlib import Path

import pytest
import tiny_runs
import torch
from nemovl_train.checkpoint.plain_metadata import refuse_code
from torch.distributed.checkpoint import filesystem, metadata

from nemovl_train.checkpoint import sealed
from nemovl_train.exceptions import CheckpointError


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def stored(folder: Path, name: str, value: bytes, file: str = "__0_0.distcp") -> Path:
    """A folder whose `.metadata` names one byte object."""
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(value)
    contents = metadata.Metadata(
        state_dict_metadata={name: metadata.BytesStorageMetadata()},
        storage_data={metadata.MetadataIndex(name): filesystem._StorageInfo(file, 0, len(value))},
    )
    (folder / ".metadata").write_bytes(pickle.dumps(contents))
    return folder


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize("params", ["fp32", "bf16"])
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_real_checkpoints_pass(layout, tmp_path: Path, params: str, with_optimizer: bool) -> None:
    from nemovl_train.config.schema import OptimConfig
    from nemovl_train.model.vlm import build_model
    from nemovl_train.training.optimizer import Optimizers

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[params]
    model = build_model(tiny_runs.MODEL, layout, params_dtype=dtype, parts=tiny_runs.MODEL.parts, seed=1)
    options = OptimConfig(lr=1e-3)
    optimizer = Optimizers(model, layout, options, dtype) if with_optimizer else None
    folder = sealed.save(tmp_path, 1, model=model, optimizer=optimizer, state={}, run_id="x")
    refuse_code(folder)
    refuse_code(folder / "sharded")


def test_code_in_the_metadata_is_refused(tmp_path: Path) -> None:
    sentinel = tmp_path / "was_run"
    folder = stored(tmp_path / "c", "a", saved(1))
    contents = pickle.loads((folder / ".metadata").read_bytes())
    contents.planner_data = Malicious(sentinel)
    (folder / ".metadata").write_bytes(pickle.dumps(contents))
    with pytest.raises(CheckpointError, match=r"\.metadata is not plain data: it names posix\.mkdir"):
        refuse_code(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x05torch\x8c\x0dos.path.isdir\x93.",
        b"\x80\x04\x8c\x24torch.distributed.checkpoint.metadata\x8c\x02os\x93.",
        b"\x80\x04\x8c\x26torch.distributed.checkpoint.filesystem\x8c\x06pickle\x93.",
        b"garbage",
        b"",
        pickle.dumps({"no": "metadata"}),
    ],
)
def test_other_globals_and_broken_files_are_refused(tmp_path: Path, code: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        refuse_code(tmp_path)


def test_code_in_a_byte_object_is_refused(tmp_path: Path) -> None:
    sentinel = tmp_path / "was_run"
    folder = stored(tmp_path / "c", "common", saved(Malicious(sentinel)))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is not plain data: .*posix\.mkdir"):
        refuse_code(folder)
    plain = stored(tmp_path / "d", "common", saved({"step": 1}))
    refuse_code(plain)
    (plain / "common.pt").write_bytes(saved(Malicious(sentinel)))
    with pytest.raises(CheckpointError, match=r"common\.pt is not plain data"):
        refuse_code(plain)
    assert not sentinel.exists()


@pytest.mark.parametrize("file", ["../x.distcp", "/etc/passwd", "..", ""])
def test_files_elsewhere_are_refused(tmp_path: Path, file: str) -> None:
    with pytest.raises(CheckpointError, match="expected a plain name"):
        refuse_code(stored(tmp_path / "c", "a", saved(1), file))
