"""The demo folder as a whole: same bytes, complete or rebuilt, valid, within its lengths."""

import argparse
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from data_pipelines.cli import add_data_commands
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.demo import make, text
from data_pipelines.exceptions import DataError
from data_pipelines.loader import heldout_packs

SCALE = 0.02
MAX_TOKENS = {"code": 768, "long_facts": 4864, "video_clip": 256}


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_another_process_builds_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    # Another hash seed: nothing may depend on the order of a set.
    code = f"from data_pipelines.demo.make import make_demo; make_demo({str(tmp_path / 'b')!r}, scale={SCALE})"
    assert json.loads((demo / make.RECORD).read_text())["inputs"]["scale"] == SCALE
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert hashes(tmp_path / "b") == hashes(demo)


def test_lengths_fit_the_stages(demo: Path) -> None:
    record = json.loads((demo / make.RECORD).read_text())
    for name, demo_set in make.SETS.items():
        for split in ("train", "heldout"):
            manifest = pq.read_table(demo / name / f"{split}.parquet")
            assert manifest.num_rows == demo_set.count(split, SCALE) == record["datasets"][name][split]["samples"]
            assert max(manifest["total_tokens"].to_pylist()) <= MAX_TOKENS.get(name, 256)
    assert record["datasets"]["digits_read"]["train"]["mean_tiles"] == 1
    assert record["datasets"]["image_pair"]["train"]["mean_tiles"] == 2
    assert record["datasets"]["ocr_line"]["train"]["mean_tiles"] >= 3


def test_every_sample_is_as_long_in_its_pack_as_it_was_planned(demo: Path) -> None:
    shipped = yaml.safe_load((Path(__file__).parents[3] / "configs" / "data" / "tiny.yaml").read_text())
    options = {key: shipped[key] for key in make.RULES}
    for name in make.SETS:
        sources = {name: SourceConfig(path=str(demo / name))}
        config = DataConfig(sources=sources, tokenizer=str(demo / "tokenizer"), seq_length=4864, **options)
        for split in ("train", "heldout"):
            manifest = pq.read_table(demo / name / f"{split}.parquet", columns=["key", "total_tokens", "tiles"])
            planned = dict(zip(manifest["key"].to_pylist(), manifest["total_tokens"].to_pylist(), strict=True))
            found, tiles = {}, 0
            for pack in heldout_packs(config, tokens_per_tile=4, split=split):
                assert pack.stats["quarantined"] == 0
                lengths = pack.cu_seqlens.diff().tolist()
                found |= dict(zip(pack.sample_keys, lengths, strict=False))
                tiles += len(pack.tiles)
            assert found == planned, (name, split)
            assert tiles == sum(manifest["tiles"].to_pylist())


def test_the_shipped_configuration_asks_for_the_same_rules() -> None:
    shipped = yaml.safe_load((Path(__file__).parents[3] / "configs" / "data" / "tiny.yaml").read_text())
    assert {key: shipped[key] for key in make.RULES} == make.RULES


@pytest.fixture
def small(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the text set and a copied tokenizer, so that a build costs nothing."""
    monkeypatch.setattr(make, "SETS", {"text": make.DemoSet(text.generate, 200, 100)})
    monkeypatch.setattr(make, "train_demo_tokenizer", lambda out: shutil.copytree(demo / "tokenizer", out))


@pytest.mark.usefixtures("small")
def test_a_complete_demo_is_left_alone_and_another_one_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert not make.make_demo(out, scale=SCALE)["reused"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert make.make_demo(out, scale=SCALE)["reused"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    first = hashes(out)
    assert not make.make_demo(out, scale=SCALE, seed=5)["reused"]
    assert hashes(out)["text/train-00000.tar"] != first["text/train-00000.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("lost", ["demo.json", "text/train-00000.tar", "tokenizer/tokenizer.json"])
def test_a_half_written_demo_is_rebuilt(tmp_path: Path, lost: str) -> None:
    out = tmp_path / "demo"
    make.make_demo(out, scale=SCALE)
    whole = hashes(out)
    (out / lost).unlink()
    (tmp_path / ".demo.building").mkdir()  # what an interrupted build leaves
    assert not make.make_demo(out, scale=SCALE)["reused"]
    assert hashes(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.usefixtures("small")
def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        make.make_demo(tmp_path, scale=SCALE)
    with pytest.raises(DataError, match="is a file"):
        make.make_demo(tmp_path / "thesis.txt", scale=SCALE)
    with pytest.raises(DataError, match="cannot write the demo"):
        make.make_demo(tmp_path / "thesis.txt" / "demo", scale=SCALE)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.usefixtures("small")
def test_a_failed_build_leaves_the_old_demo_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "demo"
    make.make_demo(out, scale=SCALE)
    whole = hashes(out)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(make.shards, "write_dataset", full_disk)
    with pytest.raises(DataError, match="No space left"):
        make.make_demo(out, scale=SCALE, seed=5)
    assert hashes(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf")])
def test_a_senseless_scale_is_refused(tmp_path: Path, scale: float) -> None:
    with pytest.raises(DataError, match="positive number"):
        make.make_demo(tmp_path / "demo", scale=scale)


@pytest.mark.usefixtures("small")
def test_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    arguments = ["data", "make-demo", "--out", str(tmp_path / "demo"), "--scale", str(SCALE)]
    args = parser.parse_args(arguments)
    assert args.run(args) == 0
    assert "text" in capsys.readouterr().out
    args = parser.parse_args([*arguments, "--json"])
    assert args.run(args) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reused"]
    assert printed["datasets"]["text"]["train"]["samples"] == 4
