"""An import: cut the source into units, hand them to processes, keep what is finished, publish the whole.

    .OUT.importing/job.json        what is imported and how; another import is not continued by mistake
    .OUT.importing/units/000012/   a finished unit: shards, manifest part, rejected rows, unit.json
    OUT/                           appears at the end, complete

Units do not depend on the number of workers, so the same source gives the same bytes with any number, and after any
number of interruptions.
"""

import fcntl
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipelines.exceptions import DataError
from data_pipelines.importers import work
from data_pipelines.importers.energon import EnergonReader
from data_pipelines.importers.formats import AUTO, FORMATS, choose_format
from data_pipelines.importers.publish import Repeat, find_repeats, publish
from data_pipelines.importers.rows import HELDOUT, TRAIN, Unit
from data_pipelines.importers.tables import root_of, source_files
from data_pipelines.importers.tar_index import TarIndex
from data_pipelines.importers.tasks import ALIASES, BOX_FORMATS, TASKS, ColumnOptions
from data_pipelines.importers.work import UnitResult, Worker, WorkOptions
from data_pipelines.media.rules import RenderRules
from data_pipelines.processes import process_pool
from data_pipelines.shards import split_problem, write_synced
from data_pipelines.tokenizer import TextTokenizer

IMPORT_VERSION = 2
"""Part of a job's identity: units made by other rules are not mixed."""
ID_MODES = ("source", "position")
BOX_UNITS = ("pixel", "unit", "thousand")
_OTHER_IDS = "; import with --ids position if it is another sample"
_EARLY_ROWS = 1000
_CHEAP_ROWS = 10_000
_PROGRESS_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What to import and how.

    Attributes:
        source: File or folder.
        out: Dataset folder to make.
        tokenizer: Folder of the tokenizer that counts tokens.
        rules: Prompt and tile rules.
        format: Name of a format, or `auto`.
        name: Name of the dataset; that of `out` when None.
        split: Split of every sample; told from file names when None.
        media_roots: Further folders that media may lie in.
        columns: Task and columns of plain tables.
        ids: `source` keeps the rows' ids, `position` names samples by file and number.
        think: Turn reasoning on (`/think` in the system text) for samples whose answers hold a trace.
        heldout: Share of the samples of `train` that go to the split `heldout` instead, by a key of their media or id.
        allow_text: Rows of columns may have no medium.
        limit: Only the first samples of each split.
        workers: Processes; 1 works in this one.
        max_bad: Largest share of rejected rows with which a dataset is made.
        shard_mib: A shard is closed once it holds this many MiB.
        restart: Throw away what an earlier try left behind.
    """

    source: Path
    out: Path
    tokenizer: Path
    rules: RenderRules
    format: str = AUTO
    name: str | None = None
    split: str | None = None
    media_roots: tuple[Path, ...] = ()
    columns: ColumnOptions = field(default_factory=lambda: ColumnOptions(columns={}))
    ids: str = "source"
    think: bool = False
    heldout: float = 0.0
    allow_text: bool = False
    limit: int | None = None
    workers: int = 1
    max_bad: float = 0.05
    shard_mib: float = 64
    restart: bool = False


def run_import(options: ImportOptions) -> dict[str, Any]:
    """Import a source into a dataset folder; the same call continues where an interrupted one stopped.

    Returns:
        `out`, `format`, `splits` (counts), `rejected` (by reason), `rows`, `seconds`.

    Raises:
        DataError: Options, source or media that cannot be used, too many rejected rows, or a disk that refuses.
    """
    _check(options)
    source, out = Path(os.path.abspath(options.source)), Path(os.path.abspath(options.out))
    format_name = choose_format(options.source, options.format, options.media_roots)
    logger.info("%s: format %s (%s)", options.source, format_name, FORMATS[format_name].about)
    folder = out.with_name(f".{out.name}.importing")
    began = time.monotonic()
    try:
        with _locked(folder):
            units = FORMATS[format_name].reader(source).units(source, options.split, options.media_roots)
            if not units:
                raise DataError(f"{options.source}: no rows of format {format_name}; see --format")
            units = _with_heldout(units) if options.heldout else units
            tars = _media_tars(options, source, format_name)
            _claim(folder, options, _identity(options, source, format_name, units, tars))
            _forget_bad_media(folder, options, units)
            work_options = _work_options(options, source, folder, format_name, tars)
            results = _all_units(options, work_options, units)
            repeats = find_repeats(folder, results)
            _check_share(options, results, repeats)
            name = options.name or out.name
            tokenizer = TextTokenizer(options.tokenizer)
            if options.ids != "position":
                repeats = [replace(repeat, advice=_OTHER_IDS) for repeat in repeats]
            info = publish(folder, out, results, repeats, name=name, rules=options.rules, tokenizer=tokenizer)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write the import of {options.source} to {out}: {error.strerror or error}; free or change the "
            "place and type the same command again: finished parts are kept"
        ) from error
    return {
        "out": str(options.out),
        "format": format_name,
        "splits": {split: _counts(entry) for split, entry in info["splits"].items()},
        "rejected": rejected_reasons(out),
        "rows": sum(r.samples + r.rejected for r in results),
        "seconds": round(time.monotonic() - began, 2),
    }


def _with_heldout(units: Sequence[Unit]) -> list[Unit]:
    """Units of `train` twice, once for each side: a unit gives samples of one split."""
    kept = [replace(unit, heldout=False) if unit.split == TRAIN else unit for unit in units]
    return kept + [replace(unit, split=HELDOUT, heldout=True) for unit in units if unit.split == TRAIN]


def _counts(entry: Mapping[str, Any]) -> dict[str, int]:
    return {key: entry[key] for key in ("samples", "tiles", "total_tokens", "supervised_tokens")}


def rejected_reasons(out: Path) -> dict[str, int]:
    """Rejected rows of an imported dataset by reason."""
    reasons: dict[str, int] = {}
    with (out / work.REJECTED_FILE).open(encoding="utf-8") as file:
        for line in file:
            reason = json.loads(line)["reason"]
            reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def _check(options: ImportOptions) -> None:
    """Every problem of the options, at once."""
    problems = []
    if options.out.exists():
        problems.append(f"{options.out} exists already; choose another --out, or remove it to import again")
    if Path(os.path.abspath(options.out)).is_relative_to(os.path.abspath(options.source)):
        problems.append(
            f"--out {options.out} lies inside the source, and would become a part of it; choose another place"
        )
    columns = options.columns
    if columns.task is not None and columns.task not in TASKS:
        problems.append(f"--task {columns.task!r} is not one of {', '.join(TASKS)}")
    if strange := sorted(set(columns.columns) - set(ALIASES)):
        problems.append(f"--column {strange[0]}=...: the roles are {', '.join(ALIASES)}")
    for name, value, allowed in (
        ("--ids", options.ids, ID_MODES),
        ("--box-format", columns.box_format, BOX_FORMATS),
        ("--box-units", columns.box_units, BOX_UNITS),
    ):
        if value not in allowed:
            problems.append(f"{name} {value!r} is not one of {', '.join(allowed)}")
    if options.split is not None and (problem := split_problem(options.split)):
        problems.append(f"--split {problem}")
    if options.limit is not None and options.limit < 1:
        problems.append(f"--limit {options.limit} must be at least 1")
    if not 0 <= options.heldout <= 0.5:
        problems.append(f"--heldout {options.heldout} must be between 0 and 0.5, such as 0.05")
    if options.workers < 1:
        problems.append(f"--workers {options.workers} must be at least 1")
    if not 0 <= options.max_bad <= 1:
        problems.append(f"--max-bad {options.max_bad} must be between 0 and 1, such as 0.05")
    if not options.shard_mib > 0:
        problems.append(f"--shard-mib {options.shard_mib} must be above 0")
    problems += [f"--media-root {root}: there is no such folder" for root in options.media_roots if not root.is_dir()]
    if problems:
        raise DataError("\n  - ".join(["the import cannot start:", *problems]) if len(problems) > 1 else problems[0])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep the work folder to one import at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another import is writing {folder}; wait for it, or choose another --out") from error
        yield


def _media_tars(options: ImportOptions, source: Path, format_name: str) -> list[Path]:
    """Tar files beside the records that their media may lie in."""
    return source_files(root_of(source), (".tar",), options.media_roots) if FORMATS[format_name].tars else []


def _claim(folder: Path, options: ImportOptions, job: dict[str, Any]) -> None:
    """Make the work folder this import's own, or see that it is."""
    path = folder / "job.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if found == job and not options.restart:
        return
    if found is not None and found != job:
        changed = [key for key in job if found.get(key) != job[key]]
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"units/*/{work.UNIT_FILE}")]
        rows = sum(part["counts"]["samples"] + part["rejected"] for part in parts)
        # Parts of a source that has changed are of no use; small ones are not worth a question.
        if not (options.restart or {"files", "tars"} & set(changed) or rows < _CHEAP_ROWS):
            raise DataError(
                f"{folder} holds an unfinished import of {rows} rows with other {', '.join(changed)}; type that "
                "command again, or add --restart to throw its parts away"
            )
        logger.info("%s changed since the last try: starting again", ", ".join(changed))
    for name in ("units", work.FINAL):
        shutil.rmtree(folder / name, ignore_errors=True)
    for old in folder.glob("members.*"):
        old.unlink()
    write_synced(path, json.dumps(job).encode())


