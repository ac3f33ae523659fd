import errno
import json
import pickle
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipelines import shards
from data_pipelines.config import DataConfig, ReadConfig
from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.fit import shrink_sample
from data_pipelines.media.rules import RenderRules
from data_pipelines.storage import Storage
from data_pipelines.tokenizer import TextTokenizer


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_input_gives_the_same_bytes(tmp_path, write, mixed_samples):
    first = write(tmp_path / "a", mixed_samples(20), name="same", shard_mib=1)
    second = write(tmp_path / "b", iter(mixed_samples(20)), name="same", shard_mib=1)
    assert contents(first) == contents(second)


def test_reads_back_what_was_written(tmp_path, write, mixed_samples, monkeypatch):
    samples = mixed_samples(12)
    monkeypatch.setattr(Storage, "_MAX_OPEN_FILES", 2)
    folder = write(tmp_path / "d", samples, shard_mib=0.005)
    dataset = pickle.loads(pickle.dumps(Dataset.open(folder, "train")))
    assert len(list(folder.glob("*.tar"))) > 3
    assert len(dataset) == 12
    for i in reversed(range(12)):
        stored = dataset.read(i)
        assert (stored.record, stored.media) == samples[i]
        assert dataset.key(i) == samples[i][0]["id"]
    dataset.close()
    info = json.loads((folder / "dataset.json").read_text())["splits"]["train"]
    assert info["samples"] == 12
    assert info["total_tokens"] == dataset.lengths.sum()


def test_shards_are_plain_webdataset(mixed_folder, mixed_samples):
    first = next(iter(webdataset.WebDataset(str(mixed_folder / "train-00000.tar"), shardshuffle=False)))
    assert json.loads(first["json"])["id"] == mixed_samples(1)[0][0]["id"]
    with tarfile.open(mixed_folder / "train-00000.tar") as tar:
        assert all(m.mtime == 0 and m.uid == 0 and m.uname == "" for m in tar)


def test_metadata_of_a_video_are_taken_from_the_record(tmp_path, write, record, clip):
    sample = record("v", "when?", "x", videos=1)
    metadata = {"video_width": 32, "video_height": 32, "video_fps": 10, "video_num_frames": 20, "video_duration": 2.0}
    sample["messages"][0]["content"][0]["metadata"] = metadata
    dataset = Dataset.open(write(tmp_path / "d", [(sample, {"video0.mp4": clip(40)})]), "train")
    assert dataset.shapes(0)[0].frames == 20


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ([({"id": "a", "messages": []}, {})], "'messages' must be"),
        ([("twice", {}), ("twice", {})], "used twice"),
        ([("a", {"extra.png": b""})], r"name the media \[\], but \['extra.png'\]"),
        ([], "has no samples"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, write, record, samples, reason):
    made = [(record(r, "q", "a") if isinstance(r, str) else r, media) for r, media in samples]
    with pytest.raises(DataError, match=reason):
        write(tmp_path / "d", made)
    assert list(tmp_path.iterdir()) == []


def test_unreadable_image_names_the_record(tmp_path, write, record):
    with pytest.raises(DataError, match=r"record 'p', image 'image0.png': not a readable image"):
        write(tmp_path / "d", [(record("p", "q", "a", images=1), {"image0.png": b"GIF89a"})])


def test_existing_folder_is_kept(tmp_path, write, mixed_samples):
    write(tmp_path / "d", mixed_samples(2))
    before = contents(tmp_path / "d")
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path / "d", mixed_samples(3))
    assert contents(tmp_path / "d") == before


def test_full_disk_is_a_clear_error(tmp_path, write, mixed_samples, monkeypatch):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "_fill_offsets", no_space)
    with pytest.raises(DataError, match="the disk is full"):
        write(tmp_path / "d", mixed_samples(2))
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizer_rules_or_version_are_refused(mixed_folder, other_tokenizer_folder, tokenizer, rules_options):
    rules = RenderRules.from_config(DataConfig(**rules_options))
    Dataset.open(mixed_folder, "train", rules=rules, tokenizer=tokenizer)
    with pytest.raises(DataError, match="counted with other rules: the tokenizer"):
        Dataset.open(mixed_folder, "train", rules=rules, tokenizer=TextTokenizer(other_tokenizer_folder))
    other = RenderRules.from_config(DataConfig(**{**rules_options, "max_tiles": 6}))
    with pytest.raises(DataError, match=r"max_tiles \(4, the run has 6\)"):
        Dataset.open(mixed_folder, "train", rules=other)
    with pytest.raises(DataError, match="no split 'dev'; it has train"):
        Dataset.open(mixed_folder, "dev")
    nowhere = mixed_folder / "nowhere"
    with pytest.raises(DataError, match=rf"no dataset folder there; make it with nemovl data import .* {nowhere} "):
        Dataset.open(nowhere, "train")
    nowhere.mkdir()
    with pytest.raises(DataError, match=rf"not a dataset folder yet; .* nemovl data import {nowhere} --out DATASET"):
        Dataset.open(nowhere, "train")


