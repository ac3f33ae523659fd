"""Every kind of problem is found, named with file, key, reason and fix, and nothing else is."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

from data_pipelines import shards
from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.quality import validate as validation
from data_pipelines.quality.checks import text_problems, think_problem
from data_pipelines.quality.quarantine import set_aside
from data_pipelines.quality.validate import validate
from data_pipelines.show import templates


def found(report):
    return [(p.severity, p.check, p.key) for p in report.problems]


def test_a_good_folder_has_no_problems(mixed_folder, tokenizer_folder):
    report = validate(mixed_folder, tokenizer=tokenizer_folder, seq_length=4000)
    # The fixture repeats pictures and texts under other ids only where the answer differs.
    assert found(report) == []
    assert (report.samples, report.lengths_checked) == (60, True)
    assert validate(mixed_folder, fast=True).problems == []


def test_processes_find_the_same(tmp_path, write, mixed_samples, tokenizer_folder):
    folder = write(tmp_path / "d", mixed_samples(130))
    damage(folder, 5)
    one, three = (validate(folder, tokenizer=tokenizer_folder, workers=n) for n in (1, 3))
    assert one.problems == three.problems
    assert [p.check for p in one.problems if p.severity == "error"] == ["storage"]


class CountingPool(ThreadPoolExecutor):
    """Counts the results that nobody has taken yet."""

    waiting = most = 0

    def submit(self, *args):
        CountingPool.waiting += 1
        CountingPool.most = max(self.most, self.waiting)
        future = super().submit(*args)
        take = future.result

        def result():
            CountingPool.waiting -= 1
            return take()

        future.result = result
        return future


def test_chunks_are_handed_out_as_they_are_done(mixed_folder, monkeypatch):
    monkeypatch.setattr(validation, "_CHUNK", 1)
    monkeypatch.setattr(validation, "process_pool", lambda n, start, spec: (start(spec), CountingPool(1))[1])
    assert validate(mixed_folder, fast=True, workers=2).samples == 60
    assert (CountingPool.waiting, CountingPool.most) == (0, 8)


def test_keys_are_looked_up_for_duplicates_alone(tmp_path, write, record, monkeypatch):
    samples = [(record(f"k{i}", "q", f"a{i % 9}"), {}) for i in range(10)]
    folder = write(tmp_path / "d", samples)
    asked = []
    key = Dataset.key
    monkeypatch.setattr(Dataset, "key", lambda self, row: asked.append(row) or key(self, row))
    (problem,) = validate(folder, fast=True).problems
    assert (problem.check, problem.key, problem.reason) == ("duplicate", "k9", "same messages and media as 'k0'")
    assert sorted(asked) == [0, 9]


def damage(folder, row):
    """Flip a byte of a sample's record."""
    entry = pq.read_table(folder / "train.parquet").slice(row, 1).to_pylist()[0]
    path = folder / f"train-{entry['shard']:05d}.tar"
    data = bytearray(path.read_bytes())
    data[entry["json_offset"] + 3] ^= 1
    path.write_bytes(data)
    return entry["key"]


