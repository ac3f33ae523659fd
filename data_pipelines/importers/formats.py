"""The formats that can be imported, and which of them a source is."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.exceptions import DataError
from data_pipelines.importers.conversations import has_conversation
from data_pipelines.importers.csv_tables import CSV_SUFFIXES, CsvReader
from data_pipelines.importers.documents import CODE_SUFFIXES, TEXT_SUFFIXES, PdfReader, TextReader
from data_pipelines.importers.energon import META, EnergonReader
from data_pipelines.importers.json_ranges import is_list, map_file, record_spans
from data_pipelines.importers.parsing import parse_json
from data_pipelines.importers.rows import Reader
from data_pipelines.importers.tables import (
    JSON_SUFFIXES,
    JsonReader,
    ParquetReader,
    SavedReader,
    files_with,
    source_files,
)
from data_pipelines.importers.tars import TarReader
from data_pipelines.media.kinds import IMAGE_SUFFIXES, VIDEO_SUFFIXES

METADATA_JSON, METADATA_CSV = "metadata.jsonl", "metadata.csv"
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way in which datasets are laid out.

    Attributes:
        about: One line for --help.
        reader: Makes the reader for a source.
        conversation: Field that must hold the conversation; rows of columns when None, either when empty.
        task: Task of its columns, where the format itself says so.
        tars: Media may lie in tar files beside the records.
        media: A row without a medium is one whose column was not recognised, unless the user says otherwise.
    """

    about: str
    reader: Callable[[Path], Reader]
    conversation: str | None = ""
    task: str | None = None
    tars: bool = False
    media: bool = False


def _json_or_csv(source: Path) -> Reader:
    """The metadata file of a folder of media."""
    if source.is_file():
        return CsvReader() if source.suffix.lower() in CSV_SUFFIXES else JsonReader()
    as_json, as_csv = (
        [path for path in files_with(source, (Path(name).suffix,)) if path.name == name]
        for name in (METADATA_JSON, METADATA_CSV)
    )
    if as_json and as_csv:
        raise DataError(
            f"{as_json[0]} and {as_csv[0]} both say what to learn, and one import reads one kind: remove or rename "
            f"the one that is not meant, or import each by its own name: nemovl data import {as_csv[0]} --out ..."
        )
    if as_json:
        return JsonReader((METADATA_JSON,))
    if as_csv:
        return CsvReader((METADATA_CSV,))
    return JsonReader() if files_with(source, JSON_SUFFIXES) else CsvReader()


def _huggingface(source: Path) -> Reader:
    return SavedReader() if _saved_by_datasets(source) else ParquetReader()


def _saved_by_datasets(source: Path) -> bool:
    return (source / "dataset_dict.json").exists() or (source / "state.json").exists()


_TEXT = "Continue this text."
_CODE = "Complete this file."

FORMATS: dict[str, Format] = {
    "nemotron-v2": Format(
        about="Nemotron-VLM-Dataset-v2: JSON lines with messages, media in files or tars beside them",
        reader=lambda source: JsonReader(),
        conversation="messages",
        tars=True,
    ),
    "nemotron-v1": Format(
        about="Llama-Nemotron-VLM-Dataset-v1: JSON lines with conversations",
        reader=lambda source: JsonReader(),
        conversation="conversations",
        tars=True,
    ),
    "llava": Format(
        about="LLaVA: a JSON list with image and conversations (human, gpt)",
        reader=lambda source: JsonReader(),
        conversation="conversations",
    ),
    "sharegpt": Format(
        about="ShareGPT: conversations, with images or videos beside them",
        reader=lambda source: JsonReader(),
        conversation="conversations",
    ),
    "openai": Format(
        about="OpenAI chat messages, contents as text or parts (image_url)",
        reader=lambda source: JsonReader(),
        conversation="messages",
    ),
    "hf": Format(
        about="Hugging Face: Parquet or save_to_disk; chats, VQA columns, Cauldron, FineVision",
        reader=_huggingface,
    ),
    "webdataset": Format(about="webdataset tar shards", reader=lambda source: TarReader()),
    "energon": Format(about="folder prepared by Megatron-Energon (.nv-meta)", reader=lambda source: EnergonReader()),
    "folder": Format(
        about=f"images or videos with {METADATA_JSON}, {METADATA_CSV} or another table of columns",
        reader=_json_or_csv,
        media=True,
    ),
    "pdf": Format(
        about="PDF files: each page rendered, its text layer as the answer",
        reader=lambda source: PdfReader(),
        conversation=None,
        task="document",
    ),
    "text": Format(
        about="plain text files", reader=lambda source: TextReader(TEXT_SUFFIXES, _TEXT), conversation=None, task="vqa"
    ),
    "code": Format(
        about="source code files", reader=lambda source: TextReader(CODE_SUFFIXES, _CODE), conversation=None, task="vqa"
    ),
}


