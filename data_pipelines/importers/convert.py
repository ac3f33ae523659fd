"""From a row of any source to a sample: record and media, named and checked as everything in a dataset folder is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipelines.exceptions import DataError
from data_pipelines.importers.conversations import Draft, draft_of, has_conversation
from data_pipelines.importers.formats import FORMATS
from data_pipelines.importers.references import MediaFinder
from data_pipelines.importers.rows import Row
from data_pipelines.importers.tasks import ColumnOptions, Columns, draft_of_columns
from data_pipelines.media.image import image_size
from data_pipelines.media.kinds import content_suffix, suffix_kind
from data_pipelines.schema import MEDIA_KINDS, validate_record
from data_pipelines.shards import Sample
from data_pipelines.template import reasoning_on

_ID_FIELDS = ("id", "uid", "sample_id", "question_id", "__key__")
_VIDEO_METADATA = ("video_num_frames", "video_fps", "video_width", "video_height")


class MediaError(DataError):
    """A medium of a row that cannot be had."""


@dataclass(frozen=True)
class Converter:
    """What turns rows into samples; the same for every unit of a source.

    Attributes:
        format_name: Format of the source.
        columns: How plain columns are read.
        finder: Where media are.
        ids: `source` keeps the rows' own ids where they have one, `position` names samples by file and number.
        think: Turn reasoning on for samples whose answers hold a trace.
        allow_text: Rows of columns may have no medium.
    """

    format_name: str
    columns: ColumnOptions
    finder: MediaFinder
    ids: str = "source"
    think: bool = False
    allow_text: bool = False

    def key(self, row: Row) -> str:
        """Id that the sample of a row gets."""
        if self.ids == "source":
            for name in _ID_FIELDS:
                value = row.values.get(name)
                if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
                    return str(value)
        return row.position

    def sample(self, row: Row) -> Sample:
        """Record and media of a row.

        Raises:
            MediaError: A medium is not found or not allowed.
            DataError: The row, or the record made of it, is not usable.
        """
        key = self.key(row)
        record, media = self._attach(key, self._draft(row, key), row)
        validate_record(record)
        if self.think:
            _switch_on(record["messages"])
        return record, media

    def _draft(self, row: Row, key: str) -> Draft:
        wanted = FORMATS[self.format_name].conversation
        if wanted and wanted not in row.values:
            raise DataError(
                f"no '{wanted}', which format {self.format_name} needs; the row has {', '.join(map(str, row.values))}"
            )
        if wanted or (wanted == "" and has_conversation(row.values) and not self.columns.task):
            return draft_of(row.values)

        def size(reference: Any) -> tuple[int, int]:
            first = reference[0] if isinstance(reference, list) else reference
            return image_size(self._fetch(first, "image", row))

        draft = draft_of_columns(row.values, self.columns, key, size)
        if not (self.allow_text or any(item["type"] in MEDIA_KINDS for item in draft.messages[0]["content"])):
            self._check_text_row(row)
        return draft

    def _check_text_row(self, row: Row) -> None:
        """Refuse a row whose medium was probably not recognised: a sample of text alone would look fine ever after.

        Raises:
            DataError: The format is one of media, or a column holds what looks like a medium.
        """
        likely = next(((name, value) for name, value in row.values.items() if _is_medium(value)), None)
        if likely is None and not FORMATS[self.format_name].media:
            return
        if absent := Columns(row.values, self.columns, "").absent():
            raise DataError(f"the row has no image or video; {absent}")
        advice = "name its column with --column image=COLUMN or video=COLUMN"
        if likely is not None:
            name, value = likely
            shown = f" ({value!r:.60})" if isinstance(value, str) else ""
            kind = suffix_kind(value) if isinstance(value, str) else "image"
            advice = f"if it is in column {name!r}{shown}, add --column {kind}={name}"
        raise DataError(
            f"the row has no image or video; {advice}. Where rows are meant to be text alone, add --allow-text"
        )

    def _fetch(self, reference: Any, kind: str, row: Row) -> bytes:
        try:
            return self.finder.fetch(reference, kind, members=row.members, folder=row.folder)
        except DataError as error:
            raise MediaError(str(error)) from error

    def _attach(self, key: str, draft: Draft, row: Row) -> Sample:
        media: dict[str, bytes] = {}
        messages = []
        for message in draft.messages:
            items = []
            for item in message["content"]:
                if item["type"] not in MEDIA_KINDS:
                    items.append(item)
                    continue
                data = self._fetch(item["ref"], item["type"], row)
                member = f"{item['type']}{len(media)}.{content_suffix(data, item['type'])}"
                media[member] = data
                items.append({"type": item["type"], item["type"]: member, **_source(item), **_metadata(item)})
            messages.append({**message, "content": items})
        return {"id": key, **draft.extra, "messages": messages}, media


def _is_medium(value: Any) -> bool:
    """Whether a value looks like a medium: the name of a file, its bytes, or the `{"bytes"}` of a table."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes)
    return isinstance(value, bytes) or (isinstance(value, str) and len(value) < 1024 and bool(suffix_kind(value)))


def _switch_on(messages: list[dict[str, Any]]) -> None:
    """Put `/think` into the system text where an answer has a trace that its prompt does not ask for."""
    traced = any("</think>" in item["text"] for m in messages if m["role"] == "assistant" for item in m["content"])
    if not traced or reasoning_on(messages):
        return
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": []})
    messages[0]["content"].append({"type": "text", "text": "/think"})


def _source(item: Mapping[str, Any]) -> dict[str, str]:
    """Name that the source gave a medium, kept so that a sample can be traced to its file; an export hands it on."""
    if "source" in item:
        return {"source": item["source"]}
    reference = item["ref"]
    if isinstance(reference, Mapping):
        reference = reference.get("path")
    named = isinstance(reference, str) and not reference.startswith("data:")
    return {"source": reference} if named else {}


def in_source_words(message: str, record: Mapping[str, Any]) -> str:
    """An error about a record's media with the names that the source gave them."""
    for turn in record["messages"]:
        for item in turn["content"]:
            if "source" in item:
                message = message.replace(repr(item[item["type"]]), repr(item["source"]))
    return message


def _metadata(item: Mapping[str, Any]) -> dict[str, Any]:
    """Size, rate and length of a video as its record gives them, if it gives all of them and they are numbers."""
    given = item.get("metadata") or {}
    if not all(isinstance(given.get(name), int | float) and 0 < given[name] < 2**31 for name in _VIDEO_METADATA):
        return {}
    names = (*_VIDEO_METADATA, "video_duration")
    return {"metadata": {name: given[name] for name in names if isinstance(given.get(name), int | float)}}
