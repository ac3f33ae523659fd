"""Sealed checkpoints: damage is refused by name, and no death while writing loses the one before."""

import errno
import json
import logging
import os
import resource
import shutil
import sys

import pytest
import torch

from nemovl_train.checkpoint import retention, saving, sealed
from nemovl_train.checkpoint.files import replace_text
from nemovl_train.exceptions import CheckpointError

# isort: split
from megatron.core.dist_checkpointing import ShardedTensor

pytestmark = pytest.mark.usefixtures("layout")


LOSSES: dict[int, float] = {}


class Model:
    """Two tensors."""

    def __init__(self, value, size=3):
        self.tensors = {"a": torch.full((size, 5), float(value)), "b": torch.arange(4.0) * value}

    def sharded_state_dict(self):
        return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in self.tensors.items()}

    def load_state_dict(self, state_dict, strict=True):
        assert state_dict.keys() == self.tensors.keys()
        self.tensors = dict(state_dict)


def save(root, step, size=3, keep=None):
    state = {"step": step, "recent_losses": [LOSSES.get(step, 1.0)]}
    return saving.save(root, step, model=Model(step, size), optimizer=None, state=state, run_id="mine", keep=keep)


def load(folder):
    model = Model(-1)
    state = sealed.load(folder, model=model)
    assert all(torch.equal(model.tensors[name], t) for name, t in Model(state["step"]).tensors.items())
    return state["step"]


