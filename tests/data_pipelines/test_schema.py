import pytest

from data_pipelines.exceptions import DataError
from data_pipelines.schema import media_items, validate_record

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def test_accepts_text_items_strings_and_media():
    items = [{"type": "image", "image": "a.png", "metadata": {"width": 3}}, {"type": "text", "text": "q"}]
    good = {"id": "x", "messages": [{"role": "system", "content": ""}, {"role": "user", "content": items}, ANSWER]}
    validate_record(good)
    assert [(m.kind, m.member, m.metadata) for m in media_items(good)] == [("image", "a.png", {"width": 3})]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "JSON object"),
        ({"messages": [ASK, ANSWER]}, "'id' must be"),
        ({"id": "x"}, "'messages' must be"),
        ({"id": "x", "messages": [ASK]}, "last message must be the assistant"),
        ({"id": "x", "messages": [ANSWER, ASK]}, "and assistant in turn"),
        ({"id": "x", "messages": [ASK, ASK, ANSWER]}, "and assistant in turn"),
        ({"id": "x", "messages": [{"role": "narrator", "content": ""}]}, "role 'narrator' is not one of"),
        ({"id": "x", "messages": [ASK, {"role": "tool", "content": ""}]}, "answers no call"),
        (
            {"id": "x", "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
            "a call is",
        ),
        ({"id": "x", "tools": [{"name": "f"}], "messages": [ASK, ANSWER]}, "list of texts, each a JSON object"),
        ({"id": "x", "messages": [{"role": "user", "content": 3}]}, "string or a list"),
        ({"id": "x", "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type 'audio'"),
        ({"id": "x", "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs a string"),
        ({"id": "x", "messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
        ({"id": "x", "messages": [{"role": "user", "content": [{"type": "image", "image": "../a"}]}]}, "must name"),
        ({"id": "x", "messages": [ASK, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}, "belong"),
    ],
)
def test_refuses_with_the_reason(record, reason):
    with pytest.raises(DataError, match=reason):
        validate_record(record)


def test_a_prompt_may_end_with_a_question():
    validate_record({"id": "x", "messages": [ASK]}, prompt=True)