def _forget_bad_media(folder: Path, options: ImportOptions, units: Sequence[Unit]) -> None:
    """Drop finished units with bad media where too much was rejected: the user may have brought or mended them since.

    Where the share is small enough, what was finished stays: a continued import would do most of its work again.
    """
    done = [result for number in range(len(units)) if (result := work.finished(folder, number)) is not None]
    again: set[Unit] = set()
    if _too_bad(options, done) and not (folder / work.FINAL).exists():
        blamed = (r.number for r in done if r.rejected and work.media_to_blame(folder, r.number))
        again = {_rows_of(units[number]) for number in blamed}
    # The held-out twin of a unit lacks the same rows, though it does not tell of them.
    dropped = [result.number for result in done if _rows_of(units[result.number]) in again]
    for number in dropped:
        shutil.rmtree(work.unit_folder(folder, number))
    if done:
        logger.info("%d of %d parts were finished before, %d are done again", len(done), len(units), len(dropped))


def _rows_of(unit: Unit) -> Unit:
    """A unit without the side of the split that it takes."""
    return replace(unit, split="", heldout=None)


def _identity(
    options: ImportOptions, source: Path, format_name: str, units: Sequence[Unit], tars: Sequence[Path]
) -> dict[str, Any]:
    root = root_of(source)
    names = sorted({name for unit in units for name in (unit.files or (unit.path,))})
    stats = [(name, (root / name).stat()) for name in names]
    tar_stats = [(tar, tar.stat()) for tar in tars]
    return {
        "version": IMPORT_VERSION,
        "source": str(source),
        "format": format_name,
        "files": [[name, found.st_size, found.st_mtime_ns] for name, found in stats],
        "tars": [[str(tar.relative_to(root)), found.st_size, found.st_mtime_ns] for tar, found in tar_stats],
        "units": [[unit.split, unit.path, unit.start, unit.stop] for unit in units],
        "heldout": options.heldout,
        "allow_text": options.allow_text,
        "rules": options.rules.digest(TextTokenizer(options.tokenizer).digest()),
        "columns": {**asdict(options.columns), "columns": dict(options.columns.columns)},
        "media_roots": [str(Path(os.path.abspath(root))) for root in options.media_roots],
        "ids": options.ids,
        "think": options.think,
        "limit": options.limit,
        "shard_mib": options.shard_mib,
    }


