r"""The named template `nano_v2_vl`: from a record to ids, labels and the places of its tiles.

The prompt rules are those of the released model's folder (NVIDIA-Nemotron-Nano-12B-v2-VL-BF16, chat template and
processor), as rendered by vLLM's `nano_nemotron_vl` processor:

    <s><SPECIAL_10>System\n{system}\n<SPECIAL_11>User\n{content}\n<SPECIAL_11>Assistant\n{answer}\n<SPECIAL_12>\n

* The system block is always there. Reasoning is off unless `/think` appears in a system or user text before the answer;
  the last of `/think` and `/no_think` wins, and both are removed from the text (`</think>` is kept).
* With reasoning off an answer without a trace of its own starts with a literal `<think></think>`; it is encoded apart
  from the answer, because that is where a generation prompt ends.
* The loss covers what follows `<SPECIAL_11>Assistant\n`, through `<SPECIAL_12>` and its newline. Labels are shifted
  inside the sample: the last token predicts nothing.

**Several turns.** Earlier answers are written as the last one is, with the switches read up to each: `<think></think>`
in front, or their own trace, or nothing where reasoning was on and the text holds no trace. So the prompt of a turn is
a prefix of the prompt of the next, in training (where each turn of one sequence is both a target and history) and when
served (where the earlier tokens, `<think></think>` included, are what the model saw and wrote, and their cached states
can be used again). The released folder's own template leaves `<think></think>` out of earlier turns; NVIDIA-NeMo/RL
patches it back into the sibling Nemotron Nano v2 (`_patch_nemotron_nano_v2_chat_template`) for this very prefix
property. The chat template that we export renders as this module does. Where a tokenizer's folder brings a template of
its own, an export keeps that one, and it alone decides what history looks like when served.

**Tools.** As in the chat template of NVIDIA-Nemotron-Nano-9B-v2 (its model card prints it), whose tags the released
folder's shares. Definitions follow the system text, with `TOOLS_INTRODUCTION` and `TOOLS_USE` around them, word for
word: the model was trained on them. Calls end an answer, after an empty line if it says something; they are in the
loss. The results of its calls share one user turn, which is not: neither is searched for switches or tags.

    ...{answer}\n\n<TOOLCALL>[{"name": "add", "arguments": {"a": 1}}]</TOOLCALL>\n<SPECIAL_12>\n
    <SPECIAL_11>User\n<TOOL_RESPONSE>[{result}, {result}]</TOOL_RESPONSE>\n

**Tags and words.** `<image>` and `<video>` in a user text may stand for media or be words. One rule, per message and
kind, with n attached media and k tags in its text items (each item by itself, reasoning switches taken out):

* n = 0: the tags are words and stay text, whatever their number.
* n > 0, k = 0: tags are put before the text (one image: `<image>\n`; several: `<image 1><image> <image 2><image>\n`;
  every video: `<video>\n`).
* n > 0, k = n: the tags stand for the media, in order, where they are.
* anything else is a DataError that names record, message and counts.

A text item with `"literal": true` is never searched for tags. System and assistant texts are never searched. Words are
encoded as ordinary characters, special tokens are inserted as ids, so no text can forge an image or a turn.

Shape legend: S tokens of the sample, T tiles of the sample.
"""

import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.exceptions import DataError
from data_pipelines.media.rules import MediaLayout
from data_pipelines.schema import IGNORE_LABEL, MEDIA_KINDS, content_items, validate_record
from data_pipelines.tokenizer import BOS, IMAGE, IMAGE_END, IMAGE_START, ROLE, SYSTEM, TURN_END, TextTokenizer

