"""Neither direction holds a model: of the tensors that were read, only the last ones are alive."""

import gc
import weakref
from pathlib import Path

import pytest
import torch

from nemovl_train.checkpoint.streamed import StoredTensors
from nemovl_train.convert import tensor_files
from nemovl_train.convert.checkpoints import export_checkpoint, import_checkpoint


class Watched:
    """Counts the bytes of tensors that a reader gave out and that are still alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, method: str = "read") -> None:
        self.alive: dict[int, int] = {}
        self.peak = self.total = 0
        original = getattr(owner, method)

        def read(reader: object, name: str) -> torch.Tensor:
            tensor = original(reader, name)
            self.total += tensor.nbytes
            self.alive[id(tensor)] = tensor.nbytes
            weakref.finalize(tensor, self.alive.pop, id(tensor))
            self.peak = max(self.peak, sum(self.alive.values()))
            return tensor

        monkeypatch.setattr(owner, method, read)


def test_import_and_export_read_and_forget(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = tensor_files.TensorFolder(folders["vlm"]).specs.values()
    # One that is written and the one before it, or the three of an attention layer, which are small.
    allowed, total = 2 * max(s.nbytes for s in specs), sum(s.nbytes for s in specs)
    assert total > 2 * allowed
    gc.collect()
    reading = Watched(monkeypatch, tensor_files.TensorFolder)
    import_checkpoint(folders["vlm"], tmp_path / "ours")
    assert reading.total >= total
    assert reading.peak <= allowed
    stored = Watched(monkeypatch, StoredTensors)
    export_checkpoint(tmp_path / "ours", tmp_path / "hf")
    assert stored.total >= total - 24  # all but the two constants
    assert stored.peak <= allowed
