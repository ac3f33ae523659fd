"""What somebody new gets wrong with a folder or table of their own, and what the import says to it."""

import json
from pathlib import Path

import pytest

from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.template import encode_record


@pytest.fixture
def photos(tmp_path, picture):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        (folder / f"p{i}.jpg").write_bytes(picture(60, 60, "JPEG", seed=i))
    return folder


def rows(**names):
    return [
        {names.get(k, k): v for k, v in {"image": f"p{i}.jpg", "question": "q?", "answer": "a"}.items()}
        for i in range(4)
    ]


def test_a_misspelt_image_column_does_not_become_a_dataset_of_text(photos, lines, bring, tmp_path):
    lines(photos / "metadata.jsonl", rows(image="imgae"))
    with pytest.raises(
        DataError, match=r"no image or video; if it is in column 'imgae' \('p0.jpg'\), add --column image=imgae"
    ):
        bring(photos, allow_text=False)
    assert not (tmp_path / "imported").exists()
    assert bring(photos, allow_text=False, columns={"image": "imgae"})["splits"]["train"]["tiles"] == 4


def test_a_folder_of_text_rows_has_to_be_asked_for(photos, lines, bring):
    lines(photos / "metadata.jsonl", [{"question": "q?", "answer": "a"}])
    with pytest.raises(DataError, match=r"--column image=COLUMN .* add --allow-text"):
        bring(photos, allow_text=False)
    assert bring(photos, allow_text=True)["splits"]["train"]["tiles"] == 0


def test_a_table_of_text_is_taken_but_not_one_with_a_picture_that_nobody_reads(tmp_path, bring, picture):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), source / "train.parquet")
    assert bring(source, allow_text=False)["rows"] == 1
    pq.write_table(
        pa.table({"question": ["q"], "answer": ["a"], "scan": [{"bytes": picture(9, 9), "path": None}]}),
        source / "train.parquet",
    )
    with pytest.raises(DataError, match=r"column 'scan', add --column image=scan"):
        bring(source, tmp_path / "other", allow_text=False)


def test_an_empty_answer_is_called_that(photos, lines, bring):
    bad = [*rows()[:3], {"image": "p3.jpg", "question": "q?", "answer": ""}]
    lines(photos / "metadata.jsonl", bad)
    with pytest.raises(
        DataError, match=r"metadata.jsonl:4: column 'answer' is empty: fill it in, or leave the row out"
    ):
        bring(photos)


@pytest.mark.parametrize("mark", [";", "\t", ","])
def test_tables_of_spreadsheets(photos, bring, imported, texts, mark):
    table = [["image", "question", "answer"], *([f"p{i}.jpg", '"a; b, c"', "1"] for i in range(4))]
    (photos / "metadata.csv").write_text("".join(mark.join(row) + "\n" for row in table))
    assert bring(photos, allow_text=False)["splits"]["train"]["samples"] == 4
    assert texts(imported()[0][0]) == ["a; b, c", "1"]


def test_a_tag_in_a_question_that_cannot_be_a_place_is_a_word(photos, lines, bring, imported, tokenizer):
    asked = ["What do <image> and <image> mean in HTML?", "<image>\nWhat is it?", "Plain", "Play the <video> tag"]
    lines(photos / "metadata.jsonl", [{**row, "question": q} for row, q in zip(rows(), asked, strict=True)])
    bring(photos)
    shown = []
    dataset = Dataset.open(photos.parent / "imported", "train")
    for i in range(4):
        stored = dataset.read(i)
        from data_pipelines.media.rules import MediaLayout

        sample = encode_record(stored.record, [MediaLayout("image", (1, 1), False)], tokenizer, tokens_per_tile=1)
        shown.append(tokenizer.decode(sample.input_ids).partition("User\n")[2].partition("\n<SPECIAL_11>")[0])
    place = "<img><image></img>"
    assert shown == [f"{place}\n{asked[0]}", f"{place}\nWhat is it?", f"{place}\nPlain", f"{place}\n{asked[3]}"]


