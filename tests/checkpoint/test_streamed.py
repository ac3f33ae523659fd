"""Checkpoints written and read tensor by tensor: the format of a training run's, and one tensor alive at a time."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemovl_train.checkpoint import sealed, streamed
from nemovl_train.checkpoint.streamed import StoredTensors, save_streamed
from nemovl_train.exceptions import CheckpointError


def values(name: str) -> Tensor:
    number = int(name.rpartition(".")[2])
    return torch.arange(number, number + 12, dtype=torch.float32).view(3, 4)


SPECS = {f"part.{n}": torch.empty(3, 4, device="meta") for n in range(6)}


def save(root: Path, read=values, specs=SPECS) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    return save_streamed(root, 0, specs=specs, read=read, state={"a": 1}, run_id="r")


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "FILE_BYTES", 100)
    folder = save(tmp_path)
    assert len(list((folder / "sharded").glob("*.bin"))) == 3
    stored = StoredTensors(folder)
    assert list(stored.specs) == list(SPECS)
    for name in SPECS:
        assert torch.equal(stored.read(name), values(name))
    assert sealed.read_seal(folder)["run_id"] == "r"


def test_scalars_and_narrow_formats(tmp_path: Path) -> None:
    held = {"s": torch.tensor(3.5), "b": torch.arange(6).bfloat16().view(2, 3)}
    specs = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in held.items()}
    stored = StoredTensors(save(tmp_path, held.__getitem__, specs))
    for name, tensor in held.items():
        assert torch.equal(stored.read(name), tensor)


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    """Peak memory must not grow with the model: when the next tensor is asked for, the one before is gone."""
    last: list[weakref.ref] = []

    def read(name: str) -> Tensor:
        assert all(reference() is None for reference in last), name
        tensor = values(name)
        last[:] = [weakref.ref(tensor)]
        return tensor

    save(tmp_path, read)


def test_a_tensor_of_another_shape_or_a_failing_reader_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"part\.0"):
        save(tmp_path, lambda name: values(name).T)
    with pytest.raises(CheckpointError, match="stop"):
        save(tmp_path, lambda name: (_ for _ in ()).throw(CheckpointError("stop")))
    assert list(tmp_path.iterdir()) == []


def test_a_changed_byte_is_noticed_before_anything_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    path = next((folder / "sharded").glob("*.bin"))
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        StoredTensors(folder)