def test_a_changed_or_missing_manifest_is_refused(tmp_path, write, mixed_samples):
    folder = write(tmp_path / "d", mixed_samples(4))
    manifest = folder / "train.parquet"
    table = pq.read_table(manifest)
    manifest.unlink()
    pq.write_table(table, manifest, compression="none")
    with pytest.raises(DataError, match=r"train\.parquet is not the file that dataset\.json describes.*copy or write"):
        Dataset.open(folder, "train")
    manifest.unlink()
    with pytest.raises(DataError, match=r"train\.parquet is missing; copy or write"):
        Dataset.open(folder, "train")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_damaged_manifest_or_index_is_found(tmp_path, write, mixed_samples):
    folder = write(tmp_path / "d", mixed_samples(4))
    flip(folder / "train.parquet", 60)  # inside the first column's page, which opening does not read
    dataset = Dataset.open(folder, "train", read=ReadConfig(attempts=1))
    with pytest.raises(DataError, match=r"train\.parquet cannot be read: OSError: .*CRC"):
        dataset.row(0)
    flip(folder / "train.parquet", 60)
    assert dataset.row(0)["key"] == "text-0", "it was opened again"
    flip(folder / "train.npy", -1)
    with pytest.raises(DataError, match=r"train\.npy is not the file that dataset\.json describes"):
        Dataset.open(folder, "train")


def test_rows_are_found_in_any_row_group(tmp_path, write, mixed_samples, monkeypatch):
    monkeypatch.setattr(shards, "ROW_GROUP", 3)
    folder = write(tmp_path / "d", mixed_samples(20), shard_mib=0.05)
    assert pq.ParquetFile(folder / "train.parquet").num_row_groups > 6
    dataset = Dataset.open(folder, "train")
    keys = [record["id"] for record, _ in mixed_samples(20)]
    assert [dataset.key(i) for i in reversed(range(20))] == keys[::-1]
    assert [dataset.row(i)["total_tokens"] for i in range(20)] == dataset.lengths.tolist()
    for beyond in (-1, 20):
        with pytest.raises(IndexError):
            dataset.row(beyond)


def test_least_tokens_is_where_shrinking_ends(mixed_folder, tokenizer, rules_options):
    dataset = Dataset.open(mixed_folder, "train")
    rules = RenderRules.from_config(DataConfig(**rules_options))
    for row in range(len(dataset)):
        least, text = int(dataset.least_tokens[row]), int(dataset.text_tokens[row])
        assert least <= dataset.lengths[row]
        if least < dataset.lengths[row]:
            assert shrink_sample(dataset.shapes(row), text, least, rules, tokenizer).length == least
        assert shrink_sample(dataset.shapes(row), text, least - 1, rules, tokenizer) is None


@pytest.mark.parametrize("name", ["../train-00000.tar", "/etc/passwd", "..", "", "sub/x.tar", None])
def test_shard_names_are_plain(tmp_path, write, mixed_samples, name):
    folder = write(tmp_path / "d", mixed_samples(2))
    info = json.loads((folder / "dataset.json").read_text())
    info["splits"]["train"]["shards"][0]["name"] = name
    (folder / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"dataset\.json names the file .*expected a plain file name"):
        Dataset.open(folder, "train")


def test_damage_is_found(tmp_path, write, mixed_samples):
    folder = write(tmp_path / "d", mixed_samples(4))
    dataset = Dataset.open(folder, "train")
    shard = folder / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[dataset.row(1)["media"][0]["offset"] + 50] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    dataset.read(0)
    with pytest.raises(DataError, match="damaged"):
        dataset.read(1)
    shard.write_bytes(data[:-512])
    with pytest.raises(DataError, match="bytes long, expected"):
        Dataset.open(folder, "train")
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**info, "format_version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        Dataset.open(folder, "train")


@pytest.mark.parametrize("split", ["../evil", "", "-x", ".hidden", "a b", "a/b", "train\n"])
def test_a_split_is_a_plain_word(tmp_path, write, mixed_samples, split):
    with pytest.raises(DataError, match="is not a name for a split"):
        write(tmp_path / "d", mixed_samples(1), split=split)
    assert list(tmp_path.iterdir()) == []
