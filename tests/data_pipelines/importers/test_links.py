"""Files of a source that a link brings in from elsewhere: refused, unless the user named the place."""

import json

import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.prepare import extract_frames, render_pdfs

ROW = {"question": "q", "answer": "secret"}
DATA = {
    "text": ("x.txt", b"secret one\n\nsecret two\n"),
    "code": ("x.py", b"a = 1\n\nb = 2\n"),
    "folder": ("x.jsonl", json.dumps(ROW).encode() + b"\n"),
    "auto": ("x.jsonl", json.dumps(ROW).encode() + b"\n"),
    "csv": ("x.csv", b"question,answer\nq,secret\n"),
    "hf": ("x.parquet", b""),
    "pdf": ("x.pdf", b""),
    "webdataset": ("x.tar", b""),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_link_to_elsewhere_is_refused(tmp_path, bring, kind):
    name, data = DATA[kind]
    (tmp_path / "src").mkdir()
    (tmp_path / name).write_bytes(data)
    (tmp_path / "src" / name).symlink_to(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is a link to .*--media-root {tmp_path}$"):
        bring(tmp_path / "src", format="folder" if kind == "csv" else kind)


def test_links_within_the_source_and_to_named_folders(tmp_path, bring, imported, lines):
    lines(tmp_path / "src/real/a.jsonl", [ROW])
    lines(tmp_path / "blobs/0a1b", [ROW])
    (tmp_path / "src/b.jsonl").symlink_to("real/a.jsonl")
    (tmp_path / "src/c.jsonl").symlink_to("../blobs/0a1b")
    (tmp_path / "entry").symlink_to("src")
    assert bring(tmp_path / "entry", media_roots=(tmp_path / "blobs",))["splits"]["train"]["samples"] == 3
    # What the user names is what the user means.
    bring(tmp_path / "src/c.jsonl", tmp_path / "one")
    assert len(imported(tmp_path / "one")) == 1


def test_media_tars_from_elsewhere_are_refused(tmp_path, bring, lines):
    (tmp_path / "x.tar").write_bytes(b"")
    lines(tmp_path / "src/a.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    (tmp_path / "src/x.tar").symlink_to(tmp_path / "x.tar")
    with pytest.raises(DataError, match=r"x\.tar is a link to"):
        bring(tmp_path / "src", format="nemotron-v2")


def test_a_saved_split_and_energon_shards_from_elsewhere_are_refused(tmp_path, bring):
    (tmp_path / "far").mkdir()
    for name in ("state.json", "a.tar"):
        (tmp_path / "far" / name).write_text("{}")
    for name in ("saved", "energon"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train").symlink_to(tmp_path / "far")
    (tmp_path / "saved/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="is a link to"):
        bring(tmp_path / "saved")
    meta = tmp_path / "energon/.nv-meta"
    meta.mkdir()
    (meta / "dataset.yaml").write_text("sample_type: {__class__: CaptioningSample}\n")
    (meta / "split.yaml").write_text("split_parts: {train: [train/a.tar]}\n")
    with pytest.raises(DataError, match="is a link to"):
        bring(tmp_path / "energon")
    (tmp_path / "split.yaml").write_text("split_parts: {}\n")
    (meta / "split.yaml").unlink()
    (meta / "split.yaml").symlink_to(tmp_path / "split.yaml")
    with pytest.raises(DataError, match=r"split\.yaml is a link to"):
        bring(tmp_path / "energon")


def test_frames_and_pages_of_links_are_refused(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("v.mp4", "p.pdf"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / "src" / name).symlink_to(tmp_path / name)
    with pytest.raises(DataError, match=r"v\.mp4 is a link to"):
        extract_frames(tmp_path / "src", tmp_path / "out", fps=1, max_frames=8, side=64)
    with pytest.raises(DataError, match=r"p\.pdf is a link to"):
        render_pdfs(tmp_path / "src", tmp_path / "out", dpi=72)
