"""Local copies in the layouts they are published in: both forms of each give the same questions."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nemovl_train.evaluation.benchmarks import BenchmarkQuestion, ocrbench, read_benchmark
from nemovl_train.evaluation.sets import BENCHMARKS
from nemovl_train.exceptions import DataError

SHORT = "\nAnswer the question using a single word or phrase."
CHOICES = "Which?\nA. ant\nB. bee\nC. cow\nAnswer with the option's letter from the given choices directly."


def png(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def write_json(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(shade))


def ai2d(root: Path) -> None:
    for name in ("7", "8"):
        about = {"abcLabel": False, "answerTexts": ["ant", "bee", "cow"], "correctAnswer": 1, "questionId": f"q{name}"}
        write_json(
            root / "questions" / f"{name}.png.json", {"imageName": f"{name}.png", "questions": {"Which?": about}}
        )
        write_image(root / "images" / f"{name}.png", int(name))
    (root / "ai2d_test_ids.csv").write_text("7\n")


def chartqa(root: Path) -> None:
    data = root / "ChartQA Dataset"
    write_json(data / "test/test_human.json", [{"imgname": "7.png", "query": "How many?", "label": "12"}])
    write_json(data / "test/test_augmented.json", [{"imgname": "8.png", "query": "Who?", "label": "Ann"}])
    write_image(data / "test/png/7.png", 7)
    write_image(data / "test/png/8.png", 8)


def docvqa(root: Path) -> None:
    entry = {"questionId": 49, "question": "Who?", "image": "documents/7.png", "answers": ["Ann", "ann"]}
    entry |= {"docId": 1, "question_types": ["form"]}
    write_json(root / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": [entry]})
    write_image(root / "documents/7.png", 7)


def ocr(root: Path) -> None:
    rows = [
        {"dataset_name": "IIIT5K", "type": "Regular Text Recognition", "id": 0, "image_path": "IIIT5K/7.png"},
        {"dataset_name": "HME100k", "type": "Handwritten", "id": 1, "image_path": "HME100k/8.png"},
    ]
    texts = [{"question": "what is written?", "answers": ["STOP"]}, {"question": "formula?", "answers": "x ^ 2"}]
    write_json(root / "OCRBench.json", [a | b for a, b in zip(rows, texts, strict=True)])
    write_image(root / "OCRBench_Images/IIIT5K/7.png", 7)
    write_image(root / "OCRBench_Images/HME100k/8.png", 8)


ORIGINAL = {"ai2d": ai2d, "chartqa": chartqa, "docvqa": docvqa, "ocrbench": ocr}
TABLES = {
    "ai2d": [{"question": "Which?", "options": ["ant", "bee", "cow"], "answer": "1"}],
    "chartqa": [
        {"type": "human_test", "question": "How many?", "answer": "12"},
        {"type": "augmented_test", "question": "Who?", "answer": "Ann"},
    ],
    "docvqa": [{"questionId": "49", "question": "Who?", "question_types": ["form"], "answers": ["Ann", "ann"]}],
    "ocrbench": [
        {
            "dataset": "IIIT5K",
            "question": "what is written?",
            "question_type": "Regular Text Recognition",
            "answer": ["STOP"],
        },
        {"dataset": "HME100k", "question": "formula?", "question_type": "Handwritten", "answer": ["x ^ 2"]},
    ],
}
EXPECTED = {
    "ai2d": [(CHOICES, ("B",), "")],
    "chartqa": [("How many?" + SHORT, ("12",), "human"), ("Who?" + SHORT, ("Ann",), "augmented")],
    "docvqa": [("Who?" + SHORT, ("Ann", "ann"), "form")],
    "ocrbench": [
        ("what is written?", ("STOP",), "Regular Text Recognition"),
        ("formula?", ("x ^ 2",), "HME100k"),
    ],
}


def write_table(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"image": {"bytes": png(7 + i), "path": f"{i}.png"}} for i in range(len(rows))]
    table = pa.Table.from_pylist([a | b for a, b in zip(rows, images, strict=True)])
    pq.write_table(table, folder / "test-00000-of-00001.parquet")


def seen(questions: list[BenchmarkQuestion]) -> list[tuple]:
    return [(q.question, q.references, q.group) for q in questions]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_layouts_give_the_same_questions(name, tmp_path):
    ORIGINAL[name](tmp_path / "original")
    write_table(tmp_path / "table" / "data", TABLES[name])
    for folder in ("original", "table"):
        found = list(read_benchmark(name, tmp_path / folder))
        assert seen(found) == EXPECTED[name]
        assert [q.image for q in found] == [png(7 + i) for i in range(len(found))]
        assert len({q.key for q in found}) == len(found)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_other_folders_are_refused(name, tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        list(read_benchmark(name, tmp_path))
    write_table(tmp_path, [{"text": "other columns"}])
    with pytest.raises(DataError, match=r"row 0: KeyError.*its columns are text, image"):
        list(read_benchmark(name, tmp_path))


def test_pictures_stay_inside_the_folder(tmp_path):
    docvqa(tmp_path / "set")
    write_image(tmp_path / "outside.png", 1)
    path = tmp_path / "set/val_v1.0_withQT.json"
    path.write_text(path.read_text().replace("documents/7.png", "../outside.png"))
    with pytest.raises(DataError, match="no such picture below"):
        list(read_benchmark("docvqa", tmp_path / "set"))


def test_the_hidden_answers_of_docvqas_test_split_are_named(tmp_path):
    write_table(tmp_path, [{**TABLES["docvqa"][0], "answers": None}])
    with pytest.raises(DataError, match="test split, whose answers are not public"):
        list(read_benchmark("docvqa", tmp_path))


def test_ocrbench_scores_by_hand():
    assert ocrbench("The word is stop.", ["STOP"], "Regular Text Recognition") == 1.0
    assert ocrbench("The word is st op.", ["STOP"], "Regular Text Recognition") == 0.0
    assert ocrbench("it is x^2 + y", ["x ^ 2"], "HME100k") == 1.0
    assert ocrbench("it is X^2 + y", ["x ^ 2"], "HME100k") == 0.0
