"""Kinds of media files, by name and by content."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
VIDEO_SUFFIXES = ("mp4", "mkv", "webm", "mov", "avi", "m4v", "mpg", "mpeg", "ts")


def suffix_kind(name: str) -> str:
    """`image` or `video` by the last extension of a name; empty for anything else."""
    suffix = name.rpartition(".")[2].lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else ""


def content_suffix(data: bytes, kind: str) -> str:
    """Extension that fits the first bytes of an image or video; `bin` when they are of no known kind.

    Names lie often (a PNG called `.jpg`), and a stored member should not.
    """
    if kind == "image":
        if data.startswith(b"\xff\xd8\xff"):
            return "jpg"
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return "png"
        return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "bin"
    if data[4:8] == b"ftyp":
        return "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "mkv"
    return "avi" if data[:4] == b"RIFF" and data[8:12] == b"AVI " else "bin"
