"""How a demo sample is written down: a record of the Nemotron-VLM-Dataset-v2 shape and the bytes of its media."""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

Sample = tuple[dict[str, Any], dict[str, bytes]]
"""(record, media bytes by member name)."""


def sample_id(name: str, split: str, index: int) -> str:
    """Identifier of a sample, unique over all demo sets; it has no dot or slash, so it can be a shard key."""
    return f"{name}-{split}-{index:06d}"


def text_sample(key: str, question: str, answer: str) -> Sample:
    """A sample without media."""
    return _record(key, [], question, answer), {}


def image_sample(key: str, images: Sequence[Image.Image], question: str, answer: str, *, fmt: str = "PNG") -> Sample:
    """A sample with one or more images before its question.

    Args:
        key: Sample identifier.
        images: Pictures in reading order.
        question: User text.
        answer: Assistant text.
        fmt: `PNG`, or `JPEG` for the sets that should look like scans.
    """
    items, members = [], {}
    for number, image in enumerate(images):
        member = f"{number}.{'png' if fmt == 'PNG' else 'jpg'}"
        metadata = {"width": image.width, "height": image.height, "format": fmt, "mode": image.mode}
        items.append({"type": "image", "image": member, "metadata": metadata})
        members[member] = encode_image(image, fmt)
    return _record(key, items, question, answer), members


def video_sample(key: str, mp4: bytes, metadata: dict[str, Any], question: str, answer: str) -> Sample:
    """A sample with one video before its question."""
    item = {"type": "video", "video": "0.mp4", "metadata": metadata}
    return _record(key, [item], question, answer), {"0.mp4": mp4}


def encode_image(image: Image.Image, fmt: str) -> bytes:
    """Encoded bytes; the same picture always gives the same bytes."""
    buffer = io.BytesIO()
    if fmt == "PNG":
        image.save(buffer, "PNG", compress_level=6)
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _record(key: str, media: list[dict[str, Any]], question: str, answer: str) -> dict[str, Any]:
    user: list[dict[str, Any]] = [*media, {"type": "text", "text": question}]
    return {
        "id": key,
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    }
