"""Repositories of the hub, by a stand-in for its client: what is asked for, and what an error says."""

import argparse
import json
from pathlib import Path

import huggingface_hub
import pytest

from nemovl_train.convert.cli import add_convert_commands
from nemovl_train.convert.source import local_folder
from nemovl_train.exceptions import ConversionError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> list[tuple]:
    calls: list[tuple] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((repo, revision, allow_patterns))
        return str(folders["vision"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


@pytest.mark.parametrize(
    ("source", "repo", "revision"),
    [("hf:org/name", "org/name", None), ("hf:org/na.me-1@refs/pr/2", "org/na.me-1", "refs/pr/2")],
)
def test_a_repository_is_fetched_without_code(source, repo, revision, asked, folders) -> None:
    assert local_folder(source) == folders["vision"]
    assert asked == [(repo, revision, ["*.safetensors", "*.json", "*.jinja"])]


def test_a_path_asks_nobody(asked, tmp_path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ConversionError, match="is not a folder"):
        local_folder(str(tmp_path / "none"))
    assert asked == []


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:a/b/c", "hf:org/name@", "hf:org/name@a b"])
def test_what_is_no_name_is_refused(source, asked) -> None:
    with pytest.raises(ConversionError, match="write hf:ORGANISATION/NAME"):
        local_folder(source)
    assert asked == []


def test_no_network_says_what_to_do(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\ntraceback")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConversionError, match=r"Name or service not known\); where there is no network, copy"):
        local_folder("hf:org/name")


def test_import_records_the_repository(asked, tmp_path, capsys, monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    parser = argparse.ArgumentParser()
    add_convert_commands(parser.add_subparsers())
    args = parser.parse_args(["convert", "import", "hf:org/name@main", "--out", str(tmp_path / "c"), "--json"])
    assert args.run(args) == 0
    state = Path(json.loads(capsys.readouterr().out)["checkpoint"]) / "state.json"
    assert json.loads(state.read_text())["source"] == "hf:org/name@main"