def test_each_problem_is_named_once(tmp_path, write, record, picture, clip, tokenizer_folder, monkeypatch):
    cut = picture(200, 200, "JPEG")[:-2000]
    video = record("short", "when?", "x", videos=1)
    video["messages"][0]["content"][0]["metadata"] = {
        "video_width": 32, "video_height": 32, "video_fps": 10, "video_num_frames": 400,
    }  # fmt: skip
    samples = [
        (record("fine", "q", "a"), {}),
        (record("cut", "q", "a", images=1), {"image0.png": cut}),
        (video, {"video0.mp4": clip(40)}),
        (record("silent", "q", "  "), {}),
        (record("open", "/think q", "<think>\nno end"), {}),
        (record("tag", "see <image>", "a"), {}),
        (record("again", "q", "a"), {}),
        (record("long", "q " * 500, "a"), {}),
        (record("damaged", "q2", "a"), {}),
    ]
    folder = write(tmp_path / "d", samples)
    assert damage(folder, 8) == "damaged"
    report = validate(folder, tokenizer=tokenizer_folder, seq_length=300)
    assert found(report) == [
        ("error", "image", "cut"),
        ("error", "video", "short"),
        ("warning", "empty_answer", "silent"),
        ("warning", "think", "open"),
        ("warning", "unused_tag", "tag"),
        ("warning", "duplicate", "again"),
        ("warning", "too_long", "long"),
        ("error", "storage", "damaged"),
    ]
    assert all(p.reason and p.fix and (p.file == "train-00000.tar" or p.check == "duplicate") for p in report.problems)
    fast = validate(folder, fast=True)
    assert ("error", "image", "cut") not in found(fast)
    assert ("error", "storage", "damaged") in found(fast)
    page = templates().get_template("validate.html").render(report=report, limit=3)
    assert "3 errors" in page
    assert "5 more are in the JSON report" in page
    json.dumps(report.as_json())


def test_a_folder_that_is_not_whole_is_an_error_of_its_own(
    tmp_path, mixed_folder, tokenizer_folder, other_tokenizer_folder
):
    folder = tmp_path / "copy"
    shutil.copytree(mixed_folder, folder)
    (folder / "train-00000.tar").unlink()
    (problem,) = validate(folder).problems
    assert (problem.check, problem.row) == ("folder", -1)
    assert "missing" in problem.reason
    with pytest.raises(DataError, match="counted with another tokenizer"):
        validate(mixed_folder, tokenizer=other_tokenizer_folder)
    with pytest.raises(DataError, match="no split 'dev'"):
        validate(mixed_folder, split="dev")


def test_a_damaged_page_of_the_manifest_is_found(tmp_path, mixed_folder):
    folder = tmp_path / "copy"
    shutil.copytree(mixed_folder, folder)
    path = folder / "train.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    (problem,) = validate(folder, fast=True).problems
    assert (problem.check, problem.row) == ("folder", -1)
    assert "train.parquet is damaged" in problem.reason
    with pytest.raises(DataError, match=r"train\.parquet is damaged"):
        set_aside(folder, "train", {"key": "why"})


def test_lengths_counted_otherwise_are_found(tmp_path, write, record, tokenizer_folder, monkeypatch):
    describe = shards.describe
    monkeypatch.setattr(shards, "describe", lambda *a: {**describe(*a), "total_tokens": 7})
    folder = write(tmp_path / "d", [(record("a", "q", "a"), {})])
    assert found(validate(folder, tokenizer=tokenizer_folder)) == [("error", "length", "a")]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("plain", ""),
        ("<think>\nwhy</think>because", ""),
        ("why</think>because", ""),
        ("<think>a</think>b<think>c</think>", "2 <think> and 2 </think>"),
        ("<think>a", "never closed"),
        ("a</think><think>b", "stands before"),
        ("so <think>a</think>b", "text before"),
    ],
)
def test_think_tags(answer, problem):
    assert problem in think_problem(answer)
    assert bool(problem) == bool(think_problem(answer))


def test_text_problems(record):
    assert next(iter(text_problems(record("a", "/think q", "<think>x</think>"))))[0] == "empty_answer"
    assert [c for c, _ in text_problems(record("a", "q", "<think>\nx</think>y"))] == ["think_off"]
    for question, answer in (("/think q", "<think>\nx</think>y"), ("q", "<think></think>y"), ("q", "y")):
        assert list(text_problems(record("a", question, answer))) == []
    assert list(text_problems(record("a", "<image> word", "a", literal=True))) == []
    assert list(text_problems(record("a", "<image>", "a", images=1))) == []
    turns = record("a", "q", "yes")
    turns["messages"] *= 2
    assert [check for check, _ in text_problems(turns)] == ["repeated_answer"]
