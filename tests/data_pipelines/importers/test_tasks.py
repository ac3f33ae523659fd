"""Annotations as questions and answers: exact texts where there is only one right one."""

import json

import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.importers.tasks import ColumnOptions, Columns, choose_task, draft_of_columns


def pairs(values, size=(200, 100), **options):
    draft = draft_of_columns(values, ColumnOptions(**{"columns": {}, **options}), "key", lambda _: size)
    said = ["".join(i["text"] for i in m["content"] if i["type"] == "text") for m in draft.messages]
    return list(zip(said[::2], said[1::2], strict=True))


def media(values):
    draft = draft_of_columns(values, ColumnOptions(columns={}), "key", lambda _: (8, 8))
    return [(item["type"], item["ref"]) for item in draft.messages[0]["content"][:-1]]


def test_vqa():
    assert pairs({"image": "a.png", "question": "q", "answers": ["b", "a", "b"]}) == [("q", "b")]
    assert pairs({"question": "q", "answer": {"answer": "two", "confidence": "yes"}}) == [("q", "two")]
    assert pairs({"question": ["q", "r"], "answer": ["a", "b"]}) == [("q", "a"), ("r", "b")]
    assert pairs({"question": "q", "answer": True}) == [("q", "yes")]
    assert pairs({"question": "q", "answer": 3.5}) == [("q", "3.5")]
    assert pairs({"frage": "q", "antwort": "a"}, columns={"question": "frage", "answer": "antwort"}) == [("q", "a")]
    assert media({"images": ["a.png", "b.png"], "question": "q", "answer": "a"}) == [
        ("image", "a.png"),
        ("image", "b.png"),
    ]
    assert media({"video": "v.mp4", "question": "q", "answer": "a"}) == [("video", "v.mp4")]


@pytest.mark.parametrize("answer", ["dog", "B", "b", 1])
def test_multiple_choice(answer):
    ((question, said),) = pairs({"question": "Which?", "choices": ["cat", "dog"], "answer": answer})
    assert question == "Which?\nA. cat\nB. dog\nAnswer with the letter of the right choice."
    assert said == "B. dog"


def test_boxes_are_thousandths_of_the_image():
    row = {"image": "a.png", "phrase": "the cat", "bbox": [20, 10, 100, 60]}
    ((question, said),) = pairs(row)
    assert "the cat" in question
    assert json.loads(said) == [100, 100, 500, 600]
    assert pairs({**row, "bbox": [20, 10, 80, 50]}, box_format="xywh")[0][1] == said
    assert pairs({**row, "bbox": [0.1, 0.1, 0.5, 0.6]}, box_units="unit")[0][1] == said
    assert pairs({**row, "bbox": [100, 100, 500, 600]}, box_units="thousand")[0][1] == said


def test_boxes_of_one_label_are_one_answer():
    row = {
        "image": "a.png",
        "labels": ["cat", "dog", "cat"],
        "boxes": [[0, 0, 20, 10], [0, 0, 200, 100], [20, 0, 40, 10]],
    }
    (cat_question, cats), (_, dog) = pairs(row, task="grounding")
    assert "cat" in cat_question
    assert json.loads(cats) == [[0, 0, 100, 100], [100, 0, 200, 100]]
    assert json.loads(dog) == [0, 0, 1000, 1000]


def test_times():
    row = {"video": "v.mp4", "query": "The dog jumps.", "start": 1, "end": "2.25"}
    ((question, said),) = pairs(row)
    assert "The dog jumps" in question
    assert said == "From 1.0 to 2.2 seconds."
    events = [{"start": 5, "end": 6, "caption": "b"}, {"start": 0, "end": 1.5, "caption": "a"}]
    assert pairs({"video": "v.mp4", "segments": events})[0][1] == "0.0 to 1.5 seconds: a\n5.0 to 6.0 seconds: b"


