"""Applies the table of `names.py` to tensors: strict, tensor by tensor, bitwise in both directions.

Nothing here needs more than one fused tensor in memory at a time.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.names import Entry, Precision, Rule, constant_names, table
from nemovl_train.exceptions import ConversionError

MAX_REPORTED = 20
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Spec:
    """Shape and number format of a tensor, known before its values are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def interleave(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Stack row blocks group by group: for each group its rows of parts[0], then of parts[1], ...

    Args:
        parts: Tensors [rows_i, ...] with equal trailing shape; `groups` divides every rows_i.
        groups: Number of groups.

    Returns:
        Tensor [sum rows_i, ...], rows ordered (group, part, row).
    """
    rest = parts[0].shape[1:]
    return torch.cat([p.reshape(groups, -1, *rest) for p in parts], dim=1).reshape(-1, *rest)


def deinterleave(tensor: Tensor, groups: int, rows: Sequence[int]) -> list[Tensor]:
    """Inverse of `interleave`; `rows` are the row counts of the parts."""
    rest = tensor.shape[1:]
    blocks = tensor.reshape(groups, -1, *rest).split([r // groups for r in rows], dim=1)
    return [b.reshape(-1, *rest) for b in blocks]


def to_canonical(entry: Entry, parts: Sequence[Tensor]) -> Tensor:
    """One canonical tensor from its Hugging Face tensors (shapes already checked)."""
    if entry.rule is Rule.GROUPED_QKV:
        out = interleave(parts, entry.groups)
    elif entry.rule is Rule.HEAD_QKV:
        out = interleave(parts[0].chunk(3), entry.groups)
    else:
        out = parts[0]
    return out.float() if entry.precision is Precision.STATE else out


def to_hf(entry: Entry, tensor: Tensor) -> list[Tensor]:
    """The Hugging Face tensors of one canonical tensor, in the order of `entry.hf`."""
    if entry.rule is Rule.GROUPED_QKV:
        return deinterleave(tensor, entry.groups, [s[0] for s in entry.hf_shapes])
    if entry.rule is Rule.HEAD_QKV:
        return [torch.cat(deinterleave(tensor, entry.groups, [entry.shape[0] // 3] * 3))]
    return [tensor]


def check_hf(specs: Mapping[str, Spec], config: ModelConfig, kind: str) -> torch.dtype:
    """Check the inventory of a folder against the model, reading no values.

    Args:
        specs: Name -> shape and format of every tensor of the folder.
        config: The model that the folder should hold.
        kind: `vlm`, `language` or `vision`.

    Returns:
        The folder's floating point format.

    Raises:
        ConversionError: Names every missing, unexpected, wrongly shaped or wrongly typed tensor.
    """
    entries = table(config, kind)
    expected = {name: (shape, e.precision) for e in entries for name, shape in zip(e.hf, e.hf_shapes, strict=True)}
    optional = set(constant_names(kind).values())
    extra = [n for n in specs if n not in expected and n not in optional]
    missing = [n for n in expected if n not in specs]
    # The nearest name is worth finding only for lines that will be shown: the search is quadratic.
    hinted = set(missing[:MAX_REPORTED]) | set(extra[:MAX_REPORTED])
    problems = [f"missing {n}{_nearest(n, extra, 'the folder has') if n in hinted else ''}" for n in missing]
    problems += [f"unexpected {n}{_nearest(n, expected, 'expected is') if n in hinted else ''}" for n in extra]
    dtype = _common_dtype(specs[n].dtype for n, (_, p) in expected.items() if n in specs and p is Precision.PARAMS)
    if dtype not in FORMATS:
        problems.insert(0, f"weights are {dtype_name(dtype)}; readable are {', '.join(map(dtype_name, FORMATS))}")
    for name, (shape, precision) in expected.items():
        if name in specs:
            problems += _spec_problems(name, specs[name], shape, dtype, loose=precision is not Precision.PARAMS)
    report(problems, f"the folder does not hold the {kind} model its config describes")
    return dtype


def stream_to_canonical(read: Callable[[str], Tensor], entries: Iterable[Entry]) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, tensor), reading only the Hugging Face tensors that each one needs.

    `check_hf` must have passed for the same entries.
    """
    for entry in entries:
        yield entry.ours, to_canonical(entry, [read(name) for name in entry.hf])


def stream_to_hf(
    tensors: Iterable[tuple[str, Tensor]],
    entries: Sequence[Entry],
    *,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) for canonical tensors that come in any order.

    Args:
        tensors: Canonical tensors, each of the table exactly once.
        entries: The table of the model.
        dtype: Convert parameters to this format; None keeps theirs, which must then be one and the same.
        state_dtype: Format of A_log and D in the folder.

    Raises:
        ConversionError: A tensor is unknown, repeated, missing, or has another shape or format; the name is given.
    """
    by_name = {e.ours: e for e in entries}
    left = dict(by_name)
    common: torch.dtype | None = None
    for name, tensor in tensors:
        entry = left.pop(name, None)
        if entry is None:
            known = name in by_name
            hint = "" if known else _nearest(name, by_name, "expected is")
            raise ConversionError(f"{'repeated' if known else 'unexpected'} tensor {name}{hint}")
        if common is None and entry.precision is Precision.PARAMS:
            common = tensor.dtype
        wanted = None if dtype is not None else common if entry.precision is Precision.PARAMS else tensor.dtype
        report(_spec_problems(name, Spec(tuple(tensor.shape), tensor.dtype), entry.shape, wanted), "cannot export")
        if entry.precision is Precision.STATE:
            tensor = tensor.to(state_dtype)
        elif dtype is not None:
            tensor = tensor.to(dtype)
        yield from zip(entry.hf, to_hf(entry, tensor), strict=True)
    report([f"missing {n}" for n in left], "cannot export")


def hf_to_canonical(hf: Mapping[str, Tensor], config: ModelConfig, kind: str = "vlm") -> dict[str, Tensor]:
    """Canonical tensors of a folder held in memory.

    The optional constants (`names.CONSTANTS`) are accepted and left out; `constants_of` returns them.

    Raises:
        ConversionError: As `check_hf`.
    """
    check_hf({n: Spec(tuple(t.shape), t.dtype) for n, t in hf.items()}, config, kind)
    return dict(stream_to_canonical(lambda n: hf[n], table(config, kind)))


def canonical_to_hf(
    canonical: Mapping[str, Tensor],
    config: ModelConfig,
    kind: str = "vlm",
    *,
    constants: Mapping[str, Tensor] | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Bitwise inverse of `hf_to_canonical`.

    Args:
        canonical: Canonical tensors.
        config: Sizes of the model.
        kind: `vlm`, `language` or `vision`.
        constants: As from `constants_of`; None writes `default_constants`.
        state_dtype: Format in which the folder held A_log and D.
    """
    out = dict(stream_to_hf(canonical.items(), table(config, kind), state_dtype=state_dtype))
    names = constant_names(kind)
    chosen = default_constants(config, kind) if constants is None else constants
    return out | {names[short]: t for short, t in chosen.items()}


def constants_of(hf: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The optional constants that a folder carries, by short name."""
    return {short: hf[name] for short, name in constant_names(kind).items() if name in hf}


def default_constants(config: ModelConfig, kind: str) -> dict[str, Tensor]:
    """Constants that a new folder gets: pixel statistics float32 [3, 1, 1]; for a tower alone also its summary tokens.

    A VLM reads only patch features, so its folder has no `summary_idxs` (the released layout has none either).
    """
    if kind == "language":
        return {}
    out = {
        "input_conditioner.norm_mean": torch.tensor(config.vision.norm_mean, dtype=torch.float32).view(3, 1, 1),
        "input_conditioner.norm_std": torch.tensor(config.vision.norm_std, dtype=torch.float32).view(3, 1, 1),
    }
    if kind == "vision":
        out["summary_idxs"] = torch.arange(min(2, config.vision.prefix_tokens), dtype=torch.int64)
    return out


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`, ..., as Transformers' configs spell it."""
    return str(dtype).removeprefix("torch.")


def report(problems: Sequence[str], head: str) -> None:
    """Raise one ConversionError with all problems, if there are any."""
    if problems:
        shown = list(problems[:MAX_REPORTED])
        if len(problems) > MAX_REPORTED:
            shown.append(f"and {len(problems) - MAX_REPORTED} more")
        raise ConversionError("\n".join([f"{head}:", *(f"  - {p}" for p in shown)]))


def _spec_problems(
    name: str, got: Spec, shape: tuple[int, ...], dtype: torch.dtype | None, *, loose: bool = False
) -> list[str]:
    problems = []
    if got.shape != shape:
        problems.append(f"{name} has shape {list(got.shape)}, expected {list(shape)}")
    allowed = set(FORMATS) if dtype is None else {dtype} | ({torch.float32} if loose else set())
    if got.dtype not in allowed:
        wanted = " or ".join(sorted(dtype_name(d) for d in allowed))
        problems.append(f"{name} is {dtype_name(got.dtype)}, expected {wanted}")
    return problems


def _nearest(name: str, pool: Iterable[str], words: str) -> str:
    close = difflib.get_close_matches(name, list(pool), n=1, cutoff=0.75)
    return f" ({words} {close[0]})" if close else ""


def _common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The format most tensors have (the first seen among equals); float32 when there are none."""
    counts: dict[torch.dtype, int] = {}
    for d in dtypes:
        counts[d] = counts.get(d, 0) + 1
    return max(counts, key=lambda d: counts[d]) if counts else torch.float32
