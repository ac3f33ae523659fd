"""Rows that hold a conversation, in the forms that public datasets use, as records.

    messages        [{"role", "content": text or items}]      OpenAI, Hugging Face chat, Nemotron-VLM-Dataset-v2
    conversations   [{"from": "human"|"gpt", "value"}]        LLaVA, ShareGPT, Llama-Nemotron-VLM-Dataset-v1
    texts           [{"user", "assistant"}]                   the Cauldron, FineVision
    query           with `tools` and `answers` (the calls)    xLAM function calling (APIGen)

Tools are `tools` beside the messages, `tool_calls` of an assistant message and `tool` messages (OpenAI), or the turns
`function_call` and `observation` (ShareGPT).

Media are either items of a message, or lie beside the conversation (`image`, `images`, `video`, `videos`) and stand
where the text has `<image>` or `<video>`; without such tags they belong to the first user message.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.exceptions import DataError

ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "system": "system", "developer": "system",
    "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_MEDIA_COLUMNS = {"image": ("image", "images"), "video": ("video", "videos")}


@dataclass
class Draft:
    """A record whose media are still references.

    Attributes:
        messages: As in a record, but an item of type image or video holds its reference under `ref`.
        extra: Further top-level fields of the record.
    """

    messages: list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)


def has_conversation(values: Mapping[str, Any]) -> str:
    """Name of the field that holds the conversation; empty when there is none."""
    if {"query", "tools", "answers"} <= set(values):
        return "query"
    return next((name for name in ("messages", "conversations", "conversation", "texts") if _turns(values, name)), "")


def _turns(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0


def draft_of(values: Mapping[str, Any]) -> Draft:
    """Messages of a row that holds a conversation.

    Raises:
        DataError: No conversation, a turn of unknown shape, or tags that do not match the media.
    """
    name = has_conversation(values)
    if not name:
        raise DataError(
            f"no messages, conversations or texts in the row; it has {', '.join(map(str, values)) or 'no field'}"
        )
    if name == "query":
        messages = [
            {"role": "user", "content": [_text(str(values["query"]))]},
            {"role": "assistant", "content": [], "tool_calls": _calls(values["answers"], "answers")},
        ]
    elif name == "texts":
        messages = _from_pairs(values[name])
    else:
        messages = [_message(turn, f"{name}[{i}]") for i, turn in enumerate(values[name])]
        system = values.get("system")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    for kind, columns in _MEDIA_COLUMNS.items():
        beside = [ref for column in columns for ref in as_list(values.get(column))]
        _place(messages, kind, beside)
    tools = _tools(values.get("tools"))
    return Draft(messages, {"tools": tools} if tools else {})


def _tools(value: Any) -> list[str]:
    """Definitions of tools as JSON texts with their keys in the source's order, which their tokens depend on."""
    tools = _parsed(value, "tools") if value else []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools must be a list of objects, got {value!r:.80}")
    return [_json_text(tool["function"] if isinstance(tool.get("function"), Mapping) else tool) for tool in tools]


def _calls(value: Any, where: str) -> list[dict[str, str]]:
    calls = _parsed(value, where)
    calls = [calls] if isinstance(calls, Mapping) else calls
    found = []
    for call in calls:
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
        if not isinstance(name, str) or not isinstance(arguments, str | Mapping):
            raise DataError(f"{where}: a call needs a name and arguments, got {call!r:.80}")
        found.append({"name": name, "arguments": arguments if isinstance(arguments, str) else _json_text(arguments)})
    return found


def _json_text(value: Mapping[str, Any]) -> str:
    """As Transformers' chat templates write JSON."""
    return json.dumps(value, ensure_ascii=False)


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def as_list(value: Any) -> list[Any]:
    """References of a media column: none, one, or several."""
    if value is None or value == "":
        return []
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return [item for item in value if item is not None]
    return [value]


