"""Public benchmarks from local copies, in the file layouts they are published in: no network, no conversion.

    ai2d      AllenAI's `questions/*.json` and `images/`; `ai2d_test_ids.csv` limits it to the test images
    chartqa   vis-nlp's `test/test_human.json`, `test/test_augmented.json` and `test/png/`
    docvqa    `val_v1.0*.json` of RRC challenge 17, and `documents/`
    ocrbench  Yuliang-Liu's `OCRBench.json`, with images below `OCRBench_Images/`

Or, for each, Parquet as `datasets` writes it, whose `image` is a struct of `bytes` and `path`; the functions named
`..._of_row` say which columns. Prompts are those of lmms-eval's tasks.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from nemovl_train.evaluation.metrics import contains
from nemovl_train.exceptions import DataError

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
_HANDWRITTEN_FORMULAS = "HME100k"


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question of a benchmark.

    Attributes:
        key: Its name in the benchmark's own files.
        question: What the model is asked.
        image: Bytes of the picture.
        references: Acceptable answers.
        group: Part of the benchmark whose mean is reported by itself.
    """

    key: str
    question: str
    image: bytes
    references: tuple[str, ...]
    group: str = ""

    def record(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """As a record of the dataset schema, with the bytes of its picture."""
        text = {"type": "text", "text": self.question, "literal": True}
        content = [{"type": "image", "image": "image"}, text]
        return {"id": self.key, "messages": [{"role": "user", "content": content}]}, {"image": self.image}


def read_benchmark(name: str, folder: Path) -> Iterator[BenchmarkQuestion]:
    """Questions of a local copy, in the order of its files.

    Args:
        name: One of `BENCHMARKS`.
        folder: Its folder.

    Raises:
        DataError: Not one of the layouts, or a question that cannot be read; file and place are named.
    """
    original, of_row = _READERS[name]
    tables = sorted(folder.rglob("*.parquet"))
    rows = _parquet_rows(tables, of_row) if tables else original(folder)
    found = False
    for row in rows:
        found = True
        yield row
    if not found:
        raise DataError(f"{folder} holds no question of {name}; see the layouts in docs/evaluation.md")


def ocrbench(answer: str, references: Sequence[str], group: str) -> float:
    """OCRBench's own rule: the reference is in the answer; for written formulas spaces do not count, but case does."""
    if group != _HANDWRITTEN_FORMULAS:
        return contains(answer, references)
    squeezed = "".join(answer.split())
    return float(any("".join(reference.split()) in squeezed for reference in references))


def _parquet_rows(
    tables: Sequence[Path], of_row: Callable[[Mapping[str, Any], str], BenchmarkQuestion]
) -> Iterator[BenchmarkQuestion]:
    for table in tables:
        number = 0
        for batch in pq.ParquetFile(table).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                try:
                    yield of_row(row, f"{table.stem}-{number}")
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise DataError(
                        f"{table}, row {number}: {error!r}; its columns are {', '.join(row)}, see docs/evaluation.md"
                    ) from error
                number += 1


def _image(row: Mapping[str, Any]) -> bytes:
    image = row["image"]
    if not isinstance(image, Mapping) or not image.get("bytes"):
        raise ValueError("its image holds no bytes")
    return image["bytes"]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error


def _picture(path: Path, root: Path) -> bytes:
    inside = path.resolve().is_relative_to(root.resolve())
    if not inside or not path.is_file():
        raise DataError(f"{path}: there is no such picture below {root}")
    return path.read_bytes()


def _entries(path: Path, entries: Any, make: Callable[[Any, int], BenchmarkQuestion]) -> Iterator[BenchmarkQuestion]:
    if not isinstance(entries, list):
        raise DataError(f"{path} holds no list of questions")
    for number, entry in enumerate(entries):
        try:
            yield make(entry, number)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{path}, question {number}: {error!r}") from error


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


def _choices(question: str, options: Sequence[str]) -> str:
    lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines]) + LETTER


def _ai2d(folder: Path) -> Iterator[BenchmarkQuestion]:
    wanted = None
    ids = folder / "ai2d_test_ids.csv"
    if ids.is_file():
        with ids.open(newline="", encoding="utf-8") as file:
            wanted = {row[0].strip() for row in csv.reader(file) if row}
    for path in sorted((folder / "questions").glob("*.json")):
        document = _json(path)
        name = str(document.get("imageName", ""))
        if wanted is not None and Path(name).stem not in wanted:
            continue
        image = _picture(folder / "images" / name, folder)

        def question(entry: tuple[str, Any], number: int, image: bytes = image, path: Path = path) -> BenchmarkQuestion:
            text, about = entry
            letter = chr(ord("A") + int(about["correctAnswer"]))
            key = str(about.get("questionId", f"{path.stem}-{number}"))
            return BenchmarkQuestion(key, _choices(text, about["answerTexts"]), image, (letter,))

        yield from _entries(path, list(document.get("questions", {}).items()), question)


