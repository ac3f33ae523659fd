"""Rows of plain columns as conversations: one named task for each kind of annotation.

The paper turns captions, boxes, classes and time spans into questions and answers (arXiv 2511.03929, sections 3.1 to
3.3) and does not print its wordings; those below are ours. A sample's wording is chosen by its position in the source,
so the same data give the same texts.
"""

import difflib
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipelines.exceptions import DataError
from data_pipelines.importers.conversations import Draft, as_list
from data_pipelines.media.kinds import suffix_kind
from data_pipelines.schema import MEDIA_KINDS

BOX_FORMATS = ("xyxy", "xywh")
BOX_SCALE = 1000
"""Boxes are written in thousandths of the image's width and height, so they survive any resizing."""

_ALIKE = 0.75
"""Similarity of names (`difflib`) from which one may be a slip of the other."""

ALIASES: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "images", "img", "file_name", "file_names", "filename", "image_name", "image_path", "image_file"),
        *("photo", "picture", "jpg", "jpeg", "png", "webp"),
    ),
    "video": (
        *("video", "videos", "video_path", "video_file_name", "video_name", "video_file"),
        *("mp4", "webm", "mkv", "mov", "avi"),
    ),
    "question": ("question", "questions", "query", "prompt", "instruction", "problem", "context"),
    "answer": ("answer", "answers", "response", "output", "solution", "completion"),
    "caption": ("caption", "captions", "description", "txt"),
    "text": ("text", "ocr", "transcription", "transcript", "ground_truth", "markdown", "html"),
    "label": ("label", "labels", "class", "category", "cls"),
    "choices": ("choices", "options"),
    "phrase": ("phrase", "phrases", "expression", "expressions", "ref", "sentence"),
    "box": ("box", "boxes", "bbox", "bboxes"),
    "start": ("start", "start_time", "begin"),
    "end": ("end", "end_time", "stop"),
    "segments": ("segments", "events", "timestamps"),
}
"""What each column may be called, capitals ignored; `--column ROLE=NAME` says it outright."""
_FILES = ("file", "file_path", "filepath")
"""Columns that hold a medium only where their value has a medium's extension."""

