"""Resumable, parallel, and always the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.importers import job, json_ranges, publish, work
from data_pipelines.importers.json_ranges import unit_ranges


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def source(tmp_path, lines, picture):
    """120 rows with photos in 12 units of JSON lines, three of them bad."""
    folder = tmp_path / "src"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.jpg").write_bytes(picture(60 + 20 * i, 60, "JPEG", seed=i))
    for part in range(12):
        rows = [
            {"id": f"{part}-{i}", "file_name": f"{i % 8}.jpg", "question": f"q{i}", "answer": f"a{part}"}
            for i in range(10)
        ]
        rows[part % 10]["file_name"] = "missing.jpg" if part % 4 == 0 else rows[part % 10]["file_name"]
        lines(folder / f"part{part:02d}.jsonl", rows)
    return folder


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, source, bring):
    options = {"format": "folder", "max_bad": 0.1, "name": "same", "shard_mib": 0.05}
    bring(source, tmp_path / "one", **options)
    result = bring(source, tmp_path / "two", workers=2, **options)
    assert (result["splits"]["train"]["samples"], result["rejected"]) == (117, {"media": 3})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len([name for name in contents(tmp_path / "one") if name.endswith(".tar")]) >= 12
    dataset = Dataset.open(tmp_path / "one", "train")
    for i in range(len(dataset)):
        assert dataset.read(i).record["id"] == dataset.key(i)
    assert not list(tmp_path.glob(".*"))
    shutil.copytree(source, tmp_path / "elsewhere/copy")
    bring(tmp_path / "elsewhere/copy", tmp_path / "moved", **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "moved")


def test_an_interrupted_import_continues(tmp_path, source, bring, monkeypatch):
    options = {"format": "folder", "max_bad": 0.1, "name": "same"}
    bring(source, tmp_path / "whole", **options)
    run, ran = work.Worker.run, []

    def failing(self, number, unit, limit=None):
        ran.append(number)
        if len(ran) == 6:
            raise OSError(28, "No space left on device")
        return run(self, number, unit, limit)

    monkeypatch.setattr(work.Worker, "run", failing)
    with pytest.raises(DataError, match=r"No space left.*same command again: finished parts are kept"):
        bring(source, tmp_path / "stopped", **options)
    bring(source, tmp_path / "stopped", **options)
    assert ran == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")


def test_publishing_may_stop_anywhere(tmp_path, source, bring, monkeypatch):
    options = {"format": "folder", "max_bad": 0.1, "name": "same"}
    bring(source, tmp_path / "whole", **options)
    place, calls = publish._place, []

    def failing(*args):
        calls.append(args)
        if len(calls) in (4, 10):
            raise OSError(5, "Input/output error")
        return place(*args)

    monkeypatch.setattr(publish, "_place", failing)
    for _ in range(2):
        with pytest.raises(DataError, match="Input/output error"):
            bring(source, tmp_path / "stopped", **options)
    bring(source, tmp_path / "stopped", **options)
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")


def test_killed_behind_the_last_step_and_imported_again(tmp_path, source, bring, monkeypatch):
    options = {"format": "folder", "max_bad": 0.1}
    with monkeypatch.context() as patch:
        patch.setattr(job.shutil, "rmtree", killed_at_the_end(job.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            bring(source, **options)
    first = contents(tmp_path / "imported")
    shutil.rmtree(tmp_path / "imported")
    bring(source, **options)
    assert contents(tmp_path / "imported") == first


def killed_at_the_end(rmtree):
    def remove(path, **options):
        if path.name == ".imported.importing":
            raise KeyboardInterrupt
        rmtree(path, **options)

    return remove


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, source, tokenizer_folder, bring):
    rules = ["--tokenizer", str(tokenizer_folder), "--tile-size", "64", "--max-tiles", "4", "--max-frames", "8"]
    command = [sys.executable, "-m", "nemovl_train.cli", "data", "import", str(source), "--format", "folder"]
    command += [*rules, "--name", "same", "--max-bad", "0.1", "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, env=environment)
    rng = random.Random(3)
    killed = 0
    while True:
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "killed")], env=environment, start_new_session=True
        )
        try:
            assert process.wait(rng.uniform(2.5, 6.5)) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # the parent alone: its workers must leave by themselves
            process.wait()
            killed += 1
            deadline = time.monotonic() + 20
            while _alive(process.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not _alive(process.pid)
    assert killed >= 1
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def _alive(session: int) -> bool:
    found = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True).stdout
    return bool(found.split())


def test_another_import_is_not_continued_by_mistake(tmp_path, source, bring, monkeypatch):
    with pytest.raises(DataError, match=r"3 of 120 rows cannot be used.*missing.jpg") as caught:
        bring(source, format="folder")
    assert "--max-bad 0.03" in str(caught.value)
    monkeypatch.setattr(job, "_CHEAP_ROWS", 100)
    with pytest.raises(DataError, match=r"unfinished import of 120 rows with other ids; .* --restart"):
        bring(source, format="folder", ids="position")
    assert bring(source, format="folder", ids="position", restart=True, max_bad=0.03)["rows"] == 120


def test_a_repaired_source_starts_again_by_itself(tmp_path, source, bring):
    with pytest.raises(DataError, match=r"missing\.jpg"):
        bring(source, format="folder")
    for path in source.glob("*.jsonl"):
        path.write_text(path.read_text().replace("missing.jpg", "1.jpg"))
    assert bring(source, format="folder")["splits"]["train"]["samples"] == 120


def test_missing_media_that_were_brought_are_found(tmp_path, source, bring, monkeypatch, picture):
    run, ran = work.Worker.run, []
    monkeypatch.setattr(work.Worker, "run", lambda self, number, *rest: ran.append(number) or run(self, number, *rest))
    with pytest.raises(DataError, match=r"missing\.jpg"):
        bring(source, format="folder")
    (source / "missing.jpg").write_bytes(picture(60, 60, "JPEG"))
    ran.clear()
    assert bring(source, format="folder")["splits"]["train"]["samples"] == 120
    assert ran == [0, 4, 8]


@pytest.mark.parametrize("bad", [b"", b"no picture", "half"])
@pytest.mark.parametrize("heldout", [0.0, 0.5])
def test_media_that_were_mended_are_read_again(tmp_path, bring, lines, picture, bad, heldout):
    source, good = tmp_path / "photos", [picture(60, 60, "JPEG", seed=i) for i in range(8)]
    lines(source / "metadata.jsonl", [{"file_name": f"{i}.jpg", "question": "q", "answer": "a"} for i in range(8)])
    for i, data in enumerate(good):
        (source / f"{i}.jpg").write_bytes(data if i % 2 else data[:100] if bad == "half" else bad)
    with pytest.raises(DataError, match=r"4 of 8 rows(?s:.*)Repair the source and type the same command again"):
        bring(source, heldout=heldout)
    for i, data in enumerate(good):
        (source / f"{i}.jpg").write_bytes(data)
    assert sum(split["samples"] for split in bring(source, heldout=heldout)["splits"].values()) == 8


def test_restart_does_all_again(tmp_path, source, bring, monkeypatch):
    run, ran = work.Worker.run, []
    monkeypatch.setattr(work.Worker, "run", lambda self, number, *rest: ran.append(number) or run(self, number, *rest))
    for _ in range(2):
        with pytest.raises(DataError, match=r"missing\.jpg"):
            bring(source, format="folder", restart=True)
    assert ran == 2 * list(range(12))


def test_a_second_import_at_the_same_time_is_refused(tmp_path, source, bring):
    with job._locked(tmp_path / ".imported.importing"), pytest.raises(DataError, match="another import is writing"):
        bring(source, format="folder")


def test_limit_takes_the_first_of_each_split(tmp_path, bring, imported, lines):
    for split in ("train", "val"):
        lines(tmp_path / f"src/{split}.jsonl", [{"question": f"{split}{i}", "answer": "a"} for i in range(30)])
    bring(tmp_path / "src", limit=7)
    assert [record["id"] for record, _ in imported()] == [f"train.jsonl-{i:07d}" for i in range(7)]
    assert len(imported(split="validation")) == 7


def test_ids_that_repeat_are_left_out_or_renamed(tmp_path, bring, imported, rejected, lines):
    rows = [{"id": i % 3, "question": f"q{i}", "answer": "a"} for i in range(5)]
    lines(tmp_path / "src/a.jsonl", rows[:4])
    lines(tmp_path / "src/b.jsonl", rows[4:])
    with pytest.raises(DataError, match=r"2 of 5 rows .*a\.jsonl:4: id '0' is that of a\.jsonl:1;") as caught:
        bring(tmp_path / "src", max_bad=0.3)
    assert "--ids position" in str(caught.value)
    assert "--max-bad 0.40" in str(caught.value)
    assert not list((tmp_path / ".imported.importing").glob("final/*"))
    assert bring(tmp_path / "src", max_bad=0.4)["rejected"] == {"duplicate_id": 2}
    assert [record["id"] for record, _ in imported()] == ["0", "1", "2"]
    assert [(line["where"], line["key"]) for line in rejected()] == [("a.jsonl:4", "0"), ("b.jsonl:1", "1")]
    assert "is that of a.jsonl:1; import with --ids position" in rejected()[0]["message"]
    bring(tmp_path / "src", tmp_path / "second", ids="position")
    assert len(imported(tmp_path / "second")) == 5


def test_files_of_like_names_keep_all_samples(tmp_path, bring, imported, lines):
    names = ("a/b.jsonl", "a-b.jsonl", "a%2Fb.jsonl", "b.json", "b.jsonl")
    for name in names:
        lines(tmp_path / "src" / name, [{"question": name, "answer": "x"}])
    bring(tmp_path / "src")
    found = [record["id"] for record, _ in imported()]
    assert len(set(found)) == len(names)
    assert {"a%2Fb.jsonl-0000000", "a-b.jsonl-0000000", "a%252Fb.jsonl-0000000"} < set(found)


def test_advice_does_not_repeat_what_was_typed(tmp_path, bring):
    repeat = publish.Repeat("train", "k", "b:1", "a:1", 0, 1)
    result = work.UnitResult(0, "train", {"samples": 2}, 0, "")
    options = job.ImportOptions(source=tmp_path, out=tmp_path, tokenizer=tmp_path, rules=None, ids="position")
    with pytest.raises(DataError, match="b:1: id 'k' is that of a:1") as caught:
        job._check_share(options, [result], [repeat])
    assert "--ids" not in str(caught.value)


def test_every_bad_option_at_once(tmp_path, bring):
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError) as caught:
        bring(tmp_path, tmp_path / "out", task="x", columns={"y": "z"}, ids="q", box_format="b", box_units="u", limit=0,
              workers=0, max_bad=2, shard_mib=0, split="../evil", media_roots=(tmp_path / "none",))  # fmt: skip
    for word in ("exists already", "--task", "--column", "--ids", "--box-format", "--box-units", "--limit", "--workers",
                 "--max-bad", "--shard-mib", "--split '../evil'", "--media-root"):  # fmt: skip
        assert word in str(caught.value)


def test_a_place_inside_the_source_is_refused(tmp_path, source, bring):
    with pytest.raises(DataError, match="lies inside the source"):
        bring(source, source / "out")


def test_a_worker_that_dies_is_said(tmp_path, source, bring, monkeypatch):
    # A worker opens the tokenizer anew: where it is gone, the pool breaks as it does when memory runs out.
    original = job.WorkOptions
    gone = tmp_path / "gone"
    monkeypatch.setattr(job, "WorkOptions", lambda **options: original(**{**options, "tokenizer": gone}))
    with pytest.raises(DataError, match=r"a worker was killed .* finished parts are kept"):
        bring(source, format="folder", workers=2)


def test_json_is_cut_into_whole_records(tmp_path):
    rows = [{"text": 'a "quoted" [list], {brace} \\ ' * (i % 7), "n": [i, {"m": i}]} for i in range(100)]
    files = {"list.json": json.dumps(rows, indent=1), "lines.jsonl": "\n".join(map(json.dumps, rows)) + "\n\n"}
    for name, text in files.items():
        path = tmp_path / name
        path.write_text(text)
        for limits in ({"rows": 7}, {"size": 500}, {}):
            ranges = unit_ranges(path, **limits)
            data = path.read_bytes()
            spans = [
                span for r in ranges
                for span in json_ranges.record_spans(data, r.start, r.stop, as_list=name == "list.json")
            ]  # fmt: skip
            assert [json.loads(data[a:b]) for a, b in spans] == rows
            assert next(r.first for r in ranges) == 0
            assert len(ranges) == (15 if limits == {"rows": 7} else 1 if not limits else len(ranges))
    (tmp_path / "empty.jsonl").write_text("")
    assert unit_ranges(tmp_path / "empty.jsonl") == []
    (tmp_path / "none.json").write_text(" [ ] ")
    assert unit_ranges(tmp_path / "none.json") == []
