"""Which member of which tar file a medium is: for records that name media kept in tars of their own.

The Nemotron-VLM-Dataset-v2 is laid out so: `SUBSET.jsonl` beside `media/shard_*.tar` (its `data_format.md`). Offsets
are kept in SQLite, so that any number of members costs no memory and workers share one file.
"""

import os
import sqlite3
import tarfile
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.exceptions import DataError


class TarIndex:
    """Offsets of the members of some tar files."""

    def __init__(self, path: Path, root: Path) -> None:
        """Open an index that `build` made; `root` is the folder that the tars' names are relative to."""
        self.path, self.root = path, root
        self._base: sqlite3.Connection | None = None

    @classmethod
    def build(cls, path: Path, root: Path, tars: Sequence[Path]) -> "TarIndex":
        """Index tar files, unless `path` is there already; it appears only when it is complete.

        Raises:
            DataError: A tar file cannot be read.
        """
        if not path.exists():
            work = path.with_suffix(".tmp")
            work.unlink(missing_ok=True)
            with sqlite3.connect(work) as base:
                columns = "name TEXT, tar TEXT, start INT, size INT, PRIMARY KEY (name, tar)"
                base.execute(f"CREATE TABLE member ({columns}) WITHOUT ROWID")
                for tar in tars:
                    base.executemany("INSERT OR IGNORE INTO member VALUES (?, ?, ?, ?)", _members(tar, root))
            base.close()
            work.rename(path)
        return cls(path, root)

    def read(self, name: str, folder: Path, limit: int) -> bytes | None:
        """Bytes of a member, None when there is none of that name.

        Args:
            name: As a record gives it.
            folder: Folder of the record's file: of several members of that name, the one in a tar under it is meant.
            limit: Most bytes that are read.

        Raises:
            DataError: Several tars may be meant, or the member is larger than `limit`, or cut short.
        """
        if self._base is None:
            self._base = sqlite3.connect(self.path.absolute().as_uri() + "?mode=ro", uri=True)
        plain = name.removeprefix("./")
        names = (plain, plain.removeprefix("media/"))
        found = self._base.execute("SELECT tar, start, size FROM member WHERE name IN (?, ?)", names).fetchall()
        near = [row for row in found if (self.root / row[0]).is_relative_to(folder)]
        if not found:
            return None
        if len(near or found) > 1:
            tars = ", ".join(row[0] for row in (near or found)[:3])
            raise DataError(f"member {name!r} is in several tar files ({tars}); import their folders one by one")
        tar, start, size = (near or found)[0]
        if size > limit:
            raise DataError(f"member {name!r} of {tar} has {size} bytes, more than the {limit} that are read")
        with open(self.root / tar, "rb") as file:
            data = os.pread(file.fileno(), size, start)
        if len(data) != size:
            raise DataError(f"{tar} ends inside its member {name!r}; copy it again")
        return data


def _members(path: Path, root: Path) -> list[tuple[str, str, int, int]]:
    rows = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
                if info.isreg() and not info.issparse():
                    name = info.name.removeprefix("./")
                    rows.append((name, path.relative_to(root).as_posix(), info.offset_data, info.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a complete, uncompressed tar file: {error}; copy it again") from error
    return rows