def _work_options(
    options: ImportOptions, source: Path, folder: Path, format_name: str, tars: Sequence[Path]
) -> WorkOptions:
    root = root_of(source)
    index = None
    if tars:
        index = folder / "members.sqlite"
        logger.info("indexing %d tar files of media", len(tars))
        TarIndex.build(index, root, tars)
    columns = options.columns
    if format_name == "energon" and columns.task is None:
        columns = ColumnOptions(**{**asdict(columns), "task": EnergonReader().task(source)})
    return WorkOptions(
        source=source,
        folder=folder,
        format_name=format_name,
        columns=columns,
        media_roots=(root, *options.media_roots),
        index=index,
        ids=options.ids,
        think=options.think,
        heldout=options.heldout,
        allow_text=options.allow_text,
        rules=options.rules,
        tokenizer=options.tokenizer,
        shard_bytes=int(options.shard_mib * 2**20),
    )


def _all_units(options: ImportOptions, work_options: WorkOptions, units: Sequence[Unit]) -> list[UnitResult]:
    """Results of every unit, finished now or before, in order."""
    results = {n: done for n in range(len(units)) if (done := work.finished(work_options.folder, n)) is not None}
    missing = [(number, unit) for number, unit in enumerate(units) if number not in results]
    progress = _Progress(len(units), results)
    if options.limit is not None:
        new = _limited(work_options, units, options.limit, results)
    elif options.workers == 1 or len({(unit.path, unit.start, unit.files) for _, unit in missing}) <= 1:
        # Processes cost seconds: one unit and its held-out twin are not worth them.
        new = _one_by_one(work_options, missing)
    else:
        new = _in_processes(work_options, missing, min(options.workers, len(missing)))
    for result in new:
        results[result.number] = result
        progress.show(result)
        if progress.rejected > options.max_bad * (progress.samples + progress.rejected):
            _check_share(options, list(results.values()), early=True)
    return [results[number] for number in sorted(results)]