def test_simple_tasks():
    assert pairs({"image": "a", "caption": "c"})[0][1] == "c"
    assert pairs({"image": "a", "label": "cat"})[0][1] == "cat"
    assert pairs({"image": "a", "text": "t"}, task="ocr")[0][1] == "t"
    assert "video" in pairs({"video": "a", "caption": "c"})[0][0]
    assert pairs({"image": "a", "text": "t", "question": "Read it."}, task="document")[0] == ("Read it.", "t")


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"image": "a", "text": "t"}, {}, "choose --task caption"),
        ({"x": 1}, {}, "columns x fit no task"),
        ({"image": "a"}, {"task": "caption"}, "--column caption=COLUMN"),
        ({"question": ["a", "b"], "answer": "c"}, {}, "2 questions but not as many answers"),
        ({"question": "a", "choices": ["x"], "answer": "y"}, {}, "none of the 1 choices"),
        ({"image": "a", "phrase": "p", "bbox": [0, 0, 300, 10]}, {}, "does not fit into an image of 200x100"),
        ({"image": "a", "phrase": "p", "bbox": [1, 2, 3]}, {}, "not four numbers"),
        ({"image": "a", "phrase": "p", "bbox": [float("nan"), 0, 1, 1]}, {}, "does not fit"),
        ({"video": "v", "query": "q", "start": 3, "end": 2}, {}, "not a span of seconds"),
        ({"video": "v", "segments": ["x"]}, {}, "segment 0 must be an object"),
        ({"question": "q", "answer": [{"a": 1}]}, {}, "expected a text"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(row, options, reason):
    with pytest.raises(DataError, match=reason):
        pairs(row, **options)


def test_wordings_vary_by_key_and_stay_the_same():
    def ask(key):
        draft = draft_of_columns({"image": "a", "caption": "c"}, ColumnOptions(columns={}), key, lambda _: (8, 8))
        return draft.messages[0]["content"][-1]["text"]

    asked = [ask(f"k{i}") for i in range(40)]
    assert len(set(asked)) == 3
    assert asked == [ask(f"k{i}") for i in range(40)]


def test_task_follows_from_columns():
    def chosen(*names):
        return choose_task(Columns({key: ["x"] for key in names}, ColumnOptions(columns={}), "k"))

    assert chosen("question", "answer", "choices") == "multiple_choice"
    assert chosen("image", "question", "answer", "caption") == "vqa"
    assert chosen("image", "bbox", "phrase") == "grounding"
    assert chosen("video", "start_time", "end_time", "query") == "temporal"


def test_a_file_is_a_video_where_its_extension_says_so():
    asked = {"question": "q", "answer": "a"}
    for suffix in ("mp4", "MOV", "mkv", "webm", "avi"):
        for column in ("file_name", "image", "video_file_name"):
            assert media({column: f"c.{suffix}", **asked}) == [("video", f"c.{suffix}")]
    assert media({"file_name": "c.jpg", **asked}) == [("image", "c.jpg")]
    assert media({"images": ["c.mp4", "c.jpg"], **asked}) == [("video", "c.mp4"), ("image", "c.jpg")]
    assert media({"file_name": "c.mp4", "video": "d.mp4", **asked}) == [("video", "d.mp4")]
    assert "video" in pairs({"file_name": "c.mp4", "caption": "c"})[0][0]
    assert pairs({"file_name": "c.mp4", "query": "q", "start": 1, "end": 2})[0][1] == "From 1.0 to 2.0 seconds."


def test_a_column_named_for_videos_holds_no_image():
    options = ColumnOptions(columns={"video": "file_name"})
    draft = draft_of_columns({"file_name": "c.bin", "question": "q", "answer": "a"}, options, "key", lambda _: (8, 8))
    assert [(i["type"], i.get("ref")) for i in draft.messages[0]["content"][:-1]] == [("video", "c.bin")]


def test_capitals_in_names_do_not_matter():
    assert media({"File": "c.png", "Question": "q", "Answer": "a"}) == [("image", "c.png")]
    assert media({"FILE": "c.mp4", "question": "q", "answer": "a"}) == [("video", "c.mp4")]
    assert pairs({"Question": "Q", "question": "q", "ANSWER": "a"}) == [("q", "a")]
    assert pairs({"Frage": "q", "answer": "a"}, columns={"question": "frage"}) == [("q", "a")]
    text = draft_of_columns({"file": "a.py", "question": "q", "answer": "a"}, ColumnOptions(columns={}), "k", None)
    assert [item["type"] for item in text.messages[0]["content"]] == ["text"]


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"image": "a.png", "questtion": "q", "answr": "a"}, {},
         r"did you mean --column question=questtion --column answer=answr\?$"),
        ({"image": "a.png", "question": "q", "The Answerr": 1, "answerx": "a"}, {}, r"mean --column answer=answerx\?$"),
        ({"imgae": "a.png", "Captoin": "q"}, {}, r"did you mean --column image=imgae --column caption=Captoin\?$"),
        ({"image": "a.png", "my questtion": "q", "answer": "a"}, {"columns": {"question": "my question"}},
         r"no column 'my question'; the columns are image, my questtion, answer; did you mean --column "
         r"'question=my questtion'\?$"),
        ({"image": "a.png", "question": "q", "answer": "a"}, {"columns": {"answer": "answre"}},
         r"^--column answer=answre: there is no column 'answre'; the columns are image, question, answer; did you "
         r"mean --column answer=answer\?$"),
        ({"image": "a.png", "question": "q", "answer": "a"}, {"columns": {"answer": "xyz"}, "task": "vqa"},
         "^--column answer=xyz: there is no column 'xyz'; the columns are image, question, answer$"),
        ({"question": "q", "answr": "a"}, {"task": "vqa"}, r"'answer'; did you mean --column answer=answr"),
    ],
)  # fmt: skip
def test_a_slip_in_a_name_comes_with_the_options_to_type(row, options, reason):
    with pytest.raises(DataError, match=reason):
        pairs(row, **options)
