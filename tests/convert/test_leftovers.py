"""What killed exports leave beside the folder is removed by the next one; a running export is left alone."""

import os

import pytest

from nemovl_train.convert import hf_export
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors


def export(out, **options):
    return export_canonical(
        random_tensors(kind="vision").items(), CONFIG, out, kind="vision", tokenizer=None, card={}, **options
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_a_killed_export_go_with_the_next(tmp_path):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "half").write_text("")
    (tmp_path / ".other.partial").mkdir()
    export(tmp_path / "hf")
    assert names(tmp_path) == [".other.partial", "hf"]


def test_a_running_export_keeps_its_folder(tmp_path):
    running = tmp_path / ".hf.partial"
    running.mkdir()
    lock = hf_export._lock(running)
    with pytest.raises(ConversionError, match=r"another export is writing .*hf; wait for it"):
        export(tmp_path / "hf")
    assert names(tmp_path) == [running.name]
    os.close(lock)
    export(tmp_path / "hf")
    assert names(tmp_path) == ["hf"]


@pytest.mark.parametrize("renames", [0, 1])
def test_an_overwrite_that_is_killed_between_its_renames_loses_nothing(tmp_path, monkeypatch, renames):
    out = export(tmp_path / "hf")
    (out / "mark").write_text("the old one")
    rename, left = hf_export.Path.rename, [renames]

    def killed(self, target):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(self, target)

    monkeypatch.setattr(hf_export.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        export(out, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(ConversionError, match="exists"):
        export(out)
    assert (out / "mark").is_file()
    assert names(tmp_path) == ["hf"]
    export(out, overwrite=True)
    assert not (out / "mark").exists()
