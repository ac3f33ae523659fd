"""What can be wrong with one sample of a dataset folder, and what to do about it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipelines.dataset import Dataset, StoredSample
from data_pipelines.exceptions import DataError
from data_pipelines.fit import shrink_sample
from data_pipelines.media.image import image_size
from data_pipelines.media.rules import MediaLayout, MediaShape, RenderRules, lay_out
from data_pipelines.pack import media_tiles
from data_pipelines.schema import MediaItem, content_items, media_items, validate_record
from data_pipelines.template import encode_record, reasoning_on
from data_pipelines.tokenizer import TextTokenizer

ERROR, WARNING = "error", "warning"
START, END = "<think>", "</think>"

_FIXES = {
    "storage": "copy the shard again, or import the source again",
    "record": "repair the row in the source and import again",
    "image": "replace the file in the source and import again, or: nemovl data quarantine add FOLDER KEY",
    "video": "replace the file in the source and import again, or: nemovl data quarantine add FOLDER KEY",
    "length": "import again: the tokenizers library counts otherwise than when the folder was written",
    "too_long": "shorten the text, or train with a larger data.seq_length; as it is, the plan leaves the sample out",
    "empty_answer": "write an answer, or leave the row out",
    "think": "close every <think> with one </think>, in this order, and write the answer behind it",
    "think_off": "import with --think, or write /think into the system or user text",
    "unused_tag": "attach the medium that the tag stands for, or take the tag out",
    "repeated_answer": "check that the turns were not doubled by a conversion",
    "duplicate": "keep one of them",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a sample.

    Attributes:
        severity: `error`: the sample cannot be trained on. `warning`: it can, but look at it.
        check: Name of the check.
        split: Split of the sample.
        row: Row in the manifest, -1 for the folder as a whole.
        key: Id of the sample.
        file: File in the folder.
        reason: What is wrong.
        fix: What to do.
    """

    severity: str
    check: str
    split: str
    row: int
    key: str
    file: str
    reason: str
    fix: str


@dataclass(frozen=True)
class SampleChecks:
    """Checks the samples of a split.

    Attributes:
        dataset: Opened split.
        rules: The folder's own rules.
        tokenizer: The tokenizer it was counted with; lengths are not checked when None.
        seq_length: Tokens of a pack that every sample should fit in; not checked when None.
        fast: Read headers only: no medium is decoded, no text tokenised.
    """

    dataset: Dataset
    rules: RenderRules
    tokenizer: TextTokenizer | None
    seq_length: int | None
    fast: bool

    def problems(self, row: int) -> tuple[list[Problem], int | None]:
        """Problems of a sample, and a 64-bit hash of its content without its id; None when it cannot be read."""
        found: list[Problem] = []
        entry = self.dataset.row(row)

        def add(severity: str, check: str, reason: str) -> None:
            file = self.dataset.shard_name(entry["shard"])
            found.append(Problem(severity, check, self.dataset.split, row, entry["key"], file, reason, _FIXES[check]))

        try:
            stored = self.dataset.read(row)
        except (DataError, OSError, ValueError) as error:
            add(ERROR, "storage", str(error))
            return found, None
        try:
            validate_record(stored.record)
        except DataError as error:
            add(ERROR, "record", str(error))
            return found, None
        layouts = [
            lay_out(shape, self.rules, max_tiles=self.rules.max_tiles, max_frames=self.rules.max_frames)
            for shape in stored.shapes
        ]
        for check, reason in self._media(stored, layouts):
            add(ERROR, check, reason)
        for check, reason in text_problems(stored.record):
            add(WARNING, check, reason)
        if self.tokenizer is not None:
            for severity, check, reason in self._length(stored, layouts, entry, self.tokenizer):
                add(severity, check, reason)
        return found, content_hash(stored)

    def _media(self, stored: StoredSample, layouts: list[MediaLayout]) -> Iterator[tuple[str, str]]:
        items = list(media_items(stored.record))
        if len(items) != len(stored.shapes):
            yield "record", f"the messages name {len(items)} media, the manifest {len(stored.shapes)}"
            return
        for item, shape, layout in zip(items, stored.shapes, layouts, strict=True):
            if item.member not in stored.media:
                yield item.kind, f"{item.source}: the shard holds no {item.member!r} for this sample"
                continue
            try:
                if not self.fast:
                    media_tiles([item], [shape], [layout], stored.media, self.rules)
                elif item.kind == "image":
                    _check_header(item, stored.media[item.member], shape)
            except DataError as error:
                yield item.kind, str(error)

    def _length(
        self, stored: StoredSample, layouts: list[MediaLayout], entry: Mapping[str, Any], tokenizer: TextTokenizer
    ) -> Iterator[tuple[str, str, str]]:
        if not self.fast:
            try:
                encoded = encode_record(stored.record, layouts, tokenizer, tokens_per_tile=self.rules.tokens_per_tile)
            except DataError as error:
                yield ERROR, "record", str(error)
                return
            if len(encoded.input_ids) != entry["total_tokens"]:
                counts = f"{len(encoded.input_ids)} tokens where the manifest has {entry['total_tokens']}"
                yield ERROR, "length", counts
        limit = self.seq_length
        if limit is not None and entry["total_tokens"] > limit:
            fit = shrink_sample(stored.shapes, entry["text_tokens"], limit, self.rules, tokenizer)
            if fit is None:
                yield WARNING, "too_long", f"{entry['total_tokens']} tokens do not fit into {limit}, however few tiles"


