"""What an imported folder has besides weights and tokenizer, kept for the export: documents, and Python files unread.

A value of a document that training did not change goes back as it came, fields that we do not know included. Python
files are copied byte for byte; nothing here, or anywhere in the package, imports one.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.fp8 import CONFIG_KEY
from nemovl_train.convert.hf_layout import MediaBudget
from nemovl_train.convert.tensor_files import read_json

log = logging.getLogger(__name__)

FOLDER = "carried"
DOCUMENTS = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
_ALIAS = ("llm_config", "text_config")


@dataclass(frozen=True, kw_only=True)
class Carried:
    """An imported folder's small files.

    Attributes:
        folder: Where they lie.
        config: Sizes of the model at the import.
        media: Tiling at the import.
        dtype: Number format at the import, as Transformers spells it.
    """

    folder: Path
    config: ModelConfig
    media: MediaBudget
    dtype: str

    def python_files(self) -> list[Path]:
        """The folder's own code, sorted."""
        return sorted(self.folder.glob("*.py"))

    def document(self, name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        """A document of the export: what was imported, with what changed since.

        Args:
            name: File name.
            then: The document as we write it for the model that was imported.
            now: The document as we write it for the model to export.
        """
        path = self.folder / name
        if not path.is_file():
            return dict(now)
        # How the imported weights were stored says nothing about those that are written now.
        imported = {key: value for key, value in read_json(path).items() if key != CONFIG_KEY}
        return merge(imported, then, now)


def carry(hf_dir: Path, out: Path) -> None:
    """Copy an imported folder's documents and Python files to `out`; what links out of the folder stays behind."""
    out.mkdir()
    # A snapshot in the Hugging Face cache links to the repository's blobs.
    homes = (hf_dir.resolve(), hf_dir.resolve().parent.parent / "blobs")
    for path in sorted([*hf_dir.glob("*.py"), *(hf_dir / name for name in DOCUMENTS)]):
        if not path.is_file():
            continue
        if not any(path.resolve().is_relative_to(home) for home in homes):
            log.warning("%s is a link to %s, outside of the folder: left out", path, path.resolve())
            continue
        shutil.copyfile(path, out / path.name)


def merge(imported: Mapping[str, Any], then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Three-way merge of documents: `now` where it differs from `then`, else what was imported.

    The order of keys is that of `now`, followed by those that only the imported document has.
    """
    if _ALIAS[1] in imported and _ALIAS[0] not in imported:
        # An early revision's name of the same block; a folder has one of them.
        then, now = ({_ALIAS[1] if k == _ALIAS[0] else k: v for k, v in d.items()} for d in (then, now))
    out: dict[str, Any] = {}
    for key in (*now, *(k for k in imported if k not in now)):
        if key not in now:
            out[key] = imported[key]
        elif key not in imported:
            out[key] = now[key]
        elif isinstance(imported[key], dict) and isinstance(now[key], dict):
            out[key] = merge(imported[key], then.get(key) or {}, now[key])
        else:
            out[key] = imported[key] if now[key] == then.get(key) else now[key]
    return out
