"""The two shapes everything on the data side meets: a record (JSON, one sample) and a Pack (tensors, one micro-batch).

Shape legend: S tokens of a pack, T tiles, P tile side in pixels, Nb documents of a pack rounded up to a bucket.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from data_pipelines.exceptions import DataError

IGNORE_LABEL = -100
"""Label of a position that predicts nothing."""

ROLES = ("system", "user", "assistant", "tool")
MEDIA_KINDS = ("image", "video")
_MEMBER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Several samples in one sequence of fixed length, all that the model needs for one micro-batch.

    Attributes:
        index: Number of the pack in the run's stream; -1 for a fill pack that belongs to no position.
        input_ids: [S] int64, one image id per visual feature.
        labels: [S] int64, target predicted at each position (shifted inside each sample), -100 where unsupervised.
        loss_weight: [S] float32, raw weight of each target, 0 where unsupervised; divided by no global sum.
        position_ids: [S] int64, restarts at every document.
        seq_idx: [S] int32, document number; the padding tail is a document of its own.
        cu_seqlens: [Nb + 1] int32, document boundaries from 0 to S, S repeated up to the bucket.
        max_seqlen: Longest document rounded up to a bucket, at most S.
        tiles: [T, 3, P, P] uint8 RGB, not normalised.
        tile_token_start: [T] int64, position in input_ids of the first image token of each tile.
        tile_tokens: [T] int64, image tokens of each tile, where a share of the videos' is dropped; None where every
            tile has all. Of a video only their sum is fixed: the model moves them, within the video's tokens, to the
            frames whose features it keeps.
        media_of_tile: [T] int32, number of the image or video in this pack that the tile belongs to.
        is_thumbnail: [T] bool.
        frame_time: [T] float32, seconds from the start of the video; nan for images.
        sample_keys: Record ids, in the order of the documents.
        dataset_ids: Source name of each sample.
        stats: tokens, supervised_tokens, visual_tokens, padding, num_samples, quarantined.
    """

    index: int
    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_weight: torch.Tensor
    position_ids: torch.Tensor
    seq_idx: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    tiles: torch.Tensor
    tile_token_start: torch.Tensor
    media_of_tile: torch.Tensor
    is_thumbnail: torch.Tensor
    frame_time: torch.Tensor
    sample_keys: tuple[str, ...]
    dataset_ids: tuple[str, ...]
    stats: dict[str, int | float]
    tile_tokens: torch.Tensor | None = None

    def pin_memory(self) -> "Pack":
        """The same pack in page-locked memory, from which a device copies without stopping the host."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = value.pin_memory() if isinstance(value, torch.Tensor) else value
        return Pack(**values)

    def digest(self) -> str:
        """SHA-256 over every field: equal digests mean bitwise equal packs."""
        sha = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                sha.update(f"{field.name} {value.dtype} {tuple(value.shape)}".encode())
                sha.update(value.contiguous().numpy().tobytes())
            else:
                sha.update(f"{field.name} {json.dumps(value, sort_keys=True)}".encode())
        return sha.hexdigest()


@dataclass(frozen=True)
class MediaItem:
    """One image or video of a record.

    Attributes:
        kind: `image` or `video`.
        member: Name of the bytes in the sample's media mapping.
        metadata: The item's own `metadata` object, empty when absent.
        source: What the medium was called where it came from; its member where that is not known.
    """

    kind: str
    member: str
    metadata: Mapping[str, Any]
    source: str


def content_items(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The message's content as a list of typed items; a plain string is one text item."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def media_items(record: Mapping[str, Any]) -> Iterator[MediaItem]:
    """Every image and video of a valid record, in the order of messages and items. This order numbers the media."""
    for message in record["messages"]:
        for item in content_items(message):
            if item["type"] in MEDIA_KINDS:
                member = item[item["type"]]
                yield MediaItem(item["type"], member, item.get("metadata") or {}, item.get("source", member))


def validate_record(record: object, *, prompt: bool = False) -> None:
    """Check one record: `{"id", "messages": [{"role", "content": [{"type": "text"|"image"|"video", ...}]}]}`.

    The shape is that of the public Nemotron-VLM-Dataset-v2 (`data_format.md`). Roles: at most one system message,
    first; then user and assistant in turn. Media belong to user messages. A text item may carry `"literal": true`,
    which says that `<image>` and `<video>` in it are words and never stand for media.

    Tools are `"tools": [JSON text of each definition]` on the record and `"tool_calls": [{"name", "arguments": JSON
    text}]` on an assistant message, answered by a `tool` message for each call, in the place of the user's. They are
    texts because their tokens depend on the order of keys, which a record does not keep.

    Args:
        record: Parsed JSON.
        prompt: The record asks for an answer: it may end with a user message.

    Raises:
        DataError: With the record's id, the place and the reason.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"a record must be a JSON object, got {type(record).__name__}")
    key = record.get("id")
    if not isinstance(key, str) or not key:
        raise DataError(f"record {key!r}: 'id' must be a non-empty string")
    _check_text(key, f"record {key!r}: 'id'")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"record {key!r}: 'messages' must be a non-empty list")
    for number, message in enumerate(messages):
        _check_message(message, f"record {key!r}, message {number}")
    tools = record.get("tools", [])
    if not isinstance(tools, list) or not all(_is_json_object(tool) for tool in tools):
        raise DataError(
            f"record {key!r}: 'tools' must be a list of texts, each a JSON object such as '{{\"name\": ...}}'"
        )
    _check_turns(key, messages, prompt=prompt)


