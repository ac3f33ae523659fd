"""Small file work shared by all that writes into a run folder: whole or not at all, and errors that say what to do."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemovl_train.exceptions import CheckpointError, UserError

_HASH_BLOCK = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def explain_disk_errors(
    folder: Path,
    *,
    advice: str = "choose another run.root",
    kept: str = "earlier checkpoints are intact; ",
    error_class: type[UserError] = CheckpointError,
) -> Iterator[None]:
    """Turn a full disk, a folder without write permission and a file in its place into errors that say what to do.

    Args:
        folder: Folder that is written, for the message.
        advice: What to do where the folder cannot be written.
        kept: What a full disk did not harm; may be empty.
        error_class: Class of the error.

    Raises:
        UserError: `error_class` instead of such an OSError; others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise error_class(f"{no_space(folder, kept)} ({error.strerror})") from error
        if error.errno in _FORBIDDEN:
            where = f": {error.filename}" if error.filename else ""
            raise error_class(f"{folder} is not writable ({error.strerror}{where}): {advice}") from error
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise error_class(f"{error.filename} is a file, not a folder: {advice}") from error
        raise


def no_space(folder: Path, kept: str = "earlier checkpoints are intact; ") -> str:
    """Sentence for a disk that took no more."""
    free = shutil.disk_usage(_existing(folder)).free
    return f"no space left in {folder} ({free / 2**30:.2f} GiB free): {kept}free space and run the same command again"


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new one, never half.

    Raises:
        CheckpointError: The disk is full, or the folder cannot be written.
    """
    with explain_disk_errors(path.parent):
        write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """As `replace_text`, for a caller that explains the system's errors itself."""
    work = path.with_name(f".{path.name}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        fsync(work)
        os.replace(work, path)
    except OSError:
        work.unlink(missing_ok=True)
        raise


class HashedFile:
    """A new file whose SHA-256 is taken from the bytes on their way to it, never by reading it back.

    What the disk makes of them cannot change the hash, so a later check sees every difference.

    Args:
        path: File to create.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._file = path.open("wb", buffering=0)

    def write(self, block: bytes | memoryview) -> None:
        """Append a block."""
        left = memoryview(block)
        self._digest.update(left)
        self.bytes += len(left)
        while left:
            # A system call takes at most 2 GiB, and less on some file systems.
            left = left[self._file.write(left) :]

    def close(self) -> dict[str, int | str]:
        """Push the bytes to the disk.

        Returns:
            The file's entry of `integrity.json`: `bytes` and `sha256`.
        """
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return {"bytes": self.bytes, "sha256": self._digest.hexdigest()}


def write_hashed(path: Path, text: str) -> dict[str, int | str]:
    """Create a small file; the same entry as `HashedFile.close`."""
    file = HashedFile(path)
    try:
        file.write(text.encode())
    except BaseException:
        file.close()
        raise
    return file.close()


def fsync(path: Path) -> None:
    """Push a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hash of a file's content, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def files_below(folder: Path) -> list[Path]:
    """Every file of a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