def _one_by_one(options: WorkOptions, missing: Sequence[tuple[int, Unit]]) -> Iterator[UnitResult]:
    worker = Worker(options)
    for number, unit in missing:
        yield worker.run(number, unit)


def _limited(
    options: WorkOptions, units: Sequence[Unit], limit: int, done: Mapping[int, UnitResult]
) -> Iterator[UnitResult]:
    """In order, until every split has its samples: how many a unit gives is not known before."""
    worker = Worker(options)
    left = {unit.split: limit for unit in units}
    for number, unit in enumerate(units):
        if left[unit.split] > 0:
            known = done.get(number)
            result = known or worker.run(number, unit, left[unit.split])
            left[unit.split] -= result.samples
            if known is None:
                yield result


def _in_processes(options: WorkOptions, missing: Sequence[tuple[int, Unit]], workers: int) -> Iterator[UnitResult]:
    waiting = iter(missing)
    running: dict[Future[UnitResult], Unit] = {}
    pool = process_pool(workers, work.start_process, options)
    try:
        while True:
            # Not all at once: a list of a million futures would be built before the first is done.
            while len(running) < 2 * workers and (item := next(waiting, None)):
                running[pool.submit(work.run_in_process, *item)] = item[1]
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                unit = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool as error:
                    names = ", ".join(sorted({unit.path, *(other.path for other in running.values())})[:4])
                    raise DataError(
                        f"a worker was killed while it imported one of {names}: memory may have run out. Type the same "
                        "command with fewer --workers; finished parts are kept"
                    ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Progress:
    """Says now and then how far the import is and how fast."""

    def __init__(self, units: int, done: Mapping[int, UnitResult]) -> None:
        self.units, self.done = units, len(done)
        self.samples = sum(result.samples for result in done.values())
        self.rejected = sum(result.rejected for result in done.values())
        self.began = self.shown = time.monotonic()
        self.new_samples = self.new_bytes = self.new_units = 0

    def show(self, result: UnitResult) -> None:
        """Count a unit that was finished, and log when it is time."""
        self.done, self.new_units = self.done + 1, self.new_units + 1
        self.samples += result.samples
        self.rejected += result.rejected
        self.new_samples += result.samples
        self.new_bytes += sum(shard["bytes"] for shard in result.counts["shards"])
        now = time.monotonic()
        if now - self.shown < _PROGRESS_SECONDS and self.done < self.units:
            return
        self.shown = now
        seconds = max(now - self.began, 1e-6)
        left = (self.units - self.done) * seconds / self.new_units
        logger.info(
            "%d of %d parts, %d samples, %d rejected, %.0f samples/s, %.1f MB/s, %s left",
            self.done, self.units, self.samples, self.rejected, self.new_samples / seconds,
            self.new_bytes / seconds / 1e6, f"{left / 60:.0f} min" if left > 120 else f"{left:.0f} s",
        )  # fmt: skip


def _too_bad(options: ImportOptions, results: Sequence[UnitResult], repeats: int = 0) -> bool:
    """Whether more of some rows is rejected than may be."""
    rejected = sum(result.rejected for result in results)
    rows = rejected + sum(result.samples for result in results)
    return rejected + repeats > options.max_bad * rows


def _check_share(
    options: ImportOptions, results: Sequence[UnitResult], repeats: Sequence[Repeat] = (), *, early: bool = False
) -> None:
    """Stop when too much of the source is unusable: it is read the wrong way more often than it is bad.

    Raises:
        DataError: With the first reason.
    """
    rejected = sum(result.rejected for result in results)
    bad = rejected + len(repeats)
    rows = rejected + sum(result.samples for result in results)
    if (early and rows < _EARLY_ROWS) or not _too_bad(options, results, len(repeats)):
        return
    text = f"{bad} of {rows} rows cannot be used, more than --max-bad {options.max_bad:g} allows"
    if rejected:
        first = next(result.first_rejected for result in sorted(results, key=lambda r: r.number) if result.rejected)
        text += (
            f"; the first, {first}\nAll are listed in "
            f"{options.out.with_name(f'.{options.out.name}.importing')}/units/*/{work.REJECTED_FILE}"
        )
    if repeats:
        advice = "" if options.ids == "position" else _OTHER_IDS
        text += f"; {len(repeats)} with an id that was used before, the first, {repeats[0]}{advice}"
    text += ". Repair the source and type the same command again"
    if bad < rows:
        text += f", or type the same command with --max-bad {math.ceil(100 * bad / rows) / 100:.2f} to leave them out"
    raise DataError(text)