TEMPLATES = ("nano_v2_vl",)
NO_TURN = -1
TRACE_START, NO_TRACE = "<think>\n", "<think></think>"
"""How a prompt ends where reasoning is on, and where it is off."""
TOOLS_INTRODUCTION = "You can use the following tools to assist the user if required:\n"
TOOLS_USE = (
    "If you decide to call any tool(s), use the following format:\n"
    '<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}, '
    '{{"name": "tool_name2", "arguments": "tool_args2"}}]</TOOLCALL>\n\n'
    "The user will execute tool-calls and return responses from tool(s) in this format:\n"
    '<TOOL_RESPONSE>[{{"tool_response1"}}, {{"tool_response2"}}]</TOOL_RESPONSE>\n\n'
    "Based on the tool responses, you can call additional tools if needed, correct tool calls if any errors are found, "
    "or just respond to the user."
)
"""What the released template writes around the definitions of tools; the doubled braces are its own."""
_SWITCH = re.compile(r"/think|/no_think")
_END_THINK = "</think>"


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One sample as tokens.

    Attributes:
        input_ids: [S] int64.
        labels: [S] int64, target predicted at each position, -100 where there is none.
        turns: [S] int32, number of the assistant turn that the target belongs to, -1 where there is no target.
        tile_start: [T] int64, position of the first image token of each tile.
        tile_tokens: [T] int64, image tokens of each tile.
        media_of_tile: [T] int32, number of the medium in record order.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    turns: np.ndarray
    tile_start: np.ndarray
    tile_tokens: np.ndarray
    media_of_tile: np.ndarray


class _Writer:
    """Collects ids; text is buffered so that neighbouring pieces merge, as they do when the template is one string."""

    def __init__(self, tokenizer: TextTokenizer, tokens_per_tile: int) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_tile = tokens_per_tile
        self.ids: list[int] = []
        self.turns: list[int] = []
        self.tile_start: list[int] = []
        self.tile_tokens: list[int] = []
        self.media_of_tile: list[int] = []
        self.turn = NO_TURN
        self._pending = ""

    def text(self, text: str) -> None:
        self._pending += text

    def flush(self) -> None:
        if self._pending:
            self._add(self.tokenizer.encode_text(self._pending))
            self._pending = ""

    def special(self, name: str) -> None:
        self.flush()
        self._add([self.tokenizer.special(name)])

    def image_run(self, tile_tokens: Sequence[int], media: int) -> None:
        self.special(IMAGE_START)
        for tokens in tile_tokens:
            self.tile_start.append(len(self.ids))
            self.tile_tokens.append(tokens)
            self.media_of_tile.append(media)
            self._add([self.tokenizer.special(IMAGE)] * tokens)
        self.special(IMAGE_END)

    def _add(self, ids: list[int]) -> None:
        self.ids += ids
        self.turns += [self.turn] * len(ids)


def encode_record(
    record: Mapping[str, Any], layouts: Sequence[MediaLayout], tokenizer: TextTokenizer, *, tokens_per_tile: int
) -> EncodedSample:
    """Render a training record.

    Args:
        record: A record; checked here.
        layouts: One per medium, in record order.
        tokenizer: Text tokenizer.
        tokens_per_tile: Visual tokens of one tile.

    Raises:
        DataError: Record malformed, or tags in its text that do not match its media.
    """
    validate_record(record)
    writer = _Writer(tokenizer, tokens_per_tile)
    _write_messages(writer, record, layouts)
    ids = np.asarray(writer.ids, dtype=np.int64)
    token_turns = np.asarray(writer.turns, dtype=np.int32)
    labels = np.full(len(ids), IGNORE_LABEL, dtype=np.int64)
    turns = np.full(len(ids), NO_TURN, dtype=np.int32)
    turns[:-1] = token_turns[1:]
    labels[:-1] = np.where(turns[:-1] != NO_TURN, ids[1:], IGNORE_LABEL)
    return EncodedSample(
        input_ids=ids,
        labels=labels,
        turns=turns,
        tile_start=np.asarray(writer.tile_start, dtype=np.int64),
        tile_tokens=np.asarray(writer.tile_tokens, dtype=np.int64),
        media_of_tile=np.asarray(writer.media_of_tile, dtype=np.int32),
    )


