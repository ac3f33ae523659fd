"""Samples of webdataset tar files, read in memory: no member is ever written to disk, whatever its name says."""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from webdataset.tariterators import base_plus_ext

from data_pipelines.importers.json_ranges import MAX_RECORD_BYTES
from data_pipelines.importers.parsing import parse_json
from data_pipelines.importers.rows import Rejected, Row, Unit, position_of, split_of
from data_pipelines.importers.tables import root_of, source_files
from data_pipelines.media.kinds import suffix_kind
from data_pipelines.media.video import MAX_VIDEO_BYTES

_TEXT_FIELDS = ("txt", "text", "caption", "cls", "transcript", "context", "question", "answer")
MAX_SAMPLE_BYTES = 2 * MAX_VIDEO_BYTES


class TarReader:
    """Shards as webdataset writes them: files of one base name, one after the other, are one sample."""

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """One unit a shard."""
        root = root_of(source)
        paths = source_files(source, (".tar",), roots)
        return [Unit(split_of(p.name, split), p.relative_to(root).as_posix()) for p in paths]

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Samples of a shard: JSON fields are parsed, texts decoded, media kept as members."""
        root = root_of(source)
        for number, sample in enumerate(tar_samples(root / unit.path, unit.path)):
            if isinstance(sample, Rejected):
                yield sample
                continue
            key, members = sample
            where, position = f"{unit.path}:{key}", position_of(unit.path, number)
            try:
                yield Row(where, position, {"__key__": key, **_values(members)}, members, (root / unit.path).parent)
            except ValueError as error:
                yield Rejected(where, key, "read", f"not readable: {error}")


def tar_samples(path: Path, name: str) -> Iterator[tuple[str, dict[str, bytes]] | Rejected]:
    """(key, {member: bytes}) of each sample of a tar file, or why a member or the rest of the file is not used."""
    key: str | None = None
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
                if info.isdir() or PurePosixPath(info.name).name.startswith((".", "__")):
                    continue
                base, field = base_plus_ext(info.name)
                problem = _problem(info, base, sum(map(len, members.values())) if base == key else 0)
                if problem:
                    yield Rejected(f"{name}:{info.name}", info.name, "read", problem)
                    continue
                if base != key:
                    if key is not None:
                        yield key, members
                    key, members = base, {}
                content = tar.extractfile(info)
                assert content is not None, info
                members[field] = content.read()
                if len(members[field]) != info.size:
                    raise tarfile.ReadError("unexpected end of data")
            # tarfile takes a damaged or missing header for the end; a whole archive ends with a block of zeros.
            with path.open("rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        # What was read of the last sample may lack members, so it is not used either.
        yield Rejected(name, key or "", "read", f"the tar file is damaged or cut short behind {key!r}: {error}")
        return
    if key is not None:
        yield key, members


def _problem(info: tarfile.TarInfo, base: str | None, before: int) -> str:
    """Why a member is not read; empty when it may be."""
    if not info.isreg() or info.issparse():
        return "is a link, device or sparse file; only plain files are read"
    if info.name.startswith("/") or ".." in PurePosixPath(info.name).parts:
        return "its path leads out of the archive"
    if not base:
        return "has no extension, which webdataset needs to tell members of a sample apart"
    limit = MAX_VIDEO_BYTES if suffix_kind(info.name) else MAX_RECORD_BYTES
    if info.size > limit or info.size + before > MAX_SAMPLE_BYTES:
        return f"has {info.size} bytes, more than is read"
    return ""


def _values(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Columns of a sample: its fields, and those of its `json` member beside them."""
    fields = parsed_fields(members)
    inner = fields.pop("json", {})
    return {**inner, **fields} if isinstance(inner, dict) else {**fields, "json": inner}


def parsed_fields(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Members by field name: JSON parsed, texts decoded, media as `{"bytes"}`.

    Raises:
        ValueError: JSON or text that cannot be read.
    """
    fields: dict[str, Any] = {}
    for field, data in members.items():
        kind = field.rpartition(".")[2].lower()
        if kind == "json":
            fields[field] = parse_json(data)
        elif kind in _TEXT_FIELDS:
            fields[field] = data.decode("utf-8").strip()
        else:
            fields[field] = {"bytes": data} if suffix_kind(field) else data
    return fields
