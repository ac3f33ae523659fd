"""From what a row says about a medium to its bytes: safely, from the source's own folders and nowhere else."""

import base64
import binascii
import difflib
import functools
import itertools
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.exceptions import DataError
from data_pipelines.importers.tar_index import TarIndex
from data_pipelines.media.image import MAX_IMAGE_BYTES
from data_pipelines.media.video import MAX_VIDEO_BYTES

_MOST_NAMES = 4096
MAX_BYTES = {"image": MAX_IMAGE_BYTES, "video": MAX_VIDEO_BYTES}


class MediaFinder:
    """Finds media by the names that rows give them.

    Nothing is fetched over a network, and no file outside the roots is opened, whatever a row or a symbolic link says.
    """

    def __init__(self, roots: Sequence[Path], index: TarIndex | None = None) -> None:
        """Remember where to look.

        Args:
            roots: Folders, tried in turn; each with everything under it.
            index: Members of tar files that media may be.
        """
        self.roots = [Path(os.path.realpath(root)) for root in roots]
        self.index = index

    def fetch(self, reference: Any, kind: str, *, members: Mapping[str, bytes], folder: Path) -> bytes:
        """Bytes of a medium.

        Args:
            reference: Name, path, `data:` URL, bytes, or the `{"bytes", "path"}` of a Hugging Face column.
            kind: `image` or `video`.
            members: Media that came with the row.
            folder: Folder of the row's file, tried before the roots.

        Raises:
            DataError: Not found, outside the roots, on a network, not a regular file, empty, or too large.
        """
        if isinstance(reference, Mapping):
            inline = reference.get("bytes")
            reference = inline if inline is not None else reference.get("path") or reference.get("url")
        if isinstance(reference, bytes | bytearray | memoryview):
            return _capped(bytes(reference), kind, "bytes in the row")
        if not isinstance(reference, str) or not reference or "\0" in reference:
            raise DataError(f"{kind} is given as {reference!r:.80}; expected a file name, or bytes")
        if reference.startswith("data:"):
            return _capped(_data_url(reference, kind), kind, "data: URL")
        if reference in members:
            return _capped(members[reference], kind, reference)
        if "://" in reference:
            raise DataError(
                f"{kind} {reference[:120]!r} is a URL; nothing is fetched during an import: download it, write its "
                "file name in the row, and name the folder with --media-root"
            )
        if self.index is not None and (data := self.index.read(reference, folder, MAX_BYTES[kind])) is not None:
            return _capped(data, kind, reference)
        return self._read_file(reference, kind, folder)

    def _read_file(self, reference: str, kind: str, folder: Path) -> bytes:
        places = [Path(os.path.realpath(folder)), *self.roots]
        outside = False
        for place in dict.fromkeys(places):
            real = Path(os.path.realpath(place / reference))
            inside = any(real.is_relative_to(root) for root in self.roots)
            outside |= not inside
            if inside and os.path.lexists(real):
                return _read_regular(real, reference, kind)
        # No folder of this machine is named: the same source has to give the same rejected rows wherever it lies.
        if outside:
            raise DataError(
                f"{kind} {reference!r} lies outside the source folder; if it is yours, add its folder: --media-root"
            )
        near = next((name for place in places if (name := _nearest(place, reference))), "")
        advice = f"did you mean {near!r}? Otherwise name" if near else "copy it there, or name"
        raise DataError(
            f"{kind} {reference!r} is not in the source folder; {advice} the folder it is in with --media-root"
        )


def _nearest(place: Path, reference: str) -> str:
    """The file whose name is most like a missing one's, as a row would write it; empty when none is."""
    head, _, name = reference.rpartition("/")
    names = _names(place / head)
    same = [other for other in names if other.lower() == name.lower() or Path(other).stem == name]
    found = same or difflib.get_close_matches(name, names, n=1, cutoff=0.85)
    return f"{head}/{found[0]}".removeprefix("/") if found else ""


@functools.lru_cache(maxsize=64)
def _names(folder: Path) -> tuple[str, ...]:
    """File names of a folder in order; none of a huge one, where the search would take too long."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES + 1)]
    except OSError:
        return ()
    return tuple(sorted(names)) if len(names) <= _MOST_NAMES else ()


def _read_regular(path: Path, reference: str, kind: str) -> bytes:
    # Not blocking, since opening a named pipe would wait for a writer.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise DataError(f"{kind} {reference!r} cannot be read: {error.strerror}") from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        os.close(handle)
        raise DataError(f"{kind} {reference!r} is not a regular file")
    with os.fdopen(handle, "rb") as file:
        _check_size(found.st_size, kind, reference)
        return file.read()


def _data_url(reference: str, kind: str) -> bytes:
    head, comma, body = reference.partition(",")
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{kind} is a data: URL that is not base64")
    _check_size(len(body) * 3 // 4, kind, "data: URL")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{kind} is a data: URL with damaged base64: {error}") from error


def _capped(data: bytes, kind: str, name: str) -> bytes:
    _check_size(len(data), kind, name)
    return data


def _check_size(size: int, kind: str, name: str) -> None:
    if not size:
        raise DataError(f"{kind} {name!r} is empty (0 bytes); copy it again")
    if size > MAX_BYTES[kind]:
        raise DataError(f"{kind} {name!r} has {size} bytes, more than the {MAX_BYTES[kind]} that are read")