def encode_prompt(
    record: Mapping[str, Any], layouts: Sequence[MediaLayout], tokenizer: TextTokenizer, *, tokens_per_tile: int
) -> EncodedSample:
    r"""Render a record up to where the model answers: its last answer, if it has one, is left out.

    The ids are a prefix of what training saw, earlier turns included: they end with `<think></think>`, or with
    `<think>\n` when reasoning is on. Nothing is supervised.

    Raises:
        DataError: As `encode_record`.
    """
    validate_record(record, prompt=True)
    messages = list(record["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    writer = _Writer(tokenizer, tokens_per_tile)
    _write_messages(writer, {**record, "messages": messages}, layouts)
    writer.special(ROLE)
    writer.text("Assistant\n")
    writer.flush()
    writer.text(TRACE_START if reasoning_on(messages) else NO_TRACE)
    writer.flush()
    size = len(writer.ids)
    return EncodedSample(
        input_ids=np.asarray(writer.ids, dtype=np.int64),
        labels=np.full(size, IGNORE_LABEL, dtype=np.int64),
        turns=np.full(size, NO_TURN, dtype=np.int32),
        tile_start=np.asarray(writer.tile_start, dtype=np.int64),
        tile_tokens=np.asarray(writer.tile_tokens, dtype=np.int64),
        media_of_tile=np.asarray(writer.media_of_tile, dtype=np.int32),
    )


def reasoning_on(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last reasoning switch in the system and user texts is `/think`."""
    state = False
    for message in messages:
        state = _reasoning_after(message, state)
    return state


def _reasoning_after(message: Mapping[str, Any], before: bool) -> bool:
    """State of the switch behind a message; assistants and tools do not switch."""
    if message["role"] not in ("system", "user"):
        return before
    switches = _SWITCH.findall(_message_text(message).replace(_END_THINK, ""))
    return switches[-1] == "/think" if switches else before


def frame_label(number: int, seconds: float) -> str:
    """Words before frame `number` (from 0); frames are joined by a newline, without a header line."""
    newline = "\n" if number else ""
    return f"{newline}Frame {number + 1} sampled at {seconds:.2f} seconds: "


def frame_label_tokens(times: Sequence[float], tokenizer: TextTokenizer) -> int:
    """Tokens of all frame labels of a video, media tags not counted."""
    return sum(_label_length(tokenizer, frame_label(i, t)) for i, t in enumerate(times))


@functools.lru_cache(maxsize=65536)
def _label_length(tokenizer: TextTokenizer, label: str) -> int:
    return len(tokenizer.encode_text(label))


def _write_messages(writer: _Writer, record: Mapping[str, Any], layouts: Sequence[MediaLayout]) -> None:
    messages = record["messages"]
    system = messages[0] if messages[0]["role"] == "system" else {"content": ""}
    writer.special(BOS)
    writer.special(SYSTEM)
    writer.text(f"System\n{_system_text(_without_switches(_message_text(system)), record.get('tools', ()))}\n")
    media = turn = 0
    reasoning = False
    for role, group in itertools.groupby(enumerate(messages), key=lambda pair: pair[1]["role"]):
        if role == "tool":
            _write_results(writer, [message for _, message in group])
            continue
        for number, message in group:
            reasoning = _reasoning_after(message, reasoning)
            if role == "user":
                where = f"record {record['id']!r}, message {number}"
                media += _write_user(writer, message, layouts[media:], media, where)
            elif role == "assistant":
                _write_answer(writer, message, turn, reasoning=reasoning)
                turn += 1
    writer.flush()
    assert media == len(layouts), (media, len(layouts))


def _system_text(text: str, tools: Sequence[str]) -> str:
    if not tools:
        return text
    gap = "\n\n" if text else ""
    listed = f"<AVAILABLE_TOOLS>[{', '.join(tools)}]</AVAILABLE_TOOLS>"
    return f"{text}{gap}{TOOLS_INTRODUCTION}{listed}\n\n{TOOLS_USE}"


def _write_results(writer: _Writer, messages: Sequence[Mapping[str, Any]]) -> None:
    writer.special(ROLE)
    writer.text(f"User\n<TOOL_RESPONSE>[{', '.join(map(_message_text, messages))}]</TOOL_RESPONSE>\n")


def _with_calls(text: str, calls: Sequence[Mapping[str, str]]) -> str:
    """An answer with the calls that it makes."""
    if not calls:
        return text
    listed = ", ".join(
        f'{{"name": {json.dumps(c["name"], ensure_ascii=False)}, "arguments": {c["arguments"]}}}' for c in calls
    )
    before = f"{text.rstrip()}\n\n" if text.strip() else ""
    return f"{before}<TOOLCALL>[{listed}]</TOOLCALL>"


def _write_answer(writer: _Writer, message: Mapping[str, Any], turn: int, *, reasoning: bool) -> None:
    writer.special(ROLE)
    writer.text("Assistant\n")
    writer.flush()
    writer.turn = turn
    text = _message_text(message)
    has_trace = text.startswith("<think>") or _END_THINK in text
    answer = _with_calls(text, message.get("tool_calls", ()))
    if answer.startswith(TRACE_START):
        start, answer = TRACE_START, answer.removeprefix(TRACE_START)
    else:
        start = "" if reasoning or has_trace else NO_TRACE
    # Cut where a generation prompt ends: at inference no merge can cross that point either.
    writer.text(start)
    writer.flush()
    writer.text(f"{answer}\n")
    writer.special(TURN_END)
    writer.text("\n")
    writer.flush()
    writer.turn = NO_TURN


def _write_user(
    writer: _Writer, message: Mapping[str, Any], layouts: Sequence[MediaLayout], first_media: int, where: str
) -> int:
    """Write one user message; returns how many media it held."""
    writer.special(ROLE)
    writer.text("User\n")
    kinds = [item["type"] for item in content_items(message) if item["type"] in MEDIA_KINDS]
    pending = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in MEDIA_KINDS}
    for piece in _user_pieces(message, kinds, where):
        if isinstance(piece, str):
            writer.text(piece)
            continue
        number = pending[piece.kind].pop(0)
        _write_media(writer, layouts[number], first_media + number)
    assert not any(pending.values()), (where, pending)
    writer.text("\n")
    return len(kinds)


def _write_media(writer: _Writer, layout: MediaLayout, media: int) -> None:
    tile_tokens = layout.tile_tokens(writer.tokens_per_tile)
    if layout.kind == "image":
        writer.image_run(tile_tokens, media)
        return
    writer.flush()
    for number, (seconds, tokens) in enumerate(zip(layout.frame_times, tile_tokens, strict=True)):
        writer.text(frame_label(number, seconds))
        writer.image_run([tokens], media)


@dataclass(frozen=True)
class _Tag:
    kind: str


def _user_pieces(message: Mapping[str, Any], kinds: Sequence[str], where: str) -> list[str | _Tag]:
    """Words and media tags of a user message in rendered order, by the rule in the module's docstring."""
    # Counted on exactly what is split below: a tag never spans two items, and a switch taken out can leave one behind.
    items = [
        (_without_switches(item["text"]), bool(item.get("literal")))
        for item in content_items(message)
        if item["type"] == "text"
    ]
    pieces: list[str | _Tag] = []
    placed = []
    for kind in MEDIA_KINDS:
        media, tags = kinds.count(kind), sum(text.count(f"<{kind}>") for text, literal in items if not literal)
        if media and tags == media:
            placed.append(kind)
        elif media and tags:
            raise DataError(
                f"{where}: {tags} <{kind}> in the text but {media} {kind}(s) attached; write one <{kind}> for each, "
                f'none at all, or "literal": true on the text item where <{kind}> is a word'
            )
        elif kind == "image" and media > 1:
            for i in range(media):
                pieces += [f"{' ' if i else ''}<image {i + 1}>", _Tag(kind)]
            pieces.append("\n")
        else:
            pieces += [_Tag(kind), "\n"] * media
    for text, literal in items:
        pieces += [text] if literal or not placed else _split_tags(text, placed)
    return pieces


def _split_tags(text: str, kinds: Sequence[str]) -> list[str | _Tag]:
    parts = re.split(f"<({'|'.join(kinds)})>", text)
    return [_Tag(part) if i % 2 else part for i, part in enumerate(parts)]


def _message_text(message: Mapping[str, Any]) -> str:
    return "".join(item["text"] for item in content_items(message) if item["type"] == "text")


def _without_switches(text: str) -> str:
    return _END_THINK.join(_SWITCH.sub("", part) for part in text.split(_END_THINK))