_PROMPTS = {
    "caption": ("Describe this {medium}.", "What does this {medium} show?", "Write a caption for this {medium}."),
    "grounding": ("Where is {phrase}? Give the bounding box.", "Locate {phrase} as [x1, y1, x2, y2]."),
    "ocr": ("Read the text in this image.", "What does the text in this image say?"),
    "document": ("Extract the content of this page.", "Convert this page to text, in reading order."),
    "classification": ("What does this {medium} show? Answer with one label.", "Classify this {medium}."),
    "temporal": ("When does this happen: {query}?", "Find the time span of: {query}."),
    "dense_caption": (
        "List the events of this video with their times.",
        "Describe what happens, step by step with times.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """How columns are read.

    Attributes:
        task: Name in `TASKS`; chosen by the columns when None.
        columns: Column of a role, where it is not one of the usual names.
        box_format: `xyxy` corners or `xywh` corner and size.
        box_units: Range of stored coordinates: `pixel`, `unit` (0 to 1) or `thousand`.
    """

    task: str | None = None
    columns: Mapping[str, str]
    box_format: str = "xyxy"
    box_units: str = "pixel"


class Columns:
    """One row by role instead of by column name."""

    def __init__(self, values: Mapping[str, Any], options: ColumnOptions, key: str) -> None:
        self.values, self.options, self.key = values, options, key
        self._spellings: dict[str, list[str]] = {}
        for name in values:
            self._spellings.setdefault(_plain_name(name), []).append(name)

    def has(self, role: str) -> bool:
        """Whether the row has a value for a role."""
        return self._find(role) is not None

    def get(self, role: str) -> Any:
        """Value of a role.

        Raises:
            DataError: No column for it.
        """
        name = self._find(role)
        if name is None:
            if absent := self.absent():
                raise DataError(absent)
            if role in (guesses := self.guesses()):
                raise DataError(f"no value for '{role}'{_did_you_mean(guesses)}")
            raise DataError(
                f"no value for '{role}' (columns that may hold it: {', '.join(ALIASES[role][:4])}); the row has "
                f"{', '.join(map(str, self.values))}: name it with --column {role}=COLUMN"
            )
        return self.values[name]

    def text(self, role: str) -> str:
        """Value of a role as one text: of several, the most frequent."""
        value = self.get(role)
        if isinstance(value, Sequence) and not isinstance(value, str):
            texts = [_plain(item) for item in value]
            if not texts:
                raise DataError(f"'{role}' is an empty list")
            return Counter(texts).most_common(1)[0][0]
        return _plain(value)

    def listed(self, role: str) -> list[Any]:
        """Value of a role as a list that is not empty; a table may hold it as JSON.

        Raises:
            DataError: It is something else.
        """
        value = self.get(role)
        if isinstance(value, str):
            with suppress(ValueError):
                value = json.loads(value)
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
            raise DataError(f"'{role}' must be a list, got {value!r:.80}")
        return list(value)

    def _find(self, role: str) -> str | None:
        return next((n for n in self._columns(role) if self.values[n] not in (None, "", [])), None)

    def named(self, role: str) -> str | None:
        """Column for a role, though it may be empty."""
        return self._find(role) or next(iter(self._columns(role)), None)

    def _columns(self, role: str) -> list[str]:
        """Columns of the row that may hold a role, the likeliest first."""
        said = self.options.columns
        if role not in MEDIA_KINDS:
            return self._called(role)
        # The names of the image role are also those of any file: its extension says what it is.
        images = [name for name in self._called("image") if name != said.get("video")]
        if role == "image":
            return [name for name in images if not _all_videos(self.values[name])]
        clips = [] if "video" in said else [name for name in images if _all_videos(self.values[name])]
        return self._called("video") + clips

    def _called(self, role: str) -> list[str]:
        """Columns with one of a role's names, capitals ignored; the very name comes first."""
        said = self.options.columns
        names = (said[role],) if role in said else ALIASES[role]
        found = (sorted(self._spellings.get(_plain_name(n), ()), key=lambda c, n=n: c != n) for n in names)
        columns = [column for columns in found for column in columns]
        if role == "image" and role not in said and "video" not in said and not columns:
            files = (column for name in _FILES for column in self._spellings.get(name, ()))
            columns = [c for c in files if isinstance(self.values[c], str) and suffix_kind(self.values[c])]
        return columns

    def absent(self) -> str:
        """What is wrong with `--column` options that name no column of the row; empty when none does."""
        wrong = [f"{role}={name}" for role, name in self.options.columns.items() if not self._called(role)]
        if not wrong:
            return ""
        names = ", ".join(repr(option.partition("=")[2]) for option in wrong)
        near = {role: close for role, name in self.options.columns.items() if (close := self._nearest(role, name))}
        return (
            f"--column {' --column '.join(wrong)}: there is no column {names}; the columns are "
            f"{', '.join(map(str, self.values))}{_did_you_mean(near)}"
        )

    def _nearest(self, role: str, name: str) -> str:
        """The column that an option meant which names none."""
        if self._called(role):
            return ""
        close = difflib.get_close_matches(_plain_name(name), self._spellings, n=1, cutoff=_ALIKE)
        return self._spellings[close[0]][0] if close else ""

    def guesses(self) -> dict[str, str]:
        """Columns with almost the name of a role that no other column holds."""
        free = {role: names for role, names in ALIASES.items() if not self._columns(role)}
        used = {name for role in ALIASES for name in self._columns(role)}
        found: dict[str, str] = {}
        for plain, (name, *_) in self._spellings.items():
            # Short names are like many others.
            names = {alias: role for role, aliases in free.items() for alias in aliases if len(alias) > 3}
            close = difflib.get_close_matches(plain, names, n=1, cutoff=_ALIKE) if name not in used else []
            if close:
                found.setdefault(names[close[0]], name)
        return found

    def media(self) -> list[dict[str, Any]]:
        """Every image and video of the row as content items, references still open."""
        items = []
        for kind in ("image", "video"):
            if self.has(kind):
                references = as_list(self.get(kind))
                items += [{"type": "video" if _is_video(r) else kind, "ref": r} for r in references]
        return items

    def prompt(self, task: str, **words: str) -> str:
        """One of the task's wordings, chosen by the row's key."""
        wordings = _PROMPTS[task]
        number = hashlib.blake2b(f"{task}/{self.key}".encode(), digest_size=4).digest()
        return wordings[int.from_bytes(number) % len(wordings)].format(medium=self._medium(), **words)

    def _medium(self) -> str:
        return "video" if self.has("video") else "image"


def _plain_name(name: str) -> str:
    return str(name).strip().lower()


def _did_you_mean(guesses: Mapping[str, str]) -> str:
    options = (shlex.quote(f"{role}={name}") for role, name in guesses.items())
    return f"; did you mean --column {' --column '.join(options)}?" if guesses else ""


def _is_video(reference: Any) -> bool:
    """Whether what a row says about a medium is the name of a video file."""
    if isinstance(reference, Mapping):
        reference = reference.get("path")
    return isinstance(reference, str) and suffix_kind(reference) == "video"


def _all_videos(value: Any) -> bool:
    references = as_list(value)
    return bool(references) and all(_is_video(reference) for reference in references)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        # VQA files wrap each answer: {"answer": "two", "answer_confidence": ...}.
        for name in ("answer", "text", "caption", "value"):
            if isinstance(value.get(name), str):
                return str(value[name])
        raise DataError(f"expected a text, got {dict(value)!r:.80}")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    raise DataError(f"expected a text, got {type(value).__name__}")


type Pair = tuple[str, str]
type ImageSize = Callable[[Any], tuple[int, int]]


def _vqa(row: Columns, size: ImageSize) -> list[Pair]:
    del size
    questions, answers = row.get("question"), row.get("answer")
    several = isinstance(questions, Sequence) and not isinstance(questions, str)
    if not several:
        return [(row.text("question"), row.text("answer"))]
    if not isinstance(answers, Sequence) or isinstance(answers, str) or len(answers) != len(questions):
        raise DataError(f"{len(questions)} questions but not as many answers")
    return [(_plain(q), _plain(a)) for q, a in zip(questions, answers, strict=True)]


def _multiple_choice(row: Columns, size: ImageSize) -> list[Pair]:
    del size
    names = [_plain(choice) for choice in row.listed("choices")]
    answer = row.get("answer")
    listed = "\n".join(f"{chr(65 + i)}. {name}" for i, name in enumerate(names))
    if isinstance(answer, str) and answer in names:
        number = names.index(answer)
    elif isinstance(answer, str) and len(answer) == 1 and 0 <= ord(answer.upper()) - 65 < len(names):
        number = ord(answer.upper()) - 65
    elif isinstance(answer, int) and 0 <= answer < len(names):
        number = answer
    else:
        raise DataError(
            f"answer {answer!r} is none of the {len(names)} choices, nor a letter or number (from 0) of one"
        )
    question = f"{row.text('question')}\n{listed}\nAnswer with the letter of the right choice."
    return [(question, f"{chr(65 + number)}. {names[number]}")]


def _simple(task: str, role: str) -> Callable[[Columns, ImageSize], list[Pair]]:
    def pairs(row: Columns, size: ImageSize) -> list[Pair]:
        del size
        question = row.text("question") if row.has("question") else row.prompt(task)
        return [(question, row.text(role))]

    return pairs


def _grounding(row: Columns, size: ImageSize) -> list[Pair]:
    role = next((r for r in ("phrase", "label", "caption", "question") if row.has(r)), "phrase")
    phrases, boxes = as_list(row.get(role)), row.listed("box")
    if not isinstance(boxes[0], Sequence):
        boxes = [boxes]
    if len(phrases) != len(boxes):
        if len(phrases) != 1:
            raise DataError(f"{len(phrases)} phrases but {len(boxes)} boxes")
        phrases = phrases * len(boxes)
    found: dict[str, list[list[int]]] = {}
    frame = size(row.get("image"))
    for phrase, box in zip(phrases, boxes, strict=True):
        found.setdefault(_plain(phrase), []).append(_thousandths(box, frame, row.options))
    # Several boxes of one phrase are one answer: as separate questions they would contradict each other.
    return [
        (row.prompt("grounding", phrase=phrase), json.dumps(places[0] if len(places) == 1 else places))
        for phrase, places in found.items()
    ]


def _thousandths(box: Any, frame: tuple[int, int], options: ColumnOptions) -> list[int]:
    """Corners of a box in thousandths of the image; frame is (width, height) in pixels."""
    try:
        left, top, right, bottom = (float(value) for value in box)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"box {box!r} is not four numbers") from error
    if options.box_format == "xywh":
        right, bottom = left + right, top + bottom
    across, down = {"pixel": frame, "unit": (1, 1), "thousand": (BOX_SCALE, BOX_SCALE)}[options.box_units]
    corners = [left / across, top / down, right / across, bottom / down]
    if not (0 <= corners[0] < corners[2] <= 1.01 and 0 <= corners[1] < corners[3] <= 1.01):
        raise DataError(
            f"box {list(box)} read as {options.box_format} in {options.box_units} units does not fit into an image of "
            f"{frame[0]}x{frame[1]} pixels; see --box-format and --box-units"
        )
    return [min(round(value * BOX_SCALE), BOX_SCALE) for value in corners]


def _temporal(row: Columns, size: ImageSize) -> list[Pair]:
    del size
    role = next((r for r in ("question", "caption", "phrase", "label") if row.has(r)), "question")
    start, end = _span(row.get("start"), row.get("end"))
    return [(row.prompt("temporal", query=row.text(role).rstrip("?. ")), f"From {start} to {end} seconds.")]


def _span(start: Any, end: Any) -> tuple[str, str]:
    try:
        first, last = float(start), float(end)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"time span {start!r} to {end!r} is not two numbers of seconds") from error
    if not 0 <= first <= last < float("inf"):
        raise DataError(f"time span {first} to {last} is not a span of seconds")
    return f"{first:.1f}", f"{last:.1f}"


