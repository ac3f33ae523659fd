"""Which parallel layouts a model and a number of processes allow. Imports neither torch nor megatron-core."""

import os
from collections.abc import Iterable

from nemovl_train.config.schema import LanguageConfig, ParallelConfig

MAMBA_CONTEXTS = ("state_passing", "head_exchange")
"""Forms of Mamba layers under context parallelism."""


def layout_problems(parallel: ParallelConfig, world_size: int, language: LanguageConfig | None = None) -> list[str]:
    """Names every reason why a layout cannot run, each with the nearest legal value.

    Args:
        parallel: Sizes asked for.
        world_size: Processes of the run.
        language: Model whose heads, groups and widths tensor parallelism has to divide; unchecked when None.

    Returns:
        One sentence per problem; empty when the layout is legal.
    """
    problems = []
    for key, value in (("parallel.tp", parallel.tp), ("parallel.cp", parallel.cp)):
        if value < 1:
            problems.append(f"{key}={value} must be at least 1; set {key}=1")
    if parallel.mamba_context not in MAMBA_CONTEXTS:
        problems.append(
            f"parallel.mamba_context={parallel.mamba_context} is not a choice; choose from {', '.join(MAMBA_CONTEXTS)}"
        )
    if problems:
        return problems
    product = parallel.tp * parallel.cp
    if world_size % product:
        what = "one process" if world_size == 1 else f"{world_size} processes"
        problems.append(
            f"parallel.tp={parallel.tp} x parallel.cp={parallel.cp} = {product} does not divide the {what}; "
            f"{_fitting(parallel, world_size)}"
        )
    if parallel.sequence_parallel and parallel.tp == 1:
        problems.append("parallel.sequence_parallel=true needs parallel.tp > 1; set parallel.sequence_parallel=false")
    if language is not None:
        widths = _width_problems(parallel.tp, language)
        problems += widths or _head_exchange_problems(parallel, language)
    return problems


def placement_problems(parallel: ParallelConfig, nodes: int, per_node: int) -> list[str]:
    """Names every reason why a layout is badly placed on nodes of this size.

    Ranks are numbered tensor parallel first, then context parallel, and launchers give a node consecutive ranks. So the
    ranks of a pack lie in one NVLink domain when their number divides the node; more of them fill whole nodes, with
    every tensor parallel group, which talks in every layer, inside one.

    Args:
        parallel: A legal layout.
        nodes: Nodes of the run.
        per_node: Processes of each, joined by one NVLink domain.

    Returns:
        One sentence per problem.
    """
    if nodes == 1:
        return []
    if per_node % parallel.tp:
        legal = _nearest(parallel.tp, (d for d in range(1, per_node + 1) if per_node % d == 0))
        return [
            f"parallel.tp={parallel.tp}: tensor parallel ranks would reach over nodes of {per_node} processes; "
            f"set parallel.tp={legal}"
        ]
    group = parallel.tp * parallel.cp
    if per_node % group and group % per_node:
        sizes = (d for d in range(1, nodes * per_node + 1) if per_node % (d * parallel.tp) == 0)
        legal = _nearest(parallel.cp, sizes)
        return [
            f"parallel.cp={parallel.cp} x parallel.tp={parallel.tp} = {group} ranks would share a pack over parts of "
            f"nodes of {per_node} processes; set parallel.cp={legal}"
        ]
    return []


def _head_exchange_problems(parallel: ParallelConfig, language: LanguageConfig) -> list[str]:
    """Context parallel ranks that exchange Mamba heads share each tensor parallel rank's heads and groups."""
    if parallel.mamba_context != "head_exchange" or "M" not in language.hybrid_pattern:
        return []
    local = {name: getattr(language, name) // parallel.tp for name in ("mamba_num_heads", "mamba_num_groups")}
    bad = [f"{name} / parallel.tp = {value}" for name, value in local.items() if value % parallel.cp]
    if not bad:
        return []
    legal = _nearest(
        parallel.cp, (d for d in range(1, min(local.values()) + 1) if not any(v % d for v in local.values()))
    )
    return [
        f"parallel.mamba_context=head_exchange: parallel.cp={parallel.cp} does not divide model.language "
        f"{', '.join(bad)}; set parallel.mamba_context=state_passing, or parallel.cp={legal}"
    ]


def _width_problems(tp: int, language: LanguageConfig) -> list[str]:
    """Widths that tensor parallelism splits; the smallest common divisor set decides the nearest legal size."""
    split = {
        "num_attention_heads": language.num_attention_heads,
        "num_query_groups": language.num_query_groups,
        "mamba_num_heads": language.mamba_num_heads,
        "mamba_num_groups": language.mamba_num_groups,
        "ffn_hidden_size": language.ffn_hidden_size,
        "vocab_size": language.vocab_size,
    }
    bad = [f"{name}={value}" for name, value in split.items() if value % tp]
    if not bad:
        return []
    largest = min(split.values())
    legal = _nearest(tp, (d for d in range(1, largest + 1) if not any(v % d for v in split.values())))
    return [f"parallel.tp={tp} does not divide model.language {', '.join(bad)}; set parallel.tp={legal}"]


def _fitting(parallel: ParallelConfig, world_size: int) -> str:
    """What to set, or how many processes to start, where their number does not suit a layout."""
    sizes = range(1, world_size + 1)
    if tp := _nearest(parallel.tp, (d for d in sizes if world_size % (d * parallel.cp) == 0)):
        return f"set parallel.tp={tp}"
    product = parallel.tp * parallel.cp
    more = f"start a multiple of {product} processes (nemovl launch torchrun ... --nproc {product})"
    if cp := _nearest(parallel.cp, (d for d in sizes if world_size % (d * parallel.tp) == 0)):
        return f"set parallel.cp={cp}, or {more}"
    return more


def nearest_context(parallel: ParallelConfig, seq_length: int, chunk: int) -> int | None:
    """The context parallel size next to the one asked for whose ranks get equal runs of whole chunks of a pack.

    Args:
        parallel: Sizes asked for.
        seq_length: Tokens of a pack.
        chunk: Tokens that the scan treats at once.

    Returns:
        None where no size does, not even 1.
    """
    if seq_length % chunk:
        return None
    runs = seq_length // chunk
    return _nearest(parallel.cp, (d for d in range(1, runs + 1) if runs % (d * parallel.tp) == 0))


def launched_processes() -> int:
    """Processes of this run: what torchrun told this one, or one without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _nearest(wanted: int, legal: Iterable[int]) -> int | None:
    return min(legal, key=lambda value: (abs(value - wanted), value), default=None)
