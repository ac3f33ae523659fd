"""Tables and the layouts that other tools write: what they stored is what is imported."""

import csv
import json
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipelines.exceptions import DataError
from data_pipelines.importers.csv_tables import CsvReader
from data_pipelines.importers.tables import ParquetReader
from data_pipelines.media.image import decode_image


def test_folder_saved_by_datasets_with_splits_and_classes(tmp_path, bring, imported, picture, texts):
    photos = [picture(20 + i, 20, seed=i) for i in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": p, "path": None} for p in photos], "label": [0, 1, 0, 1, 1]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    parts = datasets.DatasetDict({"train": whole.select([4, 0, 2]), "validation": whole.select([1, 3])})
    parts.save_to_disk(str(tmp_path / "saved"))
    result = bring(tmp_path / "saved")
    assert (result["format"], {k: v["samples"] for k, v in result["splits"].items()}) == (
        "hf", {"train": 3, "validation": 2},
    )  # fmt: skip
    assert [texts(record)[1] for record, _ in imported()] == ["dog", "cat", "cat"]
    assert [media["image0.png"] for _, media in imported()] == [photos[4], photos[0], photos[2]]
    assert [media["image0.png"] for _, media in imported(split="validation")] == [photos[1], photos[3]]


def test_parquet_in_cauldron_form_and_by_file_name_split(tmp_path, bring, imported, picture, texts):
    photos = [picture(20, 20, seed=i) for i in range(2)]
    turns = [{"user": "Both?", "assistant": "Yes.", "source": "x"}, {"user": "Sure?", "assistant": "Yes."}]
    rows = [{"images": [{"bytes": p, "path": None} for p in photos], "texts": turns}]
    (tmp_path / "hub/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub/data/train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows * 3), tmp_path / "hub/data/test-00000-of-00001.parquet")
    result = bring(tmp_path / "hub")
    assert {k: v["samples"] for k, v in result["splits"].items()} == {"test": 3, "train": 1}
    ((record, media),) = imported()
    assert texts(record) == ["Both?", "Yes.", "Sure?", "Yes."]
    assert list(media.values()) == photos


def test_parquet_is_cut_at_row_groups(tmp_path):
    table = pa.table({"question": ["q"] * 5000, "answer": ["a"] * 5000})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1000)
    units = ParquetReader().units(tmp_path, None)
    assert [(u.start, u.stop, u.first) for u in units] == [(0, 2, 0), (2, 4, 2000), (4, 5, 4000)]
    rows = list(ParquetReader().rows(tmp_path, units[2]))
    assert (len(rows), rows[0].position) == (1000, "t.parquet-0004000")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 but cut")
    with pytest.raises(DataError, match="not a complete Parquet file"):
        ParquetReader().units(tmp_path, None)


def test_webdataset_by_its_own_writer(tmp_path, bring, imported, picture, texts):
    photos = [picture(20, 20 + i, seed=i) for i in range(4)]
    (tmp_path / "shards").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "shards/out-%04d.tar"), maxcount=3, verbose=0) as writer:
        for i, photo in enumerate(photos):
            writer.write({"__key__": f"dir/s{i}", "png": photo, "json": {"question": f"q{i}", "answer": [f"a{i}"]}})
    assert bring(tmp_path / "shards")["format"] == "webdataset"
    samples = imported()
    assert [record["id"] for record, _ in samples] == [f"dir/s{i}" for i in range(4)]
    assert [texts(record) for record, _ in samples] == [[f"q{i}", f"a{i}"] for i in range(4)]
    assert [media["image0.png"] for _, media in samples] == photos


def test_our_own_folder_comes_back(tmp_path, bring, imported, mixed_folder, mixed_samples):
    assert bring(mixed_folder)["format"] == "webdataset"
    for (record, media), (before, media_before) in zip(imported(), mixed_samples(60), strict=True):
        assert record["id"] == before["id"]
        assert list(media.values()) == list(media_before.values())


def write_energon_shards(folder: Path, photos: list[bytes]) -> None:
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "part-%02d.tar"), maxcount=2, verbose=0) as writer:
        for i, photo in enumerate(photos):
            fields = {"ask": f"q{i}", "answers": [f"no{i}", f"yes{i}"], "weights": [0.2, 0.8]}
            writer.write({"__key__": f"s{i}", "png": photo, "json": fields})


FIELD_MAP = {
    "image": "jpg,png",
    "context": "json[ask]",
    "answers": "json[answers]",
    "answer_weights": "json[weights]",
}