def _dense_caption(row: Columns, size: ImageSize) -> list[Pair]:
    del size
    lines = []
    for number, segment in enumerate(row.listed("segments")):
        if not isinstance(segment, Mapping):
            raise DataError(f"segment {number} must be an object with start, end and caption, got {segment!r:.80}")
        part = Columns(segment, row.options, row.key)
        start, end = _span(part.get("start"), part.get("end"))
        role = next((r for r in ("caption", "label", "text", "phrase") if part.has(r)), "caption")
        lines.append((float(start), f"{start} to {end} seconds: {part.text(role)}"))
    lines.sort(key=lambda line: line[0])
    return [(row.prompt("dense_caption"), "\n".join(text for _, text in lines))]


TASKS: dict[str, tuple[tuple[str, ...], Callable[[Columns, ImageSize], list[Pair]]]] = {
    "multiple_choice": (("question", "choices", "answer"), _multiple_choice),
    "vqa": (("question", "answer"), _vqa),
    "dense_caption": (("video", "segments"), _dense_caption),
    "temporal": (("video", "start", "end"), _temporal),
    "grounding": (("image", "box"), _grounding),
    "classification": (("label",), _simple("classification", "label")),
    "caption": (("caption",), _simple("caption", "caption")),
    "ocr": (("image", "text"), _simple("ocr", "text")),
    "document": (("image", "text"), _simple("document", "text")),
}
"""Roles that a task needs, and what makes its questions and answers; the order is that of choice by columns."""
_AMBIGUOUS = ("ocr", "document")