def _is_json_object(text: object) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _check_turns(key: str, messages: list[Mapping[str, Any]], *, prompt: bool) -> None:
    roles = [message["role"] for message in messages]
    for number, (before, message) in enumerate(itertools.pairwise(messages), 1):
        # A run of results stands where a user's message would.
        if message["role"] == "tool" and not (before["role"] == "tool" or before.get("tool_calls")):
            raise DataError(
                f"record {key!r}, message {number}: the tool message answers no call; the assistant's message before "
                "it needs 'tool_calls'"
            )
    turns = ["user" if role == "tool" else role for role, _ in itertools.groupby(roles)]
    turns = roles if "tool" not in roles else turns
    turns = turns[1:] if turns[0] == "system" else turns
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if turns != expected:
        raise DataError(
            f"record {key!r}: roles are {roles}; write one optional system message, then user and assistant in turn "
            "(tool messages in the place of a user's where the answer before them calls tools)"
        )
    if not turns or (turns[-1] != "assistant" and not prompt):
        raise DataError(f"record {key!r}: the last message must be the assistant's answer, roles are {roles}")


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: must be an object, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    for call in message.get("tool_calls", ()):
        named = role == "assistant" and isinstance(call, Mapping) and isinstance(call.get("name"), str)
        if not (named and set(call) == {"name", "arguments"} and _is_json_object(call["arguments"])):
            raise DataError(
                f"{where}: a call is made by the assistant and has a 'name' and 'arguments', the text of a JSON "
                f"object; got {call!r:.120}"
            )
    if isinstance(content, str):
        _check_text(content, where)
        return
    if not isinstance(content, list):
        raise DataError(f"{where}: 'content' must be a string or a list of items, got {type(content).__name__}")
    for number, item in enumerate(content):
        _check_item(item, role, f"{where}, item {number}")


def _check_item(item: object, role: str, where: str) -> None:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: must be an object, got {type(item).__name__}")
    kind = item.get("type")
    if kind == "text":
        if not isinstance(item.get("text"), str):
            raise DataError(f"{where}: a text item needs a string 'text'")
        _check_text(item["text"], where)
    elif kind in MEDIA_KINDS:
        member = item.get(kind)
        if role != "user":
            raise DataError(f"{where}: {kind} in a {role} message; media belong to user messages")
        if not isinstance(member, str) or not _MEMBER_NAME.fullmatch(member) or member == "json":
            raise DataError(
                f"{where}: '{kind}' must name a member with letters, digits, '.', '_' or '-', got {member!r}"
            )
        if not isinstance(item.get("metadata", {}), Mapping | None):
            raise DataError(f"{where}: 'metadata' must be an object")
    else:
        raise DataError(f"{where}: type {kind!r} is not one of text, image, video")


def _check_text(text: str, where: str) -> None:
    # A lone surrogate survives JSON but has no UTF-8 form, so neither the tokenizer nor the shard could take it.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: text is not valid Unicode at character {error.start}") from error