def test_it_comes_back(tmp_path):
    folder = save(tmp_path / "checkpoints", 7)
    assert folder == tmp_path / "checkpoints" / "step_00000007"
    assert load(folder) == 7
    integrity = sealed.verify(folder).integrity
    assert (integrity["run_id"], integrity["step"]) == ("mine", 7)
    assert set(integrity["files"]) == {str(p.relative_to(folder)) for p in sealed.files_below(folder)} - {
        "COMPLETE",
        "integrity.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_nothing_in_it_is_a_pickle(tmp_path):
    """`torch.save` writes zip archives, `pickle` begins with its protocol; what is here is JSON and plain bytes."""
    folder = save(tmp_path, 1)
    names = {str(path.relative_to(folder)) for path in sealed.files_below(folder)}
    assert names == {"COMPLETE", "integrity.json", "state.json", "sharded/index.json", "sharded/rank_00000.bin"}
    data = (folder / "sharded" / "rank_00000.bin").read_bytes()
    tensors = Model(1).tensors.values()
    assert sorted(data) == sorted(b"".join(tensor.numpy().tobytes() for tensor in tensors))


def test_one_flipped_byte_in_any_file_is_refused_by_name(tmp_path):
    folder = save(tmp_path, 1)
    files = sealed.files_below(folder)
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        for position in {0, len(content) // 2, len(content) - 2}:
            path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
            with pytest.raises(sealed.DamagedError) as error:
                sealed.load(folder, model=Model(0))
            # A flip in the marker or in the list of hashes shows as a seal that does not fit.
            name = "integrity.json" if path.name == "COMPLETE" else path.name
            assert name in str(error.value)
            assert sealed.latest(tmp_path) is None
        path.write_bytes(content)
    assert load(folder) == 1


@pytest.mark.parametrize("change", ["zeroed", "truncated", "longer", "missing", "foreign", "from another step"])
def test_files_that_are_not_those_that_were_saved(tmp_path, change):
    folder, other = save(tmp_path, 1), save(tmp_path / "other", 2)
    (path,) = (folder / "sharded").glob("*.bin")
    if change == "zeroed":  # as a page that was never written
        path.write_bytes(bytes(path.stat().st_size))
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"0")
    elif change == "missing":
        path.unlink()
    elif change == "foreign":
        path = path.with_name("extra.pt")
        path.write_bytes(b"from elsewhere")
    else:
        shutil.copyfile(other / "sharded" / path.name, path)
    with pytest.raises(sealed.DamagedError, match=path.name):
        sealed.load(folder, model=Model(0))


@pytest.mark.parametrize("name", ["COMPLETE", "integrity.json"])
def test_a_checkpoint_without_its_seal(tmp_path, name):
    folder = save(tmp_path, 1)
    (folder / name).unlink()
    with pytest.raises(sealed.DamagedError, match=f"not a complete checkpoint.*{name}"):
        sealed.verify(folder)


def test_another_format_is_refused_and_not_guessed(tmp_path):
    folder = save(tmp_path, 1)
    manifest = folder / "integrity.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    (folder / "COMPLETE").write_text(sealed.sha256(manifest))
    with pytest.raises(sealed.DamagedError, match="format 99, this version reads 2"):
        sealed.verify(folder)


def test_the_newest_good_one_is_used_with_a_warning_for_each_rejected(tmp_path, caplog):
    folders = [save(tmp_path, step) for step in (1, 2, 3)]
    (folders[2] / "COMPLETE").unlink()
    (folders[1] / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert sealed.latest(tmp_path) == folders[0]
    assert [folder.name in caplog.text for folder in folders] == [False, True, True]
    assert sealed.latest(tmp_path / "nowhere") is None


def test_an_unreadable_disk_is_damage(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)

    def broken(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(sealed, "sha256", broken)
    with pytest.raises(sealed.DamagedError, match="cannot be read"):
        sealed.verify(folder)


def test_the_checkpoint_of_another_run_is_an_error(tmp_path):
    save(tmp_path, 1)
    assert sealed.newest(tmp_path, run_id="mine") is not None
    with pytest.raises(CheckpointError, match=r"belongs to run 'mine', not 'yours': choose another run\.name"):
        sealed.newest(tmp_path, run_id="yours")


def test_other_sizes_are_named(tmp_path):
    folder = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        sealed.load(folder, model=Model(0, size=4))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (retention.Keep(last=2), [5, 6]),
        (retention.Keep(last=1, every=3), [3, 6]),
        (retention.Keep(last=1, best=2), [2, 4, 6]),
        (retention.Keep(last=1, every=5, best=1), [4, 5, 6]),
    ],
)
def test_retention_keeps_the_last_every_nth_and_the_best(tmp_path, monkeypatch, keep, left):
    for step, loss in enumerate([9.0, 2.0, 3.0, 1.0, 8.0, 7.0], start=1):
        monkeypatch.setitem(LOSSES, step, loss)
        save(tmp_path, step, keep=keep)
    assert [load(folder) for folder in sealed.published(tmp_path)] == left


def test_nothing_is_deleted_for_a_checkpoint_that_the_disk_spoiled(tmp_path, monkeypatch):
    """A bit flips between the write and the check that reads it back: it is told, and the one before stays."""
    before, publish = save(tmp_path, 1), saving.sealed.seal

    def spoiled(work, final, **options):
        publish(work, final, **options)
        path = final / "sharded" / "rank_00000.bin"
        data = bytearray(path.read_bytes())
        data[7] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(saving.sealed, "seal", spoiled)
    with pytest.raises(sealed.DamagedError, match=r"rank_00000\.bin: content changed"):
        save(tmp_path, 2, keep=retention.Keep(last=1))
    assert sealed.latest(tmp_path) == before


def test_a_purge_that_fails_is_told_and_stops_nothing(tmp_path, monkeypatch, caplog):
    before = save(tmp_path, 1)

    def refuse(*args, **kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(saving.sealed, "discard", refuse)
        after = save(tmp_path, 2, keep=retention.Keep(last=1))
    assert "could not be deleted" in caplog.text
    assert sealed.published(tmp_path) == [before, after]
    assert [load(save(tmp_path, 3, keep=retention.Keep(last=1)))] == [3]
    assert len(sealed.published(tmp_path)) == 1


def test_training_may_change_everything_as_soon_as_a_save_has_begun(tmp_path):
    saver, model = saving.Saver(tmp_path, "mine"), Model(1)
    saver.start(1, model=model, optimizer=None, state={"step": 1})
    for tensor in model.tensors.values():
        tensor.fill_(-7)
    assert load(saver.finish()) == 1


def test_what_the_writer_of_an_asynchronous_save_met_is_told_and_nothing_is_marked(tmp_path, monkeypatch):
    before = save(tmp_path, 1)
    write = saving.HashedFile.write

    def broken(self, block):
        if self.path.suffix == ".bin":
            raise OSError(errno.EIO, "Input/output error")
        return write(self, block)

    monkeypatch.setattr(saving.HashedFile, "write", broken)
    saver = saving.Saver(tmp_path, "mine", retention.Keep(last=1))
    saver.start(2, model=Model(2), optimizer=None, state={"step": 2})
    with pytest.raises(CheckpointError, match=r"rank 0 could not write its part .*intact.*Input/output error"):
        saver.advance()
    assert saver.idle
    assert list(tmp_path.iterdir()) == [before]


def test_space_is_asked_for_before_a_byte_is_written(tmp_path, monkeypatch):
    before = save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(CheckpointError, match=r"no space left .*0\.00 GiB free.*takes 0\.00 GiB"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [before]


def test_a_full_disk_while_tensors_are_written(tmp_path):
    """A limit on the size of files stands in for the disk: the writer meets a real error in the middle of a tensor."""
    root = tmp_path / "checkpoints"
    before = save(root, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"no space left in .*earlier checkpoints are intact; free space"):
            save(root, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sealed.latest(root) == before
    assert list(root.iterdir()) == [before]
    assert load(save(root, 2)) == 2


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EROFS, "not writable.*run.root")],
)
@pytest.mark.parametrize("name", ["state.json", "integrity.json", "COMPLETE", "rename"])
def test_a_full_or_read_only_disk_at_the_seal(tmp_path, monkeypatch, number, message, name):
    before = save(tmp_path, 1)

    def refuse(*args):
        raise OSError(number, "no")

    if name == "rename":
        monkeypatch.setattr(os, "rename", refuse)
    else:
        write = sealed.write_hashed
        monkeypatch.setattr(sealed, "write_hashed", lambda p, text: refuse() if p.name == name else write(p, text))
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [before]


def test_small_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "small.json"
    replace_text(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space left"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class Killed(BaseException):
    """The process ends here: no code of ours may catch it."""


class Killer:
    """Ends the process at the k-th change below a folder, and lets nothing be changed after that.

    Python reports every change of the file system before it happens: opening for writing, creating, renaming, removing.
    Flushing is added to these, so that a file that was written and never reached the disk is a case of its own.
    """

    EVENTS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "os.truncate")

    def __init__(self):
        self.root, self.left, self.seen = None, 0, 0
        sys.addaudithook(self)

    def __call__(self, event, args):
        if self.root is None:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in self.EVENTS) and str(self.root) in str(args[0]):
            self.change()

    def change(self):
        self.seen += 1
        self.left -= 1
        if self.left < 0:
            raise Killed

    def armed(self, root, k, action):
        """Run an action that dies at its k-th change. True when it got through."""
        self.root, self.left, self.seen = root, k, 0
        try:
            action()
        except Killed:
            return False
        finally:
            self.root = None
        return True


