"""Files of a checkpoint: any layout reads any other's, damage is named, and nothing in them can run."""

import io
import json
import math
import os
import pickle
import random
from pathlib import Path

import pytest
import tiny_runs
import torch

from nemovl_train.checkpoint import saving, sealed, storage
from nemovl_train.exceptions import CheckpointError
from nemovl_train.training.optimizer_state import boxes

# isort: split
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


class Model:
    """Shards of one tensor, and an object."""

    def __init__(self, *shards: ShardedTensor, note: object = None) -> None:
        self.state = {str(i): shard for i, shard in enumerate(shards)}
        if note is not None:
            self.state["note"] = ShardedObject("note", note, (1,), (0,))
        self.loaded: dict = {}

    def sharded_state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state, strict=True):
        self.loaded = state


def save(root: Path, model: Model) -> Path:
    return saving.save(root, 1, model=model, optimizer=None, state={}, run_id="x")


def shard(whole: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...], data: torch.Tensor) -> ShardedTensor:
    return ShardedTensor("w", data, data.dtype, sizes, tuple(whole.shape), offsets, None)


def cut(whole: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    return whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


@pytest.mark.parametrize("shape", [(), (7,), (5, 4), (3, 4, 5), (2, 3, 1, 4), (1, 6), (6, 1)])
def test_boxes_are_the_run_in_order_and_nothing_else(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for begin in range(numbers.numel()):
        for end in range(begin, numbers.numel() + 1):
            found, at = [], begin
            for start, offsets, sizes in boxes(shape, begin, end):
                assert start == at
                box = cut(numbers, offsets, sizes).reshape(-1).tolist()
                found += box
                at += len(box)
            assert found == list(range(begin, end))


def test_few_boxes_are_enough() -> None:
    assert len(list(boxes((4096, 5120), 3, 4096 * 5120 - 3))) == 3
    assert len(list(boxes((100, 7, 9), 5, 100 * 63 - 5))) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(11,), (9, 6), (4, 5, 3)])
@pytest.mark.usefixtures("layout")
def test_what_was_saved_in_runs_is_loaded_in_blocks(tmp_path: Path, shape, dtype) -> None:
    """As data parallel ranks write it, and as tensor parallel ranks read it."""
    whole = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    cuts = sorted(random.Random(3).sample(range(1, whole.numel()), 4))
    pieces = []
    for begin, end in zip([0, *cuts], [*cuts, whole.numel()], strict=True):
        for _, offsets, sizes in boxes(shape, begin, end):
            pieces.append(shard(whole, offsets, sizes, cut(whole, offsets, sizes)))
    folder = save(tmp_path, Model(*pieces))
    half = shape[-1] // 2
    for offsets, sizes in (
        ((0,) * len(shape), shape),
        ((1, *(0,) * (len(shape) - 1)), (2, *shape[1:])),
        ((*(0,) * (len(shape) - 1), half), (*shape[:-1], shape[-1] - half)),
    ):
        model = Model(shard(whole, offsets, sizes, torch.zeros(sizes, dtype=dtype)))
        sealed.load(folder, model=model)
        assert torch.equal(model.loaded["0"], cut(whole, offsets, sizes))


def test_host_memory_is_one_copy_and_used_again() -> None:
    stage = storage.HostStage(pinned=False)
    tensors = [torch.arange(5_000_000.0), torch.tensor(3.5), torch.arange(20_000_000.0)[::2]]
    for _ in range(2):
        stage.fill(tensors)
        data = b"".join(bytes(block) for block in stage.blocks())
        assert data == b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)
    assert sum(slab.nbytes for slab in stage._slabs) - stage.bytes < storage._SLAB_BYTES
    stage.fill(tensors[:1])
    assert sum(len(block) for block in stage.blocks()) == tensors[0].nbytes


def test_a_save_that_is_waited_for_needs_no_copy_and_writes_the_same_bytes(layout, tmp_path: Path) -> None:
    whole = torch.arange(40.0).view(8, 5)
    model = Model(shard(whole, (0, 0), (8, 5), whole.t().contiguous().t()), note={"a": 1})
    written = {}
    for name, in_background in (("behind", True), ("waited", False)):
        saver = saving.Saver(tmp_path / name, "x", in_background=in_background)
        saver.start(1, model=model, optimizer=None, state={})
        folder = saver.finish()
        assert folder is not None
        assert sealed.verify(folder).integrity["step"] == 1
        written[name] = (folder / "sharded" / "rank_00000.bin").read_bytes()
        assert (saver.stage_bytes > 0) == in_background
    assert written["behind"] == written["waited"]
    assert written["waited"].startswith(whole.numpy().tobytes()) or whole.numpy().tobytes() in written["waited"]


class Counted:
    """An optimizer whose common state is a tensor that its next step changes."""

    def __init__(self) -> None:
        self.step = torch.tensor(3.0)

    def sharded_state_dict(self, model_state, *, is_loading=False):
        return {"step": self.step}


def test_what_is_common_is_that_of_the_moment_too(layout, tmp_path: Path) -> None:
    """torch's AdamW counts in a live tensor; the index is written when the save is published."""
    whole = torch.arange(4.0)
    model, optimizer = Model(shard(whole, (0,), (4,), whole)), Counted()
    saver = saving.Saver(tmp_path, "x")
    saver.start(3, model=model, optimizer=optimizer, state={})
    optimizer.step.fill_(4)
    folder = saver.finish()
    assert folder is not None
    assert storage.IndexedReader(folder / "sharded").common["optimizer"]["step"] == 3