def _check_header(item: MediaItem, data: bytes, shape: MediaShape) -> None:
    try:
        size = image_size(data)
    except DataError as error:
        raise DataError(f"{item.source}: {error}") from error
    if size != (shape.width, shape.height):
        raise DataError(f"{item.source}: the header has another size than the manifest")


def text_problems(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(check, reason) of what looks wrong in the texts of a valid record."""
    answers = []
    messages = record["messages"]
    for number, message in enumerate(messages):
        items = content_items(message)
        text = "".join(item["text"] for item in items if item["type"] == "text")
        if message["role"] == "assistant":
            answers.append(text)
            if not text.rpartition(END)[2].strip():
                yield (
                    "empty_answer",
                    f"message {number}: the answer is empty" + (" behind its trace" if END in text else ""),
                )
            if reason := think_problem(text):
                yield "think", f"message {number}: {reason}"
            elif (
                text.partition(END)[0].replace(START, "").strip()
                and END in text
                and not reasoning_on(messages[:number])
            ):
                yield "think_off", f"message {number}: the answer holds a trace, but its prompt has reasoning off"
        elif message["role"] == "user":
            kinds = [item["type"] for item in items]
            for kind in ("image", "video"):
                words = sum(
                    item["text"].count(f"<{kind}>")
                    for item in items
                    if item["type"] == "text" and not item.get("literal")
                )
                if words and kind not in kinds:
                    yield (
                        "unused_tag",
                        f"message {number}: <{kind}> is only a word here, no {kind} is attached to this message",
                    )
    if len(answers) > 1 and len(set(answers)) < len(answers):
        yield "repeated_answer", f"{len(answers) - len(set(answers))} of {len(answers)} answers repeat an earlier one"


def think_problem(text: str) -> str:
    """What is wrong with the reasoning tags of an answer; empty when nothing is.

    An answer may start behind a `<think>` that its prompt ended with, so one `</think>` alone is allowed.
    """
    starts, ends = text.count(START), text.count(END)
    if starts > 1 or ends > 1:
        return f"{starts} {START} and {ends} {END}; one of each at most"
    if starts and not ends:
        return f"{START} is never closed"
    if starts and text.index(END) < text.index(START):
        return f"{END} stands before {START}"
    if starts and text[: text.index(START)].strip():
        return f"there is text before {START}"
    return ""


def content_hash(stored: StoredSample) -> int:
    """64-bit hash of messages and media; the names of sample and media do not count."""
    messages = json.dumps(
        [
            [m["role"], [_bare(item) for item in content_items(m)], m.get("tool_calls", [])]
            for m in stored.record["messages"]
        ],
        sort_keys=True,
    )
    sha = hashlib.sha256((messages + json.dumps(stored.record.get("tools", []))).encode())
    for item in media_items(stored.record):
        if item.member in stored.media:
            sha.update(hashlib.sha256(stored.media[item.member]).digest())
    return int.from_bytes(sha.digest()[:8])


def _bare(item: Mapping[str, Any]) -> list[Any]:
    return [item["type"], item.get("text", "")]
