import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.dataset import Dataset
from data_pipelines.importers.job import ImportOptions, run_import
from data_pipelines.importers.tasks import ColumnOptions
from data_pipelines.media.rules import RenderRules


@pytest.fixture
def bring(tmp_path: Path, tokenizer_folder: Path, rules_options: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """Import a source with the test's tokenizer and rules; options of columns may be given beside the others."""

    def run(source: Path, out: Path | None = None, **options: Any) -> dict[str, Any]:
        rules = RenderRules(template="nano_v2_vl", use_thumbnail=True, **rules_options)
        names = {field.name for field in fields(ColumnOptions)}
        columns = ColumnOptions(**{"columns": {}, **{k: options.pop(k) for k in list(options) if k in names}})
        settings = {"max_bad": 0.0, "shard_mib": 1, "allow_text": True, **options}
        target = out or tmp_path / "imported"
        job = ImportOptions(
            source=source, out=target, tokenizer=tokenizer_folder, rules=rules, columns=columns, **settings
        )
        return run_import(job)

    return run


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., list[tuple[dict[str, Any], dict[str, bytes]]]]:
    """Every sample of an imported split."""

    def read(out: Path | None = None, split: str = "train") -> list[tuple[dict[str, Any], dict[str, bytes]]]:
        dataset = Dataset.open(out or tmp_path / "imported", split)
        samples = [dataset.read(i) for i in range(len(dataset))]
        dataset.close()
        return [(sample.record, sample.media) for sample in samples]

    return read


@pytest.fixture
def rejected(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Lines of the list of rejected rows."""

    def read(out: Path | None = None) -> list[dict[str, Any]]:
        path = (out or tmp_path / "imported") / "rejected.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    return read


@pytest.fixture
def lines() -> Callable[..., Path]:
    """Write JSON lines."""

    def write(path: Path, rows: list[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def texts() -> Callable[[dict[str, Any]], list[str]]:
    """Text of each message of a record."""

    def read(record: dict[str, Any]) -> list[str]:
        parts = [[item["text"] for item in m["content"] if item["type"] == "text"] for m in record["messages"]]
        return ["".join(part) for part in parts]

    return read
