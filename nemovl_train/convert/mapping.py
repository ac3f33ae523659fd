"""Applies the table of `names.py` to tensors: strict, tensor by tensor, bitwise in both directions.

Nothing here needs more than one fused tensor in memory at a time.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.lazy import Spec, Tensors
from nemovl_train.convert.names import Entry, Precision, Rule, constant_names, table
from nemovl_train.exceptions import ConversionError

MAX_REPORTED = 20
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


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
    elif entry.rule is Rule.STACKED:
        out = torch.cat(list(parts))
    elif entry.rule is Rule.HEAD_QKV:
        out = interleave(parts[0].chunk(3), entry.groups)
    else:
        out = parts[0]
    return out.float() if entry.precision is Precision.STATE else out


def to_hf(entry: Entry, tensor: Tensor) -> list[Tensor]:
    """The Hugging Face tensors of one canonical tensor, in the order of `entry.hf`."""
    if entry.rule is Rule.GROUPED_QKV:
        return deinterleave(tensor, entry.groups, [s[0] for s in entry.hf_shapes])
    if entry.rule is Rule.STACKED:
        return list(tensor.split([s[0] for s in entry.hf_shapes]))
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


def canonical_tensors(hf: Tensors, entries: Sequence[Entry]) -> Tensors:
    """A folder's tensors in canonical form, each read from only the Hugging Face tensors that it needs.

    `check_hf` must have passed for the same entries.
    """
    by_name = {e.ours: e for e in entries}
    specs = {
        e.ours: Spec(e.shape, torch.float32 if e.precision is Precision.STATE else hf.specs[e.hf[0]].dtype)
        for e in entries
    }
    return Tensors(specs, lambda name: to_canonical(by_name[name], [hf.read(n) for n in by_name[name].hf]))


def hf_tensors(
    canonical: Tensors,
    entries: Sequence[Entry],
    *,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Canonical tensors as a folder holds them, in the order of the table.

    Args:
        canonical: Each tensor of the table.
        entries: The table of the model.
        dtype: Convert parameters to this format; None keeps theirs, which must then be one and the same (dt_bias may
            be float32 beside narrower ones).
        state_dtype: Format of A_log and D in the folder.

    Raises:
        ConversionError: Names every tensor that is unknown, missing, or has another shape or format.
    """
    _check_canonical(canonical.specs, entries, any_dtype=dtype is not None)
    entry_of, specs = {}, {}
    for entry in entries:
        chosen = state_dtype if entry.precision is Precision.STATE else dtype or canonical.specs[entry.ours].dtype
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True):
            entry_of[name], specs[name] = entry, Spec(shape, chosen)
    source = canonical.remembering()

    def read(name: str) -> Tensor:
        entry = entry_of[name]
        return to_hf(entry, source.read(entry.ours).to(specs[name].dtype))[entry.hf.index(name)]

    return Tensors(specs, read)


def _check_canonical(specs: Mapping[str, Spec], entries: Sequence[Entry], *, any_dtype: bool) -> None:
    by_name = {e.ours: e for e in entries}
    problems = [f"unexpected tensor {n}{_nearest(n, by_name, 'expected is')}" for n in list(specs) if n not in by_name]
    problems += [f"missing {n}" for n in by_name if n not in specs]
    common = common_dtype(specs, entries)
    for name, entry in by_name.items():
        if name in specs:
            loose = entry.precision is not Precision.PARAMS
            wanted = None if any_dtype else common
            problems += _spec_problems(name, specs[name], entry.shape, wanted, loose=loose)
    report(problems, "cannot export")


def common_dtype(specs: Mapping[str, Spec], entries: Sequence[Entry]) -> torch.dtype:
    """Format of most canonical parameters."""
    plain = [e.ours for e in entries if e.precision is Precision.PARAMS]
    return _common_dtype(specs[n].dtype for n in plain if n in specs)


def hf_to_canonical(hf: Mapping[str, Tensor], config: ModelConfig, kind: str = "vlm") -> dict[str, Tensor]:
    """Canonical tensors of a folder held in memory.

    The optional constants (`names.CONSTANTS`) are accepted and left out; `constants_of` returns them.

    Raises:
        ConversionError: As `check_hf`.
    """
    tensors = Tensors.of(hf)
    check_hf(tensors.specs, config, kind)
    return dict(canonical_tensors(tensors, table(config, kind)))


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
    return dict(folder_tensors(Tensors.of(canonical), config, kind, constants=constants, state_dtype=state_dtype))


def folder_tensors(
    canonical: Tensors,
    config: ModelConfig,
    kind: str,
    *,
    constants: Mapping[str, Tensor] | None,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Every tensor of a folder: `hf_tensors` and the constants; arguments as in `canonical_to_hf`."""
    weights = hf_tensors(canonical, table(config, kind), dtype=dtype, state_dtype=state_dtype)
    names = constant_names(kind)
    chosen = default_constants(config, kind) if constants is None else constants
    extra = {names[short]: t for short, t in chosen.items()}
    specs = {**weights.specs, **{n: Spec.of(t) for n, t in extra.items()}}
    return Tensors(specs, lambda name: extra[name] if name in extra else weights.read(name))


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