def choose_format(source: Path, name: str, roots: Sequence[Path] = ()) -> str:
    """Name of the format that a source is in: what was asked for, or what its files say.

    Raises:
        DataError: No such source or format, nothing that is known, or a link that leads elsewhere.
    """
    if name != AUTO and name not in FORMATS:
        raise DataError(f"--format {name!r} is not one of {AUTO}, {', '.join(FORMATS)}")
    if not source.exists():
        hint = "; download it first, nothing is fetched during an import" if ":/" in str(source) else ""
        raise DataError(f"{source}: there is no such file or folder{hint}")
    return _detect(source, roots) if name == AUTO else name


def _detect(source: Path, roots: Sequence[Path]) -> str:
    suffixes = Counter(path.suffix.lower() for path in files_with(source, _Anything()))
    if source.is_dir():
        if (source / META).is_dir():
            return "energon"
        if _saved_by_datasets(source):
            return "hf"
        if (source / "dataset.json").exists() and suffixes[".tar"]:
            return "webdataset"  # a dataset folder of our own, to be counted by other rules
        if next(source.rglob(METADATA_JSON), None) or next(source.rglob(METADATA_CSV), None):
            return "folder"
    if suffixes[".parquet"]:
        return "hf"
    # Another tool's settings may lie beside its shards as JSON, but hold no record.
    if any(suffixes[suffix] for suffix in JSON_SUFFIXES):
        paths = source_files(source, JSON_SUFFIXES, roots)
        found = (record for path in paths if (record := _first_record(path)) is not None)
        if (record := next(found, None)) is not None:
            return _conversation_format(record, tars=bool(suffixes[".tar"]))
    if suffixes[".tar"]:
        return "webdataset"
    if any(suffixes[suffix] for suffix in CSV_SUFFIXES):
        return "folder"
    for name, wanted in (("pdf", (".pdf",)), ("code", CODE_SUFFIXES), ("text", TEXT_SUFFIXES)):
        if any(suffixes[suffix] for suffix in wanted):
            return name
    raise DataError(_unknown(source, suffixes))


class _Anything(tuple[str, ...]):
    """Every extension."""

    def __contains__(self, item: object) -> bool:
        return True


def _conversation_format(record: dict[str, Any], *, tars: bool) -> str:
    kind = has_conversation(record)
    if kind == "messages":
        if tars:  # of media, which the first record may have none of
            return "nemotron-v2"
        beside = {"images", "videos"} & set(record)
        parts = (p for m in record["messages"] if isinstance(m.get("content"), list) for p in m["content"])
        named = any(
            isinstance(p, dict) and isinstance(p.get(p.get("type")), str) for p in parts if p.get("type") != "text"
        )
        return "nemotron-v2" if named and not beside else "openai"
    if kind in ("conversations", "conversation"):
        if {"images", "videos"} & set(record):
            return "sharegpt"
        return "llava" if "image" in record or "video" in record else "sharegpt"
    return "folder"


def _first_record(path: Path) -> dict[str, Any] | None:
    """First record of a JSON file, None when it is not a file of records."""
    if not path.stat().st_size:
        return None
    data, as_list = map_file(path), is_list(path)
    start = data.find(b"[") + 1 if as_list else 0
    stop = min(len(data), start + 2**22)
    try:
        left, right = next(iter(record_spans(data, start, stop, as_list=as_list)))
        record = parse_json(data[left:right])
    except (DataError, StopIteration, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _unknown(source: Path, suffixes: Counter[str]) -> str:
    found = ", ".join(f"{count} {suffix or 'without extension'}" for suffix, count in suffixes.most_common(5))
    media = [s for s in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) if suffixes[f".{s}"]]
    if media:
        line = json.dumps({"file_name": f"NAME.{media[0]}", "question": "...", "answer": "..."})
        return (
            f"{source} holds media ({found}) but no {METADATA_JSON} or {METADATA_CSV} that says what to learn from "
            f"them: put {METADATA_JSON} beside them, one line like {line} for each question"
        )
    return f"{source} holds nothing that is known ({found or 'no files'}); formats: {', '.join(FORMATS)}"