def choose_task(row: Columns) -> str:
    """Task whose columns a row has.

    Raises:
        DataError: None, or more than one meaning.
    """
    for name, (roles, _) in TASKS.items():
        if all(row.has(role) for role in roles):
            if name in _AMBIGUOUS:
                raise DataError(
                    "columns image and text may be a caption, the words in the picture, or a page's content: choose "
                    "--task caption --column caption=COLUMN, --task ocr or --task document"
                )
            return name
    for roles, _ in TASKS.values():
        # Columns for the task are there, but not all of them say something.
        if all(row.named(role) for role in roles):
            empty = ", ".join(repr(row.named(role)) for role in roles if not row.has(role))
            raise DataError(f"column {empty} is empty: fill it in, or leave the row out")
    if absent := row.absent():
        raise DataError(absent)
    columns, guesses = ", ".join(map(str, row.values)), row.guesses()
    for roles, _ in TASKS.values():
        if all(row.has(role) or role in guesses for role in roles):
            wanted = {role: name for role, name in guesses.items() if role in (*roles, *MEDIA_KINDS)}
            raise DataError(f"columns {columns} fit no task{_did_you_mean(wanted)}")
    needed = "; ".join(f"{name}: {', '.join(roles)}" for name, (roles, _) in TASKS.items())
    raise DataError(
        f"columns {columns} fit no task ({needed}){_did_you_mean(guesses)}; name them with --column ROLE=COLUMN"
    )


def draft_of_columns(values: Mapping[str, Any], options: ColumnOptions, key: str, size: ImageSize) -> Draft:
    """Conversation of a row of columns.

    Args:
        values: Column name to value.
        options: Task and column names.
        key: Identifier that chooses the wording.
        size: Width and height of an image reference, for boxes.

    Raises:
        DataError: A column is missing or holds what the task cannot use.
    """
    row = Columns(values, options, key)
    pairs = TASKS[options.task or choose_task(row)][1](row, size)
    if not pairs:
        raise DataError("the row asks nothing: its list of questions is empty")
    messages: list[dict[str, Any]] = []
    media = row.media()
    for question, answer in pairs:
        attached = media if not messages else []
        messages.append({"role": "user", "content": [*attached, _question(question, attached)]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Draft(messages)


def _question(text: str, media: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A question as a text item. A table cannot say which tags are words: those that cannot be places are."""
    item: dict[str, Any] = {"type": "text", "text": text}
    for kind in MEDIA_KINDS:
        tags = text.count(f"<{kind}>")
        if tags and tags != sum(medium["type"] == kind for medium in media):
            item["literal"] = True
    return item
