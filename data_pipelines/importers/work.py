"""What one worker does: import one unit of a source into a folder of its own, complete or not there."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipelines.exceptions import DataError
from data_pipelines.importers.convert import Converter, MediaError, in_source_words
from data_pipelines.importers.formats import FORMATS
from data_pipelines.importers.references import MediaFinder
from data_pipelines.importers.rows import Rejected, Row, Unit
from data_pipelines.importers.tar_index import TarIndex
from data_pipelines.importers.tasks import ColumnOptions
from data_pipelines.manifest import describe, manifest_name
from data_pipelines.media.rules import RenderRules
from data_pipelines.shards import SplitWriter, write_synced
from data_pipelines.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

PART = "part"
FINAL = "final"
"""Folder that becomes the dataset: while it is there, shards of units move into it."""
UNIT_FILE = "unit.json"
REJECTED_FILE = "rejected.jsonl"
PLACES_FILE = "places.jsonl"
"""Place in the source of each sample, one JSON string a line, to name rows whose ids repeat."""
_DEFECTS = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
"""What hostile or broken data make code raise; a defect of ours among them is reported with its row all the same."""


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """All that a worker needs to know, small enough to be sent to a process.

    Attributes:
        source: File or folder that is imported.
        folder: Work folder of the import.
        format_name: Format of the source.
        columns: How plain columns are read.
        media_roots: Folders that media may lie in.
        index: SQLite file with the members of media tars, if there are any.
        ids: Where sample ids come from.
        think: Turn reasoning on for samples whose answers hold a trace.
        heldout: Share of the samples that are held out.
        allow_text: Rows of columns may have no medium.
        rules: Prompt and tile rules.
        tokenizer: Folder of the tokenizer.
        shard_bytes: Size at which a shard is closed.
    """

    source: Path
    folder: Path
    format_name: str
    columns: ColumnOptions
    media_roots: tuple[Path, ...]
    index: Path | None
    ids: str
    think: bool
    heldout: float
    allow_text: bool
    rules: RenderRules
    tokenizer: Path
    shard_bytes: int


@dataclass(frozen=True)
class UnitResult:
    """What became of a unit: the entry of its samples for `dataset.json`, and how many rows were rejected."""

    number: int
    split: str
    counts: dict[str, Any]
    rejected: int
    first_rejected: str

    @property
    def samples(self) -> int:
        """Samples that were imported."""
        return int(self.counts["samples"])


def unit_folder(folder: Path, number: int) -> Path:
    """Folder of a finished unit."""
    return folder / "units" / f"{number:06d}"


def finished(folder: Path, number: int) -> UnitResult | None:
    """Result of a unit that was finished before, None if it was not, or if its files are gone.

    An import that was killed behind its last step leaves units whose shards have moved away with the dataset.
    """
    home = unit_folder(folder, number)
    try:
        result = UnitResult(**json.loads((home / UNIT_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    needed = [manifest_name(PART), PLACES_FILE, REJECTED_FILE]
    if not (folder / FINAL).exists():  # otherwise its shards may be there already
        needed += [shard["name"] for shard in result.counts["shards"]]
    return result if all((home / name).exists() for name in needed) else None


def media_to_blame(folder: Path, number: int) -> bool:
    """Whether a finished unit rejected rows whose media may be at fault: missing, damaged, or of the wrong kind.

    Rows that could not even be read are the table's fault, and a table that was mended is noticed by itself.
    """
    with (unit_folder(folder, number) / REJECTED_FILE).open(encoding="utf-8") as file:
        return any(json.loads(line)["reason"] != "read" for line in file)


class Worker:
    """Imports units; one for each process."""

    def __init__(self, options: WorkOptions) -> None:
        self.options = options
        root = options.source if options.source.is_dir() else options.source.parent
        index = TarIndex(options.index, root) if options.index else None
        columns = options.columns
        spec = FORMATS[options.format_name]
        self.reader = spec.reader(options.source)
        task = columns.task or spec.task
        finder = MediaFinder(options.media_roots, index)
        self.converter = Converter(
            options.format_name,
            replace(columns, task=task),
            finder,
            options.ids,
            think=options.think,
            allow_text=options.allow_text,
        )
        self.tokenizer = TextTokenizer(options.tokenizer)

    def run(self, number: int, unit: Unit, limit: int | None = None) -> UnitResult:
        """Import one unit; its folder takes its name at the end.

        Raises:
            DataError: The disk refuses.
        """
        target = unit_folder(self.options.folder, number)
        work = target.with_name(f"{target.name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        rejected: list[Rejected] = []
        places: list[str] = []
        writer = SplitWriter(
            work, PART, self.options.rules, self.tokenizer, self.options.shard_bytes, key_prefix=f"{number:06d}"
        )
        counts = writer.write_described(islice(self._described(unit, rejected, places), limit))
        lines = "".join(json.dumps({"split": unit.split, **asdict(item)}) + "\n" for item in rejected)
        write_synced(work / REJECTED_FILE, lines.encode())
        write_synced(work / PLACES_FILE, "".join(json.dumps(place) + "\n" for place in places).encode())
        first = f"{rejected[0].where}: {rejected[0].message}" if rejected else ""
        result = UnitResult(number, unit.split, counts, len(rejected), first)
        write_synced(work / UNIT_FILE, json.dumps(asdict(result)).encode())
        shutil.rmtree(target, ignore_errors=True)  # what is left of a unit that `finished` does not count
        work.rename(target)
        return result

    def _described(
        self, unit: Unit, rejected: list[Rejected], places: list[str]
    ) -> Iterator[tuple[dict[str, Any], dict[str, bytes], dict[str, Any]]]:
        for row in self.reader.rows(self.options.source, unit):
            # Of the two units that share these rows one tells of those that are no sample, so are on no side.
            bad = [] if unit.heldout else rejected
            if isinstance(row, Rejected):
                bad.append(row)
                continue
            try:
                record, media = self.converter.sample(row)
                if unit.heldout is not None and held_out(record, media, self.options.heldout) != unit.heldout:
                    continue
                bad = rejected
                described = self._describe(record, media)
            except _DEFECTS as error:
                bad.append(_rejected(row, self.converter.key(row), error))
                continue
            places.append(row.where)
            yield record, media, described

    def _describe(self, record: dict[str, Any], media: dict[str, bytes]) -> dict[str, Any]:
        try:
            return describe(record, media, self.options.rules, self.tokenizer)
        except DataError as error:
            raise DataError(in_source_words(str(error), record)) from error


def held_out(record: Mapping[str, Any], media: Mapping[str, bytes], share: float) -> bool:
    """Whether a sample is held out: by its first medium, so that all questions about a picture are on one side.

    A function of the sample alone: rows that are added or taken out change the side of no other.
    """
    key = next(iter(media.values()), None)
    digest = hashlib.blake2b(record["id"].encode() if key is None else key, digest_size=8, person=b"heldout")
    return int.from_bytes(digest.digest()) < share * 2**64


def _rejected(row: Row, key: str, error: Exception) -> Rejected:
    if isinstance(error, MediaError):
        return Rejected(row.where, key, "media", str(error))
    if isinstance(error, DataError):
        return Rejected(row.where, key, "record", str(error))
    return Rejected(row.where, key, "row", f"{type(error).__name__}: {error}")


_worker: Worker | None = None


def start_process(options: WorkOptions) -> None:
    """First act of a worker process."""
    global _worker
    _worker = Worker(options)


def run_in_process(number: int, unit: Unit) -> UnitResult:
    """Import one unit in a process that `start_process` prepared."""
    assert _worker is not None
    return _worker.run(number, unit)