def _ai2d_of_row(row: Mapping[str, Any], key: str) -> BenchmarkQuestion:
    letter = chr(ord("A") + int(row["answer"]))
    return BenchmarkQuestion(key, _choices(row["question"], row["options"]), _image(row), (letter,))


def _chartqa(folder: Path) -> Iterator[BenchmarkQuestion]:
    root = folder if (folder / "test").is_dir() else folder / "ChartQA Dataset"
    for part in ("human", "augmented"):
        path = root / "test" / f"test_{part}.json"

        def question(entry: Any, number: int, part: str = part) -> BenchmarkQuestion:
            image = _picture(root / "test" / "png" / entry["imgname"], root)
            key = f"{part}-{number}"
            return BenchmarkQuestion(key, entry["query"] + SHORT_ANSWER, image, (str(entry["label"]),), part)

        yield from _entries(path, _json(path), question)


def _chartqa_of_row(row: Mapping[str, Any], key: str) -> BenchmarkQuestion:
    question = row["question"] if "question" in row else row["query"]
    answer = row["answer"] if "answer" in row else row["label"]
    kind = row.get("type", row.get("human_or_machine"))
    group = "human" if kind in (0, "human_test", "human") else "augmented"
    return BenchmarkQuestion(key, question + SHORT_ANSWER, _image(row), _texts(answer), group)


def _docvqa(folder: Path) -> Iterator[BenchmarkQuestion]:
    files = sorted(folder.glob("val_v1.0*.json"))
    if not files:
        raise DataError(f"{folder} has neither parquet files nor val_v1.0*.json; see docs/evaluation.md")

    def question(entry: Any, number: int) -> BenchmarkQuestion:
        image = _picture(folder / entry["image"], folder)
        group = (entry.get("question_types") or [""])[0]
        text = entry["question"] + SHORT_ANSWER
        return BenchmarkQuestion(str(entry["questionId"]), text, image, _texts(entry["answers"]), group)

    yield from _entries(files[0], _json(files[0]).get("data"), question)


def _docvqa_of_row(row: Mapping[str, Any], key: str) -> BenchmarkQuestion:
    if row["answers"] is None:
        raise ValueError("it has no answers: this is the test split, whose answers are not public; take validation")
    group = (row.get("question_types") or [""])[0]
    text = row["question"] + SHORT_ANSWER
    return BenchmarkQuestion(str(row.get("questionId", key)), text, _image(row), _texts(row["answers"]), group)


def _ocrbench(folder: Path) -> Iterator[BenchmarkQuestion]:
    path = next((p for p in (folder / "OCRBench.json", folder / "OCRBench" / "OCRBench.json") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder} has neither parquet files nor OCRBench.json; see docs/evaluation.md")
    images = folder / "OCRBench_Images"

    def question(entry: Any, number: int) -> BenchmarkQuestion:
        image = _picture((images if images.is_dir() else folder) / entry["image_path"], folder)
        formulas = entry["dataset_name"] == _HANDWRITTEN_FORMULAS
        group = _HANDWRITTEN_FORMULAS if formulas else entry["type"]
        return BenchmarkQuestion(
            str(entry.get("id", number)), entry["question"], image, _texts(entry["answers"]), group
        )

    yield from _entries(path, _json(path), question)


def _ocrbench_of_row(row: Mapping[str, Any], key: str) -> BenchmarkQuestion:
    group = _HANDWRITTEN_FORMULAS if row["dataset"] == _HANDWRITTEN_FORMULAS else row["question_type"]
    return BenchmarkQuestion(key, row["question"], _image(row), _texts(row["answer"]), group)


_READERS: dict[
    str,
    tuple[
        Callable[[Path], Iterator[BenchmarkQuestion]],
        Callable[[Mapping[str, Any], str], BenchmarkQuestion],
    ],
] = {
    "ai2d": (_ai2d, _ai2d_of_row),
    "chartqa": (_chartqa, _chartqa_of_row),
    "docvqa": (_docvqa, _docvqa_of_row),
    "ocrbench": (_ocrbench, _ocrbench_of_row),
}
