"""How canonical tensors lie in a sharded checkpoint: the same names, but for what tensor parallel ranks cut in pieces.

A rank holds its part of z, of x, of B, of C and of dt in one matrix, so no contiguous range of rows of the whole is a
rank's. megatron-core (`ssm/mamba_mixer.py`) therefore stores the pieces of a Mamba layer's input projection and
convolution under names of their own. Everything else is one tensor under its name, whatever the layout.
"""

import torch
from torch import Tensor

from nemovl_train.checkpoint.streamed import StoredTensors
from nemovl_train.config.schema import LanguageConfig, ModelConfig
from nemovl_train.convert.lazy import Spec, Tensors
from nemovl_train.convert.mapping import report
from nemovl_train.convert.names import kind_of, table

# Canonical ending -> ending in the checkpoint, and the pieces in the order of their rows.
PIECES = {
    "mixer.in_proj.weight": ("mixer.in_proj.weight", ("z", "x", "B", "C", "dt")),
    "mixer.conv1d_weight": ("mixer.conv1d.weight", ("x", "B", "C")),
    "mixer.conv1d_bias": ("mixer.conv1d.bias", ("x", "B", "C")),
}


def stored_parts(name: str, rows: int, lm: LanguageConfig) -> list[tuple[str, int]]:
    """(name in the checkpoint, rows) of the pieces of a canonical tensor, in order.

    Args:
        name: Canonical name.
        rows: Rows of the canonical tensor.
        lm: Sizes of the language model.
    """
    shared = lm.mamba_num_groups * lm.mamba_state_dim
    sizes = {
        "z": lm.mamba_inner_size,
        "x": lm.mamba_inner_size,
        "B": shared,
        "C": shared,
        "dt": lm.mamba_num_heads,
    }
    for ending, (stored, pieces) in PIECES.items():
        if name.endswith(ending):
            base = name.removesuffix(ending) + stored
            return [(f"{base}.{piece}", sizes[piece]) for piece in pieces]
    return [(name, rows)]


def to_stored(canonical: Tensors, lm: LanguageConfig) -> Tensors:
    """Canonical tensors by their names in a checkpoint."""
    place: dict[str, tuple[str, int, int]] = {}
    specs: dict[str, Spec] = {}
    for name, spec in canonical.specs.items():
        first = 0
        for stored, rows in stored_parts(name, spec.shape[0], lm):
            place[stored] = (name, first, rows)
            specs[stored] = Spec((rows, *spec.shape[1:]), spec.dtype)
            first += rows
    source = canonical.remembering()

    def read(stored: str) -> Tensor:
        name, first, rows = place[stored]
        return source.read(name).narrow(0, first, rows)

    return Tensors(specs, read)


def from_stored(stored: StoredTensors, config: ModelConfig, *, partial: bool = False) -> Tensors:
    """Canonical tensors of a checkpoint, read when asked for; its optimizer state is left alone.

    Args:
        stored: The checkpoint.
        config: Sizes of the model.
        partial: Some tensors may be missing: the checkpoint holds what trained beside adapters.

    Raises:
        ConversionError: The checkpoint holds another model than `config`; every difference is named.
    """
    parts, specs, problems = {}, {}, []
    for entry in table(config, kind_of(config)):
        parts[entry.ours] = stored_parts(entry.ours, entry.shape[0], config.language)
        if partial and not any(name in stored.specs for name, _ in parts[entry.ours]):
            continue
        for name, rows in parts[entry.ours]:
            shape = [rows, *entry.shape[1:]]
            found = stored.specs.get(name)
            if found is None:
                problems.append(f"missing {name}")
            elif list(found.shape) != shape:
                problems.append(f"{name} has shape {list(found.shape)}, expected {shape}")
            else:
                specs[entry.ours] = Spec(entry.shape, found.dtype)
    report(problems, f"the checkpoint does not hold {config.name}")

    def read(name: str) -> Tensor:
        pieces = [stored.read(piece) for piece, _ in parts[name]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return Tensors(specs, read)
