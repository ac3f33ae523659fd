import json
import os
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.quality import quarantine
from data_pipelines.quality.quarantine import listing, restore, set_aside


@pytest.fixture
def folder(tmp_path, write, mixed_samples):
    return write(tmp_path / "d", mixed_samples(12), shard_mib=0.005)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def keys(folder):
    dataset = Dataset.open(folder, "train")
    return [dataset.key(i) for i in range(len(dataset))]


def test_set_aside_and_restored(folder):
    before, files = keys(folder), contents(folder)
    assert set_aside(folder, "train", {before[3]: "image: cut", before[7]: "text"}) == 2
    assert keys(folder) == [key for key in before if key not in (before[3], before[7])]
    info = json.loads((folder / "dataset.json").read_text())["splits"]["train"]
    dataset = Dataset.open(folder, "train")
    assert (info["samples"], info["total_tokens"]) == (10, int(dataset.lengths.sum()))
    assert [dataset.read(i).record["id"] for i in range(10)] == keys(folder)
    assert [(line["kind"], line["key"], line["reason"]) for line in listing(folder)] == [
        ("set aside", before[3], "image: cut"),
        ("set aside", before[7], "text"),
    ]
    assert set_aside(folder, "train", {before[3]: "again"}) == 0
    first = contents(folder)["train.parquet"]
    assert first != files["train.parquet"]
    assert restore(folder, "train", [before[7]]) == 1
    assert restore(folder, "train") == 1
    assert keys(folder) == before
    assert listing(folder) == []
    assert restore(folder, "train") == 0
    # The very bytes are back, so a plan made of them is the plan that a run was under.
    after = contents(folder)
    assert {name: after[name] for name in files} == files
    set_aside(folder, "train", {before[3]: "x", before[7]: "y"})
    assert contents(folder)["train.parquet"] == first


def test_bad_requests_change_nothing(folder):
    before = contents(folder)
    with pytest.raises(DataError, match="no sample 'nobody'"):
        set_aside(folder, "train", {"nobody": "x"})
    with pytest.raises(DataError, match="no split 'dev'"):
        set_aside(folder, "dev", {"nobody": "x"})
    with pytest.raises(DataError, match="every sample"):
        set_aside(folder, "train", dict.fromkeys(keys(folder), "x"))
    with pytest.raises(DataError, match="is not set aside"):
        restore(folder, "train", ["text-0"])
    assert contents(folder) == before


@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_a_move_cut_short_is_finished_by_the_next_call(folder, monkeypatch, moves):
    before = keys(folder)
    replace, done = os.replace, []

    def failing(source, target):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(quarantine.os, "replace", failing)
    with pytest.raises(KeyboardInterrupt):
        set_aside(folder, "train", {before[0]: "x"})
    monkeypatch.setattr(quarantine.os, "replace", replace)
    assert "dataset.json" not in [path.name for path in done]
    with pytest.raises(DataError, match=f"to finish it: nemovl data quarantine list {folder}$"):
        Dataset.open(folder, "train")
    assert [line["key"] for line in listing(folder)] == [before[0]]
    assert keys(folder) == before[1:]
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_two_at_a_time_wait_for_each_other(folder):
    # Each thread opens the folder by itself, so they lock each other out as processes do.
    before = keys(folder)
    with ThreadPoolExecutor() as pool:
        with quarantine._locked(folder):
            running = [pool.submit(set_aside, folder, "train", {key: "x"}) for key in before[:4]]
            assert not wait(running, timeout=0.2).done
        assert [future.result() for future in running] == [1, 1, 1, 1]
    assert keys(folder) == before[4:]
