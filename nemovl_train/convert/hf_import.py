"""Reads Hugging Face folders into canonical tensors, one at a time. Data only: no code from a folder is ever run."""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.hf_config import read_config, read_kind
from nemovl_train.convert.hf_export import MANIFEST, MANIFEST_FORMAT
from nemovl_train.convert.lazy import Spec, Tensors
from nemovl_train.convert.mapping import canonical_tensors, check_hf, constants_of, dtype_name
from nemovl_train.convert.names import constant_names, table
from nemovl_train.convert.tensor_files import TensorFolder, read_json
from nemovl_train.exceptions import ConversionError

log = logging.getLogger(__name__)

EMBEDDING = "language_model.embedding.word_embeddings.weight"
HEAD = "language_model.output_layer.weight"
MEAN_BLOCK_ROWS = 4096
BF16_ROUNDING = 2.0**-8


class HFFolder:
    """A checked Hugging Face folder.

    The whole inventory (names, shapes, formats) is checked here, from headers alone. Values are read, and compared with
    the hashes of an export by us where there are any, when they are asked for.

    Args:
        hf_dir: Folder of a VLM, a text model or a tower.

    Attributes:
        kind: `vlm`, `language` or `vision`.
        config: Sizes of the model.
        dtype: Floating point format of the weights.
        state_dtype: Format in which the folder holds A_log and D.

    Raises:
        ConversionError: Not such a folder, or its tensors are not those that its config describes.
    """

    def __init__(self, hf_dir: Path) -> None:
        if not hf_dir.is_dir():
            raise ConversionError(f"{hf_dir} is not a folder")
        self.path = hf_dir
        self.kind = read_kind(hf_dir)
        self.files = TensorFolder(hf_dir, hashes=_hashes(hf_dir))
        self.config = read_config(hf_dir, tensors=self.files)
        self.dtype = check_hf(self.files.specs, self.config, self.kind)
        if self.files.fp8:
            log.warning(
                "%s: %d FP8 weights are read as %s, with the rounding that they have; the folder that they were made "
                "from, if you have it, is the better start for training",
                *(hf_dir, len(self.files.fp8), dtype_name(self.dtype)),
            )
        states = [s.dtype for n, s in self.files.specs.items() if n.endswith("mixer.A_log")]
        self.state_dtype = states[0] if states else torch.float32

    def tensors(self) -> Tensors:
        """The tensors by canonical name, in the order of the table."""
        return canonical_tensors(Tensors(self.files.specs, self.files.read), table(self.config, self.kind))

    def constants(self) -> dict[str, Tensor]:
        """Tower constants that the folder carries, by short name; pass them to an export to keep them."""
        names = set(constant_names(self.kind).values()) & self.files.specs.keys()
        return constants_of({n: self.files.read(n) for n in names}, self.kind)


def join_parts(language_dir: Path, vision_dir: Path, *, config: ModelConfig) -> Tensors:
    """Canonical tensors of a VLM made from a text model and a tower.

    Embedding and head grow to the VLM's rows (`grow_rows`). The projector is not among the tensors: it is new, so it
    keeps the values that the model's keyed initialisation gives it.

    Args:
        language_dir: Folder of the text model, with `config.language.base_vocab_size` rows.
        vision_dir: Folder of the tower.
        config: The VLM.

    Returns:
        Every tensor of `vision_model.*` and `language_model.*`, in the formats of their folders. Both folders have
        been checked.

    Raises:
        ConversionError: A folder is of the wrong kind, or has other sizes than `config`.
    """
    language, vision = HFFolder(language_dir), HFFolder(vision_dir)
    for folder, kind in ((language, "language"), (vision, "vision")):
        if folder.kind != kind:
            raise ConversionError(f"{folder.path} holds a {folder.kind} model; a {kind} model is expected there")
    # What a model may choose for the same weights: its rows, how long it reads, how it scans and tiles.
    free = ("vocab_size", "init_std", "max_position", "chunk_size", "tile_size", "norm_mean", "norm_std")
    problems = _differences(language.config.language, config.language, "language", skip=free)
    problems += _differences(vision.config.vision, config.vision, "vision", skip=free)
    problems += _other_statistics(vision.config, config)
    if config.language.vocab_size < language.config.language.vocab_size:
        problems.append(f"language.vocab_size={config.language.vocab_size} is less than the folder's rows")
    if problems:
        raise ConversionError("\n".join(["the parts do not fit the model:", *(f"  - {p}" for p in problems)]))
    return _joined(language, vision, config.language.vocab_size)


def _joined(language: HFFolder, vision: HFFolder, rows: int) -> Tensors:
    text, tower = language.tensors(), vision.tensors()
    specs = {**tower.specs, **text.specs}
    for name in (EMBEDDING, HEAD):
        old = specs[name]
        specs[name] = Spec((rows, *old.shape[1:]), old.dtype)

    def read(name: str) -> Tensor:
        if name in tower.specs:
            return tower.read(name)
        tensor = text.read(name)
        return grow_rows(tensor, rows) if name in (EMBEDDING, HEAD) else tensor

    return Tensors(specs, read)


def grow_rows(weight: Tensor, rows: int) -> Tensor:
    """A vocabulary matrix with new rows at its end, each the mean of the old ones.

    A mean row starts a new tag as an average word, so that untrained tags neither dominate nor vanish in the softmax.

    Args:
        weight: [V, H], floating point.
        rows: Rows of the result, at least V.

    Returns:
        [rows, H] in the format of `weight`; `weight` itself when nothing is added.
    """
    old = weight.shape[0]
    assert rows >= old, (rows, old)
    if rows == old:
        return weight
    # Summed in float64 over blocks, one after the other: the same bits for any number of threads, and little memory.
    total = torch.zeros(weight.shape[1], dtype=torch.float64)
    for block in weight.split(MEAN_BLOCK_ROWS):
        total += block.double().sum(0)
    mean = (total / old).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - old, -1)])


def _differences(found: object, wanted: object, part: str, *, skip: tuple[str, ...]) -> list[str]:
    mine, theirs = vars(found), vars(wanted)
    return [
        f"{part}.{field}: the folder has {mine[field]!r}, the model {theirs[field]!r}"
        for field in mine
        if field not in skip and mine[field] != theirs[field]
    ]


def _other_statistics(found: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Pixel statistics are the same up to the rounding of a bfloat16 conditioner tensor."""
    problems = []
    for field in ("norm_mean", "norm_std"):
        mine, theirs = getattr(found.vision, field), getattr(wanted.vision, field)
        if not all(math.isclose(a, b, rel_tol=BF16_ROUNDING) for a, b in zip(mine, theirs, strict=True)):
            problems.append(f"vision.{field}: the folder has {list(mine)}, the model {list(theirs)}")
    return problems


def _hashes(hf_dir: Path) -> dict[str, str]:
    path = hf_dir / MANIFEST
    if not path.is_file():
        return {}
    manifest = read_json(path)
    if manifest.get("format") != MANIFEST_FORMAT:
        raise ConversionError(f"{path} has format {manifest.get('format')!r}; this version reads {MANIFEST_FORMAT}")
    return {name: str(entry["sha256"]) for name, entry in manifest["tensors"].items()}
