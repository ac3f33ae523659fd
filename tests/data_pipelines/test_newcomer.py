"""A folder of photos with questions and answers, on the command line, as somebody new would go about it."""

import json

import pytest

from data_pipelines.dataset import Dataset
from data_pipelines.loader import PackStream
from nemovl_train import cli


@pytest.fixture
def say(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def photos(tmp_path, picture, lines):
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for i in range(50):
        (folder / f"p{i:02d}.jpg").write_bytes(picture(100 + 6 * i, 120, "JPEG", seed=i))
        rows.append({"file_name": f"p{i:02d}.jpg", "question": "What is it?", "answer": f"It is number {i}."})
    lines(folder / "metadata.jsonl", rows)
    return folder


@pytest.fixture
def rules(tokenizer_folder):
    return ["--tokenizer", tokenizer_folder, "--tile-size", 64, "--max-tiles", 4, "--max-frames", 8]


@pytest.fixture(scope="session")
def lines():
    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def test_three_commands(say, photos, rules, tmp_path, configure):
    code, out, err = say("data", "import", "photos", "--out", "ds", *rules)
    assert code == 0
    assert "train: 50 samples" in out
    assert "next: nemovl data validate ds" in out
    assert "format folder" in err
    code, out, _ = say("data", "validate", "ds", "--html", "report.html")
    assert code == 0
    assert "50 samples" in out
    assert "0 errors, 0 warnings" in out
    assert "next: nemovl data show ds" in out
    code, out, _ = say("data", "show", "ds", "--pack", 0, "--seq-length", 400, "--html", "pack.html")
    assert (code, out) == (0, "wrote pack.html\n")
    page = (tmp_path / "pack.html").read_text()
    assert page.count("It is number") > 3
    assert "data:image/jpeg" in page
    # What was shown is what a run on the folder trains on.
    config = configure({"ds": tmp_path / "ds"}, window_samples=4096)
    stream = PackStream(config, tokens_per_tile=4, seed=1234, global_batch=1)
    (pack,) = next(stream)
    assert all(f"<h2>{i}: {key}</h2>" in page for i, key in enumerate(pack.sample_keys))
    stream.close()


def test_every_error_says_what_to_type_next(say, photos, rules, tmp_path, mixed_folder):
    code, _, err = say("data", "import", "photos", "--out", "ds")
    assert code == 2
    assert "--tokenizer runs/tiny/hf --tile-size 64" in err
    code, _, err = say("data", "import", "photos", "--out", "ds", "--like", mixed_folder)
    assert code == 2
    assert "holds no tokenizer of its own: add --tokenizer FOLDER, the one it was counted with" in err
    code, _, err = say("data", "import", "photos", "--out", "ds", *rules, "--video-pruning-rate", 1)
    assert code == 2
    assert "video_pruning_rate 1.0 must be at least 0 (all tokens) and below 1" in err
    code, _, err = say("data", "validate", "photos")
    assert code == 2
    assert "nemovl data import photos --out DATASET" in err
    metadata = (photos / "metadata.jsonl").read_text()
    (photos / "metadata.jsonl").unlink()
    code, _, err = say("data", "import", "photos", "--out", "ds", *rules)
    assert code == 2
    assert 'put metadata.jsonl beside them, one line like {"file_name": "NAME.jpg"' in err
    (photos / "metadata.jsonl").write_text(metadata.replace("question", "frage"))
    code, _, err = say("data", "import", "photos", "--out", "ds", *rules)
    assert code == 2
    assert "--column ROLE=COLUMN" in err
    (photos / "metadata.jsonl").write_text(metadata.replace("p07.jpg", "P07.JPG"))
    code, _, err = say("data", "import", "photos", "--out", "ds", *rules, "--max-bad", 0)
    assert code == 2
    assert "metadata.jsonl:8: image 'P07.JPG' is not in" in err
    assert "--max-bad 0.02" in err
    assert not (tmp_path / "ds").exists()


def test_bad_samples_are_set_aside_and_come_back(say, photos, rules, tmp_path):
    data = (photos / "p05.jpg").read_bytes()
    (photos / "p05.jpg").write_bytes(data[: len(data) // 2])
    (photos / "p06.jpg").write_bytes(b"")
    code, out, _ = say("data", "import", "photos", "--out", "ds", *rules)
    assert code == 0
    assert "left out (media): 1" in out
    code, out, _ = say("data", "quarantine", "list", "ds")
    assert "not imported: train/metadata.jsonl-0000006: media: " in out
    code, out, _ = say("data", "validate", "ds", "--json")
    report = json.loads(out)
    assert code == 1
    assert [(p["key"], p["check"]) for p in report["problems"]] == [("metadata.jsonl-0000005", "image")]
    assert say("data", "validate", "ds", "--quarantine")[0] == 0
    assert say("data", "validate", "ds")[0] == 0
    assert len(Dataset.open(tmp_path / "ds", "train")) == 48
    assert "set aside: train/metadata.jsonl-0000005: image: " in say("data", "quarantine", "list", "ds")[1]
    assert say("data", "quarantine", "restore", "ds")[1] == "restored 1 samples of ds\n"
    assert len(Dataset.open(tmp_path / "ds", "train")) == 49
    code, _, err = say("data", "quarantine", "add", "ds")
    assert code == 2
    assert "nemovl data quarantine add ds KEY" in err
    added = say(
        "data", "quarantine", "add", "ds", "metadata.jsonl-0000001", "--key", "metadata.jsonl-0000002", "--json"
    )
    assert json.loads(added[1]) == {"add": 2}
    code, _, err = say("data", "quarantine", "add", "ds", "metadata.jsonl-000003")
    assert code == 2
    assert "did you mean 'metadata.jsonl-" in err


def test_a_held_out_share_and_an_export_that_comes_back(say, photos, rules, tmp_path):
    code, out, _ = say("data", "import", "photos", "--out", "ds", *rules, "--heldout", 0.2, "--workers", 1)
    assert code == 0
    assert "heldout: " in out
    assert say("data", "dedup", "ds", "--workers", 1)[0] == 0
    assert say("data", "export", "ds", "--out", "plain", "--layout", "folder")[0] == 0
    assert say("data", "import", "plain", "--out", "back", "--like", "ds", "--workers", 1)[0] == 0
    for name in ("train.parquet", "heldout.parquet"):  # hashes of all samples are in there
        assert (tmp_path / "ds" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_look_at_a_folder(say, photos, rules):
    say("data", "import", "photos", "--out", "ds", *rules)
    (stats,) = json.loads(say("data", "stats", "ds", "--json")[1])
    assert stats["splits"]["train"]["samples"] == 50
    assert "50 images" in say("data", "stats", "ds", "ds")[1]
    code, out, _ = say("data", "show", "ds", "--key", "metadata.jsonl-0000003")
    assert code == 0
    assert "It is number 3." in out
    shown = json.loads(say("data", "show", "ds", "--sample", 4, "--json")[1])
    assert shown["documents"][0]["key"] == "metadata.jsonl-0000004"
    assert say("data", "show")[0] == say("data", "show", "ds", "ds")[0] == 2
    assert say("data", "show", "ds", "--seq-length", 0)[0] == 2
    code, out, _ = say("data", "import", "photos", "--out", "again", "--like", "ds", "--json")
    assert json.loads(out)["splits"]["train"] == {
        name: stats["splits"]["train"][name] if name == "samples" else json.loads(out)["splits"]["train"][name]
        for name in ("samples", "tiles", "total_tokens", "supervised_tokens")
    }
    assert (stats["rules"]["tile_size"], code) == (64, 0)


def test_prepare_and_import(say, rules, tmp_path, clip, lines):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/v.mp4").write_bytes(clip(40, 10))
    lines(tmp_path / "clips/metadata.jsonl", [{"video": "v.mp4", "question": "q", "answer": "a"}])
    code, out, _ = say("data", "frames", "clips", "--out", "few", "--side", 32)
    assert code == 0
    assert "1 videos, 8 frames" in out
    assert say("data", "import", "few", "--out", "ds", *rules)[0] == 0
    assert "8 frames" in say("data", "show", "ds")[1]
    assert say("data", "frames", "none", "--out", "x")[0] == 2
    assert say("data", "render-pdf", "clips", "--out", "x")[0] == 2
