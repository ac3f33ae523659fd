"""What a conversion says when the disk refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemovl_train.checkpoint.files import explain_disk_errors
from nemovl_train.exceptions import ConversionError

OTHER_OUT = "choose another --out"


@contextmanager
def explain_writes(folder: Path, advice: str = OTHER_OUT) -> Iterator[None]:
    """Turn a full disk and a folder that cannot be written into a ConversionError that says what to do.

    Args:
        folder: Folder that is written, for the message.
        advice: What to do where it cannot be written.
    """
    with explain_disk_errors(folder, advice=advice, kept="", error_class=ConversionError):
        yield