def test_energon_folder(tmp_path, bring, imported, picture, texts):
    photos = [picture(20, 20, seed=i) for i in range(5)]
    write_energon_shards(tmp_path / "src", photos)
    (tmp_path / "src/.nv-meta").mkdir()
    spec = {"sample_type": {"__module__": "megatron.energon", "__class__": "VQASample"}, "field_map": FIELD_MAP}
    (tmp_path / "src/.nv-meta/dataset.yaml").write_text(json.dumps(spec))
    parts = {"split_parts": {"train": ["part-{00..01}.tar"], "val": ["part-02.tar"]}, "exclude": ["part-01.tar"]}
    (tmp_path / "src/.nv-meta/split.yaml").write_text(json.dumps(parts))
    result = bring(tmp_path / "src")
    assert (result["format"], {k: v["samples"] for k, v in result["splits"].items()}) == (
        "energon", {"train": 2, "validation": 1},
    )  # fmt: skip
    assert [texts(record) for record, _ in imported()] == [["q0", "yes0"], ["q1", "yes1"]]
    assert imported(split="validation")[0][1] == {"image0.png": photos[4]}
    (tmp_path / "src/.nv-meta/dataset.yaml").write_text(json.dumps({**spec, "sample_loader": "x.py:f"}))
    with pytest.raises(DataError, match="code of a dataset is not run"):
        bring(tmp_path / "src", tmp_path / "second")
    (tmp_path / "src/.nv-meta/dataset.yaml").write_text(json.dumps(spec))
    parts["split_parts"]["val"] = ["../part.tar"]
    (tmp_path / "src/.nv-meta/split.yaml").write_text(json.dumps(parts))
    with pytest.raises(DataError, match="not a file under"):
        bring(tmp_path / "src", tmp_path / "third")


def test_crude_energon_samples_are_read_by_their_fields(tmp_path, bring, imported, picture, texts):
    photo = picture(20, 20)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"},
    ]
    (tmp_path / "src/.nv-meta").mkdir(parents=True)
    with webdataset.TarWriter(str(tmp_path / "src/a.tar")) as writer:
        writer.write({"__key__": "s", "png": photo, "json": {"messages": messages}})
    (tmp_path / "src/.nv-meta/dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")
    (tmp_path / "src/.nv-meta/split.yaml").write_text("split_parts:\n  train: [a.tar]\nexclude: []\n")
    assert bring(tmp_path / "src")["format"] == "energon"
    ((record, media),) = imported()
    assert (texts(record), media) == (["q", "a"], {"image0.png": photo})


def test_energon_folder_prepared_by_energon_itself(tmp_path, bring, imported, texts):
    """Made once with `energon prepare --split-ratio 2,1,0 --sample-type VQASample --field-map ...` of version 7.4.1."""
    with tarfile.open(Path(__file__).parent / "energon_prepared.tar.xz") as tar:
        tar.extractall(tmp_path / "src", filter="data")
    assert (tmp_path / "src/.nv-meta/index.sqlite").exists()
    assert bring(tmp_path / "src")["format"] == "energon"
    train, validation = imported(), imported(split="validation")
    assert [texts(record) for record, _ in train + validation] == [[f"q{i}", f"yes{i}"] for i in range(5)]
    assert len(validation) == 1
    reds = [decode_image(media["image0.png"])[0, 0].tolist() for _, media in train + validation]
    assert reds == [[40 * i, 0, 0] for i in range(5)]


def test_csv_metadata(tmp_path, bring, imported, picture, rejected, texts):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/a b.png").write_bytes(picture(8, 8))
    table = 'file_name,question,answer\r\na b.png,"two\nlines, one field",yes\r\na b.png,q\r\na b.png,"n ""o""?",no\r\n'
    (tmp_path / "src/metadata.csv").write_text(table, newline="")
    assert bring(tmp_path / "src", max_bad=0.5)["format"] == "folder"
    assert [texts(record) for record, _ in imported()] == [["two\nlines, one field", "yes"], ['n "o"?', "no"]]
    assert rejected()[0]["message"] == "has 2 fields where the header line has 3"
    assert rejected()[0]["where"] == "metadata.csv:3"


def test_long_tables_are_cut_between_rows(tmp_path, bring, imported, texts):
    """Quoted line ends, quotes inside of words, a byte order mark: cut where the csv module itself sees a row end."""
    rows = [(f'line {i}\n"second", line' if i % 3 else f'5" disk {i}', f"a{i}") for i in range(5000)]
    path = tmp_path / "table.tsv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("question", "answer"))
        for row in rows:
            if row[0].startswith("5"):
                file.write("\t".join(row) + "\r\n")  # the csv module would quote what may stand bare
            else:
                writer.writerow(row)
    units = CsvReader().units(path, None)
    assert [unit.first for unit in units] == [0, 2048, 4096]
    assert [(u.start, v.stop) for u, v in zip(units[1:], units, strict=False)] == [
        (u.start, u.start) for u in units[1:]
    ]
    bring(path)
    assert [tuple(texts(record)) for record, _ in imported()] == rows
    (tmp_path / "twice.csv").write_text("question,answer,answer\nq,a,b\n")
    with pytest.raises(DataError, match="two columns 'answer'"):
        bring(tmp_path / "twice.csv", tmp_path / "second")


def test_tar_index_survives_odd_members(tmp_path, bring, imported, lines, picture):
    (tmp_path / "src/media").mkdir(parents=True)
    with tarfile.open(tmp_path / "src/media/shard_0.tar", "w") as tar:
        link = tarfile.TarInfo("secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    message = [{"type": "image", "image": "secret.png"}, {"type": "text", "text": "q"}]
    rows = [{"id": "x", "messages": [{"role": "user", "content": message}, {"role": "assistant", "content": "a"}]}]
    lines(tmp_path / "src/set.jsonl", rows)
    with pytest.raises(DataError, match=r"image 'secret.png' is not in the source folder"):
        bring(tmp_path / "src")
