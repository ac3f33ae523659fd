"""What is exported is what was there: read back by an import, by webdataset and by plain JSON."""

import json
from pathlib import Path

import pytest
import webdataset

from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.export import LAYOUTS, export
from data_pipelines.importers.job import ImportOptions, run_import
from data_pipelines.media.rules import RenderRules
from data_pipelines.quality.quarantine import set_aside
from data_pipelines.schema import content_items
from nemovl_train import cli


@pytest.fixture
def bring(tokenizer_folder, rules_options):
    def run(source, out, **options):
        rules = RenderRules(template="nano_v2_vl", use_thumbnail=True, **rules_options)
        run_import(ImportOptions(source=source, out=out, tokenizer=tokenizer_folder, rules=rules, max_bad=0, **options))
        return out

    return run


@pytest.fixture
def tool_sample():
    tools = ['{"name": "b", "description": "x", "aa": 1}']
    calls = [{"name": "b", "arguments": '{"z": 1, "a": "\\u00e9"}'}]
    messages = [
        {"role": "user", "content": "Use it."},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "7 it is."},
    ]
    return {"id": "tools", "tools": tools, "messages": messages}, {}


def rows(folder, split="train"):
    dataset = Dataset.open(folder, split)
    found = [(dataset.row(i), dataset.read(i)) for i in range(len(dataset))]
    dataset.close()
    return found


def meaning(stored):
    """Messages without the names of members, and the media in order."""
    messages = [
        {**m, "content": [{**i, i["type"]: None} if i["type"] != "text" else i for i in content_items(m)]}
        for m in stored.record["messages"]
    ]
    for message in messages:
        for item in message["content"]:
            item.pop("source", None)
    return stored.record["id"], stored.record.get("tools"), messages, list(stored.media.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout, mixed_samples, tool_sample, write, bring, tmp_path):
    first = write(tmp_path / "first", [*mixed_samples(12), tool_sample])
    export(first, tmp_path / "plain", layout=layout)
    second = bring(tmp_path / "plain", tmp_path / "second")
    before, after = rows(first), rows(second)
    assert [meaning(stored) for _, stored in before] == [meaning(stored) for _, stored in after]
    counts = ("tiles", "text_tokens", "total_tokens", "supervised_tokens")
    assert [[r[c] for c in counts] for r, _ in before] == [[r[c] for c in counts] for r, _ in after]
    # What an import made goes round bit for bit, names that the source gave the media included.
    again = tmp_path / "again"
    export(second, again, layout=layout)
    third = bring(again, tmp_path / "third")
    for name in ("train.parquet", "train-00000.tar"):
        assert (second / name).read_bytes() == (third / name).read_bytes()


def test_others_read_it(mixed_samples, write, tmp_path):
    folder = write(tmp_path / "first", mixed_samples(8))
    export(folder, tmp_path / "tars")
    lines = [json.loads(line) for line in (tmp_path / "tars/train.jsonl").read_text().splitlines()]
    members = {
        f"{sample['__key__']}.{name}": data
        for sample in webdataset.WebDataset(str(tmp_path / "tars/media/train-00000.tar"), shardshuffle=False)
        for name, data in sample.items()
        if not name.startswith("__")
    }
    named = [i[i["type"]] for line in lines for m in line["messages"] for i in content_items(m) if i["type"] != "text"]
    assert sorted(named) == sorted(members)
    stored = [data for _, sample in rows(folder) for data in sample.media.values()]
    assert [members[name] for name in named] == stored
    export(folder, tmp_path / "files", layout="folder")
    lines = [json.loads(line) for line in (tmp_path / "files/train/metadata.jsonl").read_text().splitlines()]
    named = [i[i["type"]] for line in lines for m in line["messages"] for i in content_items(m) if i["type"] != "text"]
    assert [(tmp_path / "files/train" / name).read_bytes() for name in named] == stored


def test_splits_and_samples_set_aside(mixed_samples, write, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("ds"), mixed_samples(6), "heldout")
    set_aside(Path("ds"), "heldout", {"text-0": "bad"})
    assert cli.main(["data", "export", "ds", "--out", "plain"]) == 0
    out = capsys.readouterr().out
    assert "heldout: 5 samples" in out
    assert "nemovl data import plain --out DATASET --like ds" in out
    assert cli.main(["data", "export", "ds", "--out", "plain"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["data", "export", "ds", "--out", "other", "--split", "train"]) == 2
    assert "no split 'train'; it has heldout" in capsys.readouterr().err
    assert cli.main(["data", "export", "ds", "--out", "other", "--layout", "zip"]) == 2
    assert not Path("other").exists()


def test_a_damaged_sample_is_named_and_nothing_is_left(mixed_samples, write, tmp_path):
    folder = write(tmp_path / "ds", mixed_samples(4))
    shard = folder / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"sample 'text-0' .* is damaged.*validate .* --quarantine"):
        export(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ds"]