@pytest.mark.parametrize(("given", "meant"), [("P2.JPG", "p2.jpg"), ("p2", "p2.jpg"), ("sub/p9.jpg", None)])
def test_a_missing_file_comes_with_advice(photos, lines, bring, given, meant):
    lines(photos / "metadata.jsonl", [{**rows()[0], "image": given}])
    advice = f"did you mean '{meant}'" if meant else "copy it there, or name the folder it is in with --media-root"
    with pytest.raises(DataError, match=f"image '{given}' is not in the source folder; {advice}"):
        bring(photos)


def test_a_bad_image_is_named_by_its_file(photos, lines, bring):
    from data_pipelines.quality.validate import validate

    data = (photos / "p1.jpg").read_bytes()
    (photos / "p1.jpg").write_bytes(data[: len(data) // 2])
    lines(photos / "metadata.jsonl", rows())
    bring(photos)
    (problem,) = validate(photos.parent / "imported").problems
    assert problem.reason.startswith("p1.jpg: image cannot be decoded")


def test_held_out_shares_follow_the_pictures(photos, lines, bring, picture, rejected, tmp_path):
    many = []
    for i in range(60):
        (photos / f"q{i}.jpg").write_bytes(picture(40, 40, "JPEG", seed=100 + i))
        many += [{"image": f"q{i}.jpg", "question": f"q{k}?", "answer": "a"} for k in range(3)]
    lines(photos / "metadata.jsonl", [*many, {"image": "none.jpg", "question": "q", "answer": "a"}])
    result = bring(photos, heldout=0.2, max_bad=0.5)

    def pictures(out, split):
        dataset = Dataset.open(out, split)
        return {dataset.read(i).record["messages"][0]["content"][0]["source"] for i in range(len(dataset))}

    out = tmp_path / "imported"
    train, heldout = pictures(out, "train"), pictures(out, "heldout")
    assert not train & heldout
    assert len(train | heldout) == 60
    assert 5 <= len(heldout) <= 20
    counts = result["splits"]
    assert counts["train"]["samples"] + counts["heldout"]["samples"] == 180
    assert [line["split"] for line in rejected()] == ["train"]
    # Any number of workers gives the same, and a sample stays on its side when others come and go.
    bring(photos, tmp_path / "two", heldout=0.2, max_bad=0.5, workers=2)
    for name in ("train.parquet", "heldout.parquet", "heldout-00000.tar", "dataset.json"):
        ours, theirs = (folder / name for folder in (out, tmp_path / "two"))
        assert ours.read_bytes().replace(b'"imported"', b'"two"') == theirs.read_bytes()
    lines(photos / "metadata.jsonl", many[30:])
    bring(photos, tmp_path / "less", heldout=0.2)
    assert pictures(tmp_path / "less", "heldout") <= heldout
    with pytest.raises(DataError, match=r"--heldout 2 must be between 0 and 0.5"):
        bring(photos, tmp_path / "more", heldout=2)


def test_conversations_with_tools_from_three_shapes(tmp_path, lines, bring, imported, tokenizer):
    tool = {"name": "add", "description": "adds", "parameters": {"type": "object", "b": 1, "a": 2}}
    call = {"name": "add", "arguments": {"y": 1, "x": 2}}
    openai = {
        "tools": [{"type": "function", "function": tool}],
        "messages": [
            {"role": "user", "content": "1+2?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}]},
            {"role": "tool", "tool_call_id": "c", "content": "3"},
            {"role": "assistant", "content": "3"},
        ],
    }  # fmt: skip
    sharegpt = {
        "tools": json.dumps([tool]),
        "conversations": [
            {"from": "human", "value": "1+2?"}, {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "3"}, {"from": "gpt", "value": "3"},
        ],
    }  # fmt: skip
    seen = []
    for name, row in (("openai", openai), ("sharegpt", sharegpt)):
        bring(lines(tmp_path / f"{name}.jsonl", [row]), tmp_path / name)
        ((record, _),) = imported(tmp_path / name)
        seen.append(tokenizer.decode(encode_record(record, [], tokenizer, tokens_per_tile=4).input_ids))
    assert seen[0] == seen[1]
    assert f"<AVAILABLE_TOOLS>[{json.dumps(tool)}]</AVAILABLE_TOOLS>" in seen[0]
    assert (
        '<think></think><TOOLCALL>[{"name": "add", "arguments": {"y": 1, "x": 2}}]</TOOLCALL>\n<SPECIAL_12>' in seen[0]
    )
    assert "<SPECIAL_11>User\n<TOOL_RESPONSE>[3]</TOOL_RESPONSE>\n<SPECIAL_11>Assistant\n<think></think>3\n" in seen[0]
    xlam = {"id": 4, "query": "1+2?", "tools": json.dumps([tool]), "answers": json.dumps([call, call])}
    bring(lines(tmp_path / "xlam.jsonl", [xlam]), tmp_path / "xlam", allow_text=False)
    ((record, _),) = imported(tmp_path / "xlam")
    assert len(record["messages"][1]["tool_calls"]) == 2
    broken = {**openai, "messages": [*openai["messages"][:1], {"role": "tool", "content": "3"}, openai["messages"][3]]}
    with pytest.raises(DataError, match="answers no call"):
        bring(lines(tmp_path / "broken.jsonl", [broken]), tmp_path / "broken")


@pytest.mark.parametrize("columns", [{}, {"video": "file_name"}])
def test_a_folder_of_clips(tmp_path, lines, bring, imported, clip, columns):
    source = tmp_path / "clips"
    lines(source / "metadata.jsonl", [{"file_name": "c.mp4", "question": "q?", "answer": "a"}])
    (source / "c.mp4").write_bytes(clip())
    assert bring(source, allow_text=False, columns=columns)["format"] == "folder"
    assert imported()[0][0]["messages"][0]["content"][0]["type"] == "video"


def test_two_kinds_of_metadata_are_refused_by_name(photos, lines, bring, tmp_path):
    lines(photos / "metadata.jsonl", rows())
    (photos / "metadata.csv").write_text("image,question,answer\np0.jpg,q,a\n")
    with pytest.raises(
        DataError, match=r"metadata.jsonl and .*metadata.csv both .* import .*photos/metadata.csv --out"
    ):
        bring(photos)
    assert not (tmp_path / "imported").exists()
    assert bring(photos / "metadata.csv", tmp_path / "one")["rows"] == 1
    (photos / "metadata.csv").rename(photos / "old.csv")
    assert bring(photos)["rows"] == 4


def test_an_option_that_names_no_column_of_a_table(photos, bring):
    (photos / "metadata.csv").write_text("File,Question,Answer\np0.jpg,q,a\n")
    with pytest.raises(DataError, match=r"--column image=phot0: there is no column 'phot0'; the columns are File, Que"):
        bring(photos, allow_text=False, columns={"image": "phot0"})
    assert bring(photos, allow_text=False)["splits"]["train"]["tiles"] == 1


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_medium_without_bytes_is_called_empty(kind):
    from data_pipelines.media.image import image_size
    from data_pipelines.media.video import probe

    with pytest.raises(DataError, match=rf"^{kind} file is empty \(0 bytes\)$"):
        (image_size if kind == "image" else probe)(b"")


def test_the_list_of_rejected_rows_is_where_the_error_says(photos, lines, bring):
    (photos / "p1.jpg").write_bytes(b"")
    lines(photos / "metadata.jsonl", rows())
    with pytest.raises(DataError, match=r"All are listed in \S+/units/\*/rejected.jsonl\.") as caught:
        bring(photos)
    folder, _, pattern = str(caught.value).partition("listed in ")[2].partition(". Repair")[0].partition("/units/")
    (listed,) = Path(folder).glob(f"units/{pattern}")
    assert json.loads(listed.read_text())["message"] == "image 'p1.jpg' is empty (0 bytes); copy it again"
