"""A zoo of bad and hostile files: each ends as a rejected row or a refusal, nothing outside the source is touched."""

import io
import json
import os
import random
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.importers import references
from data_pipelines.importers.references import MediaFinder
from data_pipelines.importers.rows import Rejected
from data_pipelines.importers.tars import tar_samples


def png_bomb(side: int) -> bytes:
    """A PNG of side x side white pixels in a few hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * side
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def zoo(tmp_path, picture, clip):
    """A folder of media by what is wrong with each: name -> (bytes, part of the message)."""
    photo = picture(60, 60, "JPEG")
    frames = [Image.new("RGB", (8, 8), (c, 0, 0)) for c in (0, 200)]
    video = clip(40)
    media = {
        "empty.png": (b"", "image 'empty.png' is empty (0 bytes)"),
        "text.jpg": (b"hello", "not a readable image"),
        "bomb.png": (png_bomb(13000), "13000x13000 pixels is larger"),
        "gif.png": (encoded(frames[0], "GIF"), "not a readable image"),
        "moving.webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), "animated WEBP"),
        "moving.png": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), "animated PNG"),
        "half_header.jpg": (photo[:20], "not a readable image"),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a readable image"),
        "noise.mp4": (np.random.default_rng(0).bytes(5000), "video cannot be opened"),
        "cut.mp4": (video[: len(video) // 2], "has no video stream"),
        "playlist.mp4": (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
            "cannot be opened",
        ),
        "concat.mp4": (b"ffconcat version 1.0\nfile /etc/hostname\n", "cannot be opened"),
        "photo.mp4": (photo, "video cannot be opened"),
        "none.mp4": (b"", "video 'none.mp4' is empty (0 bytes)"),
    }
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, (data, _) in media.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (tmp_path / "outside.png").write_bytes(picture(8, 8))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "good.png").write_bytes(picture(8, 8))
    reasons = {name: reason for name, (_, reason) in media.items()}
    named = {
        "pipe.png": "not a regular file",
        "folder.png": "not a regular file",
        "link.png": "lies outside",
        "../outside.png": "lies outside",
        str(tmp_path / "outside.png"): "lies outside",
        "/etc/hostname": "lies outside",
        "file:///etc/hostname": "is a URL; nothing is fetched",
        "http://169.254.169.254/latest/meta-data": "is a URL; nothing is fetched",
        "missing.png": "is not in",
        "a\0b.png": "expected a file name",
        "data:image/png;base64,@@@": "damaged base64",
        "data:image/png,abc": "not base64",
    }
    return folder, {**reasons, **named}


def test_every_animal_is_rejected_by_its_own_reason(zoo, lines, bring, imported, rejected):
    folder, reasons = zoo
    rows = []
    for number, name in enumerate(reasons):
        kind = "video" if name.endswith(".mp4") else "image"
        rows.append({"id": f"bad{number}", kind: name, "question": "q", "answer": "a"})
        rows.append({"id": f"good{number}", "image": "good.png", "question": "q", "answer": "a"})
    lines(folder / "metadata.jsonl", rows)
    before = sorted(str(path) for path in folder.parent.rglob("*"))
    result = bring(folder, max_bad=0.6)
    assert result["rejected"]["media"] + result["rejected"]["record"] == len(reasons)
    assert [record["id"] for record, _ in imported()] == [f"good{i}" for i in range(len(reasons))]
    for line, (name, reason) in zip(rejected(), reasons.items(), strict=True):
        assert reason in line["message"], (name, line)
        assert name.startswith("data:") or repr(name) in line["message"]
        assert line["key"].startswith("bad")
    after = [str(p) for p in folder.parent.rglob("*") if "imported" not in str(p)]
    assert sorted(after) == before


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "q", "answer": "\xff"}', "not UTF-8 at byte 29"),
        (b'{"question": "q", "answer": NaN}', "NaN is not JSON"),
        (b'{"question": "q"', "not a JSON record"),
        (b"[1, 2]", "expected an object"),
        (b"[" * 100000 + b"]" * 100000, "nested too deeply"),
        (b'{"question": "q", "answer": "\\ud800"}', "not valid Unicode"),
        (b'{"id": 5, "messages": [{"role": "user", "content": "q"}]}', "last message must be"),
        (b'{"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4",'
         b' "metadata": {"video_fps": 1e999}}'
         b']}, {"role": "assistant", "content": "a"}]}', "'v.mp4' is not in"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path, bring, imported, rejected, line, reason):
    (tmp_path / "metadata.jsonl").write_bytes(
        b'{"question": "q", "answer": "a"}\n' + line + b'\n\n{"question": "q", "answer": "b"}'
    )
    result = bring(tmp_path / "metadata.jsonl", max_bad=0.5)
    assert result["splits"]["train"]["samples"] == 2
    (found,) = rejected()
    assert reason in found["message"]
    assert found["where"] == "metadata.jsonl:2"


def test_random_rows_end_as_samples_or_as_rejected_rows(tmp_path, bring, lines, picture):
    """Whatever JSON stands where: every row is accounted for, and a check of ours foresaw what is wrong with it."""
    rng = random.Random(5)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a.png").write_bytes(picture(8, 8))
    leaves = [None, True, 0, -1, 10**400, 1e300, "", "a.png", "<image>", "user", "human", "<video>", "x" * 50, [], {}]
    names = [
        "messages",
        "conversations",
        "texts",
        "role",
        "from",
        "content",
        "value",
        "type",
        "image",
        "images",
        "video",
        "text",
        "question",
        "answer",
        "choices",
        "boxes",
        "label",
        "start",
        "end",
        "segments",
        "caption",
        "id",
        "user",
        "assistant",
        "metadata",
        "image_url",
        "url",
        "bytes",
        "path",
    ]

    def value(depth):
        kind = rng.random()
        if depth == 0 or kind < 0.3:
            return rng.choice(leaves)
        if kind < 0.6:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        return {rng.choice(names): value(depth - 1) for _ in range(rng.randrange(1, 6))}

    rows = [{"question": "q", "answer": "a"}, *({n: value(3) for n in rng.sample(names, 6)} for _ in range(3000))]
    lines(tmp_path / "src/metadata.jsonl", rows)
    result = bring(tmp_path / "src", max_bad=1.0)
    assert result["splits"]["train"]["samples"] + sum(result["rejected"].values()) == result["rows"] == 3001
    assert result["splits"]["train"]["samples"] > 20
    assert set(result["rejected"]) <= {"record", "media", "duplicate_id"}


def test_no_server_is_asked_for_anything(tmp_path, bring, lines, rejected):
    """A row's URL may name a machine of the private network that the import runs in."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        urls = [f"http://127.0.0.1:{port}/a.png", f"https://localhost:{port}/a.png", f"ftp://127.0.0.1:{port}/a.png"]
        urls += ["http://10.0.0.7/a.png", "http://[fd00::1]/a.png", "http://192.168.1.1/a.png"]
        messages = [
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]},
             {"role": "assistant", "content": "a"}]
            for url in urls
        ]  # fmt: skip
        rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
        lines(tmp_path / "rows.jsonl", [*rows, *({"messages": asked} for asked in messages)])
        assert bring(tmp_path / "rows.jsonl", max_bad=0.9)["rejected"] == {"media": len(urls)}
        assert all("nothing is fetched" in line["message"] for line in rejected())
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_numbers_that_are_none_in_a_tables_metadata(tmp_path, bring, imported, clip):
    """What a table says of a video is used only where it is all there and makes sense; then the file is asked."""
    names = ("video_fps", "video_num_frames", "video_width", "video_height")
    given = [[10.0, 40.0, 32.0, 32.0], [float("nan"), 40.0, 32.0, 32.0], [10.0, float("nan"), 32.0, 32.0],
             [10.0, float("inf"), 32.0, 32.0], [10.0, 40.0, -1.0, 32.0]]  # fmt: skip
    rows = [
        {"messages": [
            {"role": "user", "content": [
                {"type": "video", "video": "a.mp4", "text": None,
                 "metadata": dict(zip(names, values, strict=True)) | {"video_duration": values[0]}},
                {"type": "text", "video": None, "text": "q", "metadata": None}]},
            {"role": "assistant", "content": [{"type": "text", "video": None, "text": "a", "metadata": None}]}]}
        for values in given
    ]  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.mp4").write_bytes(clip(40, 10, 32))
    pq.write_table(pa.Table.from_pylist(rows), source / "train.parquet")
    assert bring(source)["splits"]["train"]["samples"] == len(rows)
    found = [record["messages"][0]["content"][0] for record, _ in imported()]
    assert ["metadata" in item for item in found] == [True, False, False, False, False]
    dataset = Dataset.open(tmp_path / "imported", "train")
    assert {(s.fps, s.frames, s.width) for i in range(len(rows)) for s in dataset.shapes(i)} == {(10.0, 40, 32)}


