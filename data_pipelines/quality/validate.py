"""Every sample of a dataset folder checked, every problem named: file, key, reason, fix."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.dataset import Dataset, read_info
from data_pipelines.exceptions import DataError
from data_pipelines.manifest import file_sha256, manifest_name
from data_pipelines.media.rules import RenderRules
from data_pipelines.processes import in_order, process_pool
from data_pipelines.quality.checks import ERROR, WARNING, Problem, SampleChecks
from data_pipelines.tokenizer import TextTokenizer

_CHUNK = 64
_CHUNKS_AHEAD = 4
"""Chunks of each process that wait or are done before they are looked at."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a validation.

    Attributes:
        folder: Dataset folder.
        samples: Samples that were checked.
        seconds: Time it took.
        fast: No medium was decoded.
        lengths_checked: A tokenizer was at hand.
        problems: All problems, in the order of splits and rows.
    """

    folder: str
    samples: int
    seconds: float
    fast: bool
    lengths_checked: bool
    problems: list[Problem]

    def count(self, severity: str) -> int:
        """Number of problems of a severity."""
        return sum(problem.severity == severity for problem in self.problems)

    def by_check(self) -> dict[str, int]:
        """Number of problems by severity and check."""
        names = [f"{p.severity}: {p.check}" for p in self.problems]
        return {name: names.count(name) for name in sorted(set(names))}

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON document."""
        return {**asdict(self), "errors": self.count(ERROR), "warnings": self.count(WARNING)}


@dataclass(frozen=True)
class _Spec:
    folder: Path
    split: str
    tokenizer: Path | None
    seq_length: int | None
    fast: bool


def find_tokenizer(folder: Path, given: Path | None) -> Path | None:
    """Folder of the tokenizer of a dataset folder: the one given, or the folder itself if it has one."""
    return given or (folder if (folder / "tokenizer.json").is_file() else None)


def validate(
    folder: Path,
    *,
    tokenizer: Path | None = None,
    split: str | None = None,
    seq_length: int | None = None,
    fast: bool = False,
    workers: int = 1,
) -> Report:
    """Check a dataset folder.

    Args:
        folder: Dataset folder.
        tokenizer: Folder of the tokenizer it was counted with; the dataset folder's own when None.
        split: Only this split.
        seq_length: Tokens of a pack that every sample should fit in.
        fast: Check hashes, records and headers, but decode and tokenise nothing.
        workers: Processes.

    Raises:
        DataError: No dataset folder, no such split, or a tokenizer that is not its own.
    """
    began = time.monotonic()
    info = read_info(folder)
    place = find_tokenizer(folder, tokenizer)
    if place is not None and TextTokenizer(place).digest() != info["tokenizer_sha256"]:
        raise DataError(f"{folder} was counted with another tokenizer than {place}: name its own with --tokenizer")
    if split is not None and split not in info["splits"]:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(sorted(info['splits']))}")
    problems: list[Problem] = []
    samples = 0
    for name in [split] if split else list(info["splits"]):
        try:
            dataset = Dataset.open(folder, name)
            _check_manifest(folder, name, info["splits"][name]["manifest_sha256"])
        except DataError as error:
            fix = "copy the folder again, or import the source again"
            problems.append(Problem(ERROR, "folder", name, -1, "", "dataset.json", str(error), fix))
            continue
        problems += _check_split(_Spec(folder, name, place, seq_length, fast), dataset, workers)
        samples += len(dataset)
        dataset.close()
    return Report(
        folder=str(folder),
        samples=samples,
        seconds=round(time.monotonic() - began, 2),
        fast=fast,
        lengths_checked=place is not None and not fast,
        problems=problems,
    )


def _check_manifest(folder: Path, split: str, expected: str) -> None:
    """Opening a dataset looks at the manifest's footer alone, and at a page when it is read."""
    path = folder / manifest_name(split)
    if file_sha256(path) != expected:
        raise DataError(f"{path} is damaged: SHA-256 differs from the one in dataset.json")


def _check_split(spec: _Spec, dataset: Dataset, workers: int) -> list[Problem]:
    problems: list[Problem] = []
    seen: dict[int, int] = {}
    for rows, checked in _checked(spec, len(dataset), workers):
        for row, (found, digest) in zip(rows, checked, strict=True):
            problems += found
            if digest is None or (first := seen.setdefault(digest, row)) == row:
                continue
            # Keys are looked up on a hit alone: those of all samples would fill the memory.
            key, other = dataset.key(row), dataset.key(first)
            if key != other:
                reason = f"same messages and media as {other!r}"
                problems.append(Problem(WARNING, "duplicate", spec.split, row, key, "", reason, "keep one of them"))
    return problems


type _Checked = list[tuple[list[Problem], int | None]]


def _checked(spec: _Spec, rows: int, workers: int) -> Iterator[tuple[range, _Checked]]:
    """Chunks of rows with what was found in them, in order."""
    chunks = (range(start, min(start + _CHUNK, rows)) for start in range(0, rows, _CHUNK))
    workers = min(workers, -(-rows // _CHUNK))
    if workers <= 1:
        checks = _open(spec)
        yield from ((chunk, _check_rows(checks, chunk)) for chunk in chunks)
        return
    with process_pool(workers, _start, spec) as pool:
        yield from in_order(pool, _check_in_process, chunks, ahead=_CHUNKS_AHEAD * workers)


def _open(spec: _Spec) -> SampleChecks:
    rules = RenderRules(**read_info(spec.folder)["rules"])
    tokenizer = TextTokenizer(spec.tokenizer) if spec.tokenizer else None
    return SampleChecks(Dataset.open(spec.folder, spec.split), rules, tokenizer, spec.seq_length, spec.fast)


def _check_rows(checks: SampleChecks, rows: range) -> _Checked:
    return [checks.problems(row) for row in rows]


_checks: SampleChecks | None = None


def _start(spec: _Spec) -> None:
    global _checks
    _checks = _open(spec)


def _check_in_process(rows: range) -> _Checked:
    assert _checks is not None
    return _check_rows(_checks, rows)
