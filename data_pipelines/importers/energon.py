"""Folders prepared by `energon prepare`: webdataset shards and a `.nv-meta` folder that says what their fields mean.

Read are `dataset.yaml` (sample type and field map) and `split.yaml` (shards of each split); see the Megatron-Energon
documentation, "Dataset format on disk" (github.com/NVIDIA/Megatron-Energon). Code that a folder brings along
(`sample_loader.py`) is never run.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from braceexpand import braceexpand

from data_pipelines.exceptions import DataError
from data_pipelines.importers.rows import Rejected, Row, Unit, split_of
from data_pipelines.importers.tables import check_inside
from data_pipelines.importers.tars import TarReader, parsed_fields

META = ".nv-meta"
_ROLES = {
    "image": "image",
    "video": "video",
    "context": "question",
    "answers": "answer",
    "choices": "choices",
    "correct_choice_idx": "answer",
    "caption": "caption",
    "text": "text",
    "label_name": "label",
    "label": "label",
}
"""Fields of Energon's sample types as columns of ours."""
_TASKS = {
    "CaptioningSample": "caption",
    "VQASample": "vqa",
    "VidQASample": "vqa",
    "MultiChoiceVQASample": "multiple_choice",
    "OCRSample": "ocr",
    "ImageClassificationSample": "classification",
}


class EnergonReader(TarReader):
    """Shards of each split, with the fields renamed by the field map."""

    def units(self, source: Path, split: str | None, roots: Sequence[Path] = ()) -> list[Unit]:
        """One unit a shard that `split.yaml` names and does not exclude."""
        if (source / META).is_dir():
            check_inside((source / META).iterdir(), source, roots)
        self.sample_type(source)
        spec = _load(source, "split")
        parts = spec.get("split_parts")
        if not isinstance(parts, Mapping):
            raise DataError(f"{source / META}/split.yaml has no split_parts; run `energon prepare` on the folder again")
        excluded = {name for text in spec.get("exclude") or () for name in braceexpand(str(text))}
        if inner := sorted(name for name in excluded if "/" in name and not (source / name).exists()):
            raise DataError(f"split.yaml excludes single samples ({inner[0]}); take them out of the shards instead")
        units = []
        for part, texts in parts.items():
            for name in (name for text in texts for name in braceexpand(str(text))):
                if name not in excluded:
                    _check_inside(source, name)
                    units.append(Unit(split_of(str(part), split), name))
        check_inside((source / unit.path for unit in units), source, roots)
        return units

    def rows(self, source: Path, unit: Unit) -> Iterator[Row | Rejected]:
        """Samples with columns named by role."""
        field_map = self._field_map(source)
        for row in super().rows(source, unit):
            if isinstance(row, Rejected) or not field_map:
                yield row
                continue
            try:
                values = _mapped(parsed_fields(row.members), field_map)
            except (KeyError, IndexError, ValueError) as error:
                yield Rejected(row.where, "", "row", f"the field map does not fit: {error}")
                continue
            key = row.values["__key__"]
            yield Row(row.where, row.position, {"__key__": key, **values}, row.members, row.folder)

    def sample_type(self, source: Path) -> str:
        """Energon's name of the sample type.

        Raises:
            DataError: A type that cannot be converted, or one that needs the folder's own code.
        """
        spec = _load(source, "dataset")
        kind = spec.get("sample_type")
        name = str(kind.get("__class__") if isinstance(kind, Mapping) else spec.get("__class__", "CrudeWebdataset"))
        name = name.removesuffix("Webdataset") + "Sample" if name.endswith("Webdataset") else name
        if name not in (*_TASKS, "CrudeSample"):
            raise DataError(f"{source} holds Energon's {name}; can be imported: CrudeSample, {', '.join(_TASKS)}")
        if "sample_loader" in spec:
            raise DataError(
                f"{source} is read by its own sample_loader.py, and code of a dataset is not run: import it with "
                "--format webdataset and name its fields with --column ROLE=FIELD"
            )
        return name

    def task(self, source: Path) -> str | None:
        """Task that converts the sample type; None for crude data, whose columns decide."""
        return _TASKS.get(self.sample_type(source))

    def _field_map(self, source: Path) -> dict[str, str]:
        spec = _load(source, "dataset").get("field_map") or {}
        return {str(k): str(v) for k, v in spec.items()}


def _load(source: Path, name: str) -> dict[str, Any]:
    for suffix in ("yaml", "json"):
        path = source / META / f"{name}.{suffix}"
        if path.exists():
            try:
                spec = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, ValueError) as error:
                raise DataError(f"{path} is not YAML: {error}") from error
            if isinstance(spec, dict):
                return spec
            raise DataError(f"{path} must hold a mapping, got {type(spec).__name__}")
    raise DataError(f"{source / META} has no {name}.yaml; run `energon prepare` on the folder")


def _check_inside(source: Path, name: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts or not (source / name).is_file():
        raise DataError(f"split.yaml names the shard {name!r}, which is not a file under {source}")


def _mapped(fields: Mapping[str, Any], field_map: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for target, access in field_map.items():
        if target in _ROLES:
            values.setdefault(_ROLES[target], _access(fields, access))
    weights = field_map.get("answer_weights")
    if weights and isinstance(values.get("answer"), list):
        weighted = _access(fields, weights)
        values["answer"] = values["answer"][max(range(len(weighted)), key=weighted.__getitem__)]
    return values


def _access(fields: Mapping[str, Any], text: str) -> Any:
    """`json[caption]` is field json, key caption; `txt,caption` is the first of the two that is there."""
    for option in text.split(","):
        name, *keys = (part.rstrip("]") for part in option.strip().split("["))
        value: Any = fields
        try:
            for key in (name, *keys):
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            continue
        return value
    raise KeyError(f"no field {text!r}; the sample has {', '.join(fields)}")