@pytest.mark.parametrize("mebibytes", [300, pytest.param(1024, marks=pytest.mark.slow)])
def test_an_endless_line_costs_no_memory(tmp_path, tokenizer_folder, mebibytes):
    """The limit is 64 MiB a record: a longer one is found and skipped without being read into memory."""
    with (tmp_path / "rows.jsonl").open("wb") as file:
        file.write(b'{"question": "q", "answer": "a"}\n{"question": "')
        for _ in range(mebibytes):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"question": "q", "answer": "b"}\n')
    code = f"""
        import resource
        from pathlib import Path
        from data_pipelines.importers.job import ImportOptions, run_import
        from data_pipelines.media.rules import RenderRules
        import data_pipelines.importers.work
        rules = RenderRules(
            template="nano_v2_vl", tile_size=64, max_tiles=4, use_thumbnail=True, video_fps=2.0, max_frames=8)
        folder = Path({str(tmp_path)!r})
        # Pages of a mapped file are not the process's own, so the limit is on what it may allocate beyond what it has.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        limit = int(status["VmData"].split()[0]) * 1024 + 250 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        tokenizer = Path({str(tokenizer_folder)!r})
        result = run_import(ImportOptions(allow_text=True,
            source=folder / "rows.jsonl", out=folder / "out", tokenizer=tokenizer, rules=rules, max_bad=0.5))
        print(result["splits"]["train"]["samples"], result["rejected"])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "2 {'read': 1}", done.stderr[-2000:]


def member(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def test_hostile_tar_members_are_left_out(tmp_path):
    row = json.dumps({"question": "q", "answer": "a"}).encode()
    path = write_tar(
        tmp_path / "t.tar",
        member("a.json", row),
        member("../up.json", row),
        member("/abs.json", row),
        member("link.json", type=tarfile.SYMTYPE, linkname="/etc/hostname"),
        member("hard.json", type=tarfile.LNKTYPE, linkname="a.json"),
        member("device.json", type=tarfile.CHRTYPE),
        member("noextension", row),
        member(".hidden.json", row),
        member("b.json", row),
    )
    found = list(tar_samples(path, "t.tar"))
    assert [s[0] for s in found if not isinstance(s, Rejected)] == ["a", "b"]
    assert len([s for s in found if isinstance(s, Rejected)]) == 6
    assert sorted(os.listdir(tmp_path)) == ["t.tar"]


@pytest.mark.parametrize("cut", [700, 1024, 1100, 1700, 2048])
def test_a_tar_cut_anywhere_is_noticed(tmp_path, cut):
    path = write_tar(tmp_path / "t.tar", member("a.json", b"{}"), member("b.json", b"{}"))
    path.write_bytes(path.read_bytes()[:cut])
    *whole, last = tar_samples(path, "t.tar")
    assert isinstance(last, Rejected)
    assert "damaged or cut short" in last.message
    assert len(whole) <= 1


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "t.tar", *[member(f"{i}.json", b"{}") for i in range(3)])
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 0xFF
    path.write_bytes(data)
    *_, last = tar_samples(path, "t.tar")
    assert "damaged" in last.message


def test_lists_that_are_not_closed_are_refused(tmp_path, bring):
    (tmp_path / "a.json").write_text('[{"conversations": []}, {"conv')
    with pytest.raises(DataError, match=r"a\.json: the JSON list is not closed"):
        bring(tmp_path / "a.json", format="llava")
    (tmp_path / "a.json").write_text('[{"conversations": []}}, {}]')
    with pytest.raises(DataError, match="closed too often"):
        bring(tmp_path / "a.json", format="llava")


def test_size_caps_hold_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MAX_BYTES", {"image": 100, "video": 100})
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    finder = MediaFinder([tmp_path])
    for reference in ("sparse.png", b"x" * 101, {"bytes": b"x" * 101}, "data:image/png;base64," + "A" * 200):
        with pytest.raises(DataError, match="more than the 100 that are read"):
            finder.fetch(reference, "image", members={}, folder=tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**33 // 1024


def test_csv_that_is_not_a_table(tmp_path, bring, rejected):
    (tmp_path / "metadata.csv").write_bytes(b'question,answer\nq,a\nq,"open\nq,a\n')
    bring(tmp_path / "metadata.csv", max_bad=0.5)
    assert "cannot be read on" in rejected()[0]["message"]
    (tmp_path / "metadata.csv").write_bytes(b"question,answer\nq,a\nq,na\xefve\nq,b\n")
    assert bring(tmp_path / "metadata.csv", tmp_path / "second", max_bad=0.5)["splits"]["train"]["samples"] == 2
    assert "save the table as UTF-8" in rejected(tmp_path / "second")[0]["message"]