@pytest.fixture(scope="module")
def killer():
    return Killer()


@pytest.fixture
def flushes(killer, monkeypatch):
    flush = os.fsync

    def fsync(descriptor):
        if killer.root is not None:
            killer.change()
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.usefixtures("flushes")
def test_death_at_any_change_of_the_file_system_leaves_a_loadable_checkpoint(tmp_path, killer):
    """A save that replaces a damaged checkpoint and retention, killed before change k, for all k; then a restart."""
    start = tmp_path / "start"
    save(start, 1)
    (save(start, 2) / "state.json").write_text("{}")

    def save_and_retain(root):
        save(root, 2, keep=retention.Keep(last=1))

    left, k, finished = set(), 0, False
    while not finished:
        root = shutil.copytree(start, tmp_path / str(k))
        finished = killer.armed(root, k, lambda root=root: save_and_retain(root))
        found = sealed.latest(root)
        assert found is not None, k
        left.add(load(found))
        sealed.clean(root)
        assert all(path.name.startswith("step_") for path in root.iterdir())
        save_and_retain(root)
        assert [load(folder) for folder in sealed.published(root)] == [2]
        k += 1
        shutil.rmtree(root)
    assert left == {1, 2}
    assert k > 20


@pytest.mark.parametrize("name", ["index.json", "state.json", "integrity.json", "COMPLETE"])
def test_death_in_the_middle_of_a_file(tmp_path, monkeypatch, name):
    before = save(tmp_path, 1)
    write = saving.HashedFile.write

    def half(self, block):
        if self.path.name == name:
            write(self, bytes(block)[: len(block) // 2])
            raise Killed
        write(self, block)

    monkeypatch.setattr(saving.HashedFile, "write", half)
    with pytest.raises(Killed):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert sealed.latest(tmp_path) == before
    assert load(save(tmp_path, 2)) == 2