@pytest.mark.usefixtures("layout")
def test_objects_come_back_and_those_with_code_are_refused_unread(tmp_path: Path) -> None:
    sentinel, whole = tmp_path / "was_run", torch.ones(2)
    model = Model(shard(whole, (0,), (2,), whole), note={"scale": [1.0, 2.0]})
    folder = save(tmp_path / "a", model)
    sealed.load(folder, model=model)
    assert model.loaded["note"] == {"scale": [1.0, 2.0]}
    # Its author seals it: the seal says that nothing changed, not that nothing is in it.
    bad = Model(shard(whole, (0,), (2,), whole), note=Malicious(sentinel))
    folder = save(tmp_path / "b", bad)
    with pytest.raises(CheckpointError, match=r"rank_00000\.bin: the object note.*is not plain data: .*posix\.mkdir"):
        sealed.load(folder, model=model)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "rng_state.pt", "state.pt"])
@pytest.mark.usefixtures("layout")
def test_pickles_put_into_a_checkpoint_are_never_opened(tmp_path: Path, name: str) -> None:
    """First as a foreign file, then sealed by whoever put it there."""
    sentinel, whole = tmp_path / "was_run", torch.ones(2)
    model = Model(shard(whole, (0,), (2,), whole))
    folder = save(tmp_path, model)
    foreign = folder / "sharded" / name
    foreign.write_bytes(pickle.dumps(Malicious(sentinel)))
    with pytest.raises(sealed.DamagedError, match=f"foreign files.*{name}"):
        sealed.load(folder, model=model)
    manifest = folder / "integrity.json"
    content = json.loads(manifest.read_text())
    content["files"][f"sharded/{name}"] = {"bytes": foreign.stat().st_size, "sha256": sealed.sha256(foreign)}
    manifest.write_text(json.dumps(content))
    (folder / "COMPLETE").write_text(sealed.sha256(manifest))
    sealed.load(folder, model=model)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["tensors"]["w"]["pieces"][0].__setitem__(2, "../x.bin"), "expected a plain name"),
        (lambda index: index["tensors"]["w"]["pieces"][0].__setitem__(2, "/etc/passwd"), "expected a plain name"),
        (lambda index: index["tensors"]["w"].__setitem__("dtype", "load"), "not a dtype"),
        (lambda index: index["tensors"]["w"]["pieces"][0].__setitem__(3, 4), "ends 4 bytes early"),
        (lambda index: index.pop("tensors"), "is not the index of a checkpoint"),
        (lambda index: index["tensors"].pop("w"), "does not fit this model"),
    ],
)
def test_an_index_that_lies(layout, tmp_path: Path, change, message: str) -> None:
    """Not the user's mistake but a stranger's: sealed again after the change."""
    whole = torch.ones(2)
    model = Model(shard(whole, (0,), (2,), whole))
    folder = save(tmp_path, model)
    path, manifest = folder / "sharded" / "index.json", folder / "integrity.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    content = json.loads(manifest.read_text())
    content["files"]["sharded/index.json"] = {"bytes": path.stat().st_size, "sha256": sealed.sha256(path)}
    manifest.write_text(json.dumps(content))
    (folder / "COMPLETE").write_text(sealed.sha256(manifest))
    with pytest.raises(CheckpointError, match=message):
        sealed.load(folder, model=model)


def test_values_that_are_the_same_on_all_ranks_come_back_with_their_types() -> None:
    common = {"groups": [{"betas": (0.9, 0.95), 3: None, "step": torch.tensor(7.0), "on": True, "lr": 1e-5 / 3}]}
    text = storage.join_index([], common)
    back = storage._from_plain(json.loads(text)["common"])
    assert back == common
    assert isinstance(back["groups"][0]["betas"], tuple)
    with pytest.raises(AssertionError, match="has no place in a checkpoint"):
        storage.join_index([], {"x": io.BytesIO()})


@pytest.mark.parametrize("params", ["fp32", "bf16"])
def test_a_real_model_and_its_optimizer_hold_no_pickle(layout, tmp_path: Path, params: str) -> None:
    from nemovl_train.config.schema import OptimConfig
    from nemovl_train.model.vlm import build_model
    from nemovl_train.training.optimizer import Optimizers

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[params]
    model = build_model(tiny_runs.MODEL, layout, params_dtype=dtype, parts=tiny_runs.MODEL.parts, seed=1)
    optimizer = Optimizers(model, layout, OptimConfig(lr=1e-3), dtype)
    folder = saving.save(tmp_path, 1, model=model, optimizer=optimizer, state={}, run_id="x")
    index = json.loads((folder / "sharded" / "index.json").read_text())
    assert index["objects"] == {}
    weights = sum(parameter.nbytes for parameter in model.parameters())
    elements = sum(parameter.numel() for parameter in model.parameters())
    kept = sum(p.numel() for p in model.parameters() if p.dtype != torch.float32)
    # Two moments each, and a master weight only where the model has none of its own.
    expected = weights + 4 * (2 * elements + kept)
    assert (folder / "sharded" / "rank_00000.bin").stat().st_size == expected