def _from_pairs(texts: Sequence[Any]) -> list[dict[str, Any]]:
    messages = []
    for i, pair in enumerate(texts):
        if not isinstance(pair, Mapping) or not isinstance(pair.get("user"), str):
            raise DataError(f"texts[{i}] must hold 'user' and 'assistant', got {pair!r:.80}")
        if i == 0 and isinstance(pair.get("system"), str) and pair["system"]:
            messages.append({"role": "system", "content": [_text(pair["system"])]})
        messages.append({"role": "user", "content": [_text(pair["user"])]})
        messages.append({"role": "assistant", "content": [_text(str(pair.get("assistant") or ""))]})
    return messages


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} must be an object, got {turn!r:.80}")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(str(name).lower())
    if role is None:
        raise DataError(f"{where}: role {name!r} is not one of {', '.join(sorted(ROLES))}")
    content = turn.get("content", turn.get("value"))
    if str(name).lower() == "function_call":
        return {"role": role, "content": [], "tool_calls": _calls(content, where)}
    if turn.get("tool_calls"):
        calls = {"tool_calls": _calls(turn["tool_calls"], where)}
        if content is None or isinstance(content, str):
            return {"role": role, "content": [_text(content)] if content else [], **calls}
        return {"role": role, "content": [_item(item, f"{where}, item {i}") for i, item in enumerate(content)], **calls}
    if isinstance(content, str):
        return {"role": role, "content": [_text(content)]}
    if not isinstance(content, Sequence):
        raise DataError(f"{where}: content must be a text or a list of items, got {type(content).__name__}")
    return {"role": role, "content": [_item(item, f"{where}, item {i}") for i, item in enumerate(content)]}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _item(item: Any, where: str) -> dict[str, Any]:
    """One content item: text, image, video, or OpenAI's image_url."""
    if isinstance(item, str):
        return _text(item)
    if not isinstance(item, Mapping):
        raise DataError(f"{where} must be an object, got {type(item).__name__}")
    kind = str(item.get("type")).removesuffix("_url")
    if kind == "text" and isinstance(item.get("text"), str):
        literal = {"literal": True} if item.get("literal") is True else {}
        return {**_text(item["text"]), **literal}
    if kind not in _MEDIA_COLUMNS:
        raise DataError(f"{where}: type {item.get('type')!r} is not one of text, image, video")
    # A table gives every item every field, most of them empty.
    fields = (f"{kind}_url", kind, "url", "path")
    reference = next((item[name] for name in fields if item.get(name) is not None), None)
    if isinstance(reference, Mapping) and "url" in reference:
        reference = reference["url"]
    metadata = item.get("metadata")
    kept = {"metadata": dict(metadata)} if kind == "video" and isinstance(metadata, Mapping) else {}
    source = {"source": item["source"]} if isinstance(item.get("source"), str) else {}
    return {"type": kind, "ref": reference, **kept, **source}


def _place(messages: list[dict[str, Any]], kind: str, beside: list[Any]) -> None:
    """Give media that lie beside the conversation to the messages that have a place for them."""
    empty = [
        item for message in messages for item in message["content"] if item["type"] == kind and item["ref"] is None
    ]
    if empty:
        # Hugging Face chat style: an item without a reference takes the next of the column.
        if len(empty) != len(beside):
            raise DataError(
                f"{len(empty)} {kind} items without a name, but {len(beside)} {kind}(s) beside the messages"
            )
        for item, reference in zip(empty, beside, strict=True):
            item["ref"] = reference
        return
    users = [message for message in messages if message["role"] == "user"]
    if not beside or not users:
        return
    counts = [_tags(message, kind) for message in users]
    if not sum(counts):
        counts[0] = len(beside)
    if sum(counts) != len(beside):
        raise DataError(f"{sum(counts)} <{kind}> in the user texts, but {len(beside)} {kind}(s) in the row")
    references = iter(beside)
    for message, count in zip(users, counts, strict=True):
        items = [{"type": kind, "ref": next(references)} for _ in range(count)]
        message["content"] = [*items, *message["content"]]


def _tags(message: Mapping[str, Any], kind: str) -> int:
    return sum(item["text"].count(f"<{kind}>") for item in message["content"] if item["type"] == "text")
