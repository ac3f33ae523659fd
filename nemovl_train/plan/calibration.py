"""Measured runs that the planner is held against: stock megatron-core on four H100, and this project's on one.

The measurements are `benchmarks/results/2026-11-22_megatron_core_4xh100.json` and
`benchmarks/results/2026-11-25_train_units_1xh100.json`. The profile of case `tp4_16k` gave the rates of `timing.py` and
`hardware.py`, `tp4_4k_without_sp` the cost of a launch, `unit_visual` the tower's rate; other times are predictions. No
constant of `memory.py` is fitted to a measurement.
"""

from dataclasses import dataclass, replace

from nemovl_train.config.schema import (
    PARTS,
    LanguageConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    TrainerConfig,
    VisionConfig,
)
from nemovl_train.plan.hardware import GIB, GPU_TYPES
from nemovl_train.plan.load import Grid, PackLoad
from nemovl_train.plan.memory import memory
from nemovl_train.plan.policy import BF16_MOMENTS, LEAN_STATES, Policy
from nemovl_train.plan.timing import step_time

MEGATRON_CORE, NEMOVL = "megatron-core 0.19.2", "nemovl"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured run.

    Attributes:
        name: Key in the result file.
        language: Language model that ran.
        grid: Its layout.
        seq_length: Tokens of a pack.
        documents: Documents of a pack.
        packs: Packs of a step.
        policy: What the measured program kept and recomputed.
        seconds: Median step.
        peak_gib: Peak of PyTorch's allocations.
        foreign_seconds: Part of the step that its profile gives to exchanging and reordering whole Mamba channels over
            context parallel ranks, which our layout does not do; added to the prediction before it is compared.
        program: Which program ran.
        tower_blocks: Blocks of the tower that ran and trained with it; 0 for text alone.
        tiles: Tiles of a pack.
    """

    name: str
    language: LanguageConfig
    grid: Grid
    seq_length: int
    documents: tuple[int, ...]
    packs: int
    policy: Policy
    seconds: float
    peak_gib: float
    foreign_seconds: float = 0.0
    program: str = MEGATRON_CORE
    tower_blocks: int = 0
    tiles: int = 0


_STOCK = Policy(states=BF16_MOMENTS, fused_gated_norm=False, chunked_loss=False, head_everywhere=True)
_BLOCK_44 = replace(_STOCK, full_recompute_layers=44)
_NANO_12B = LanguageConfig(vocab_size=131072)
_HALF_WIDTH = LanguageConfig(
    hidden_size=2560,
    hybrid_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-",
    num_attention_heads=20,
    num_query_groups=4,
    ffn_hidden_size=10240,
    mamba_num_heads=64,
    vocab_size=131072,
)
_TP4 = Grid(tp=4, sequence_parallel=True)
_DOCUMENTS_16K = (2880, 4224, 1408, 3392, 3584, 384, 512)
# The file gives the mean that attention sees, 4,940; as many documents of it as fit have the same cost.
_DOCUMENTS_32K = (4940,) * 6 + (3128,)

# This project: the pattern's unit of nine layers at full width and a short vocabulary, on one GPU, two packs a step.
_UNIT = LanguageConfig(hybrid_pattern="M-M-M-M*-", vocab_size=16384, base_vocab_size=16368)
# Lognormal of mean 3,500 in the file, another draw for every pack; attention is one percent of these steps.
_DOCUMENTS_UNIT = (3500,) * 4 + (2384,)


# They ran with an earlier form of the loss, which made logits again in backward.
def _unit(name: str, seconds: float, peak_gib: float, policy: Policy, *, tower_blocks: int = 0, tiles: int = 0) -> Case:
    return Case(
        name=name,
        language=_UNIT,
        grid=Grid(),
        seq_length=16384,
        documents=_DOCUMENTS_UNIT,
        packs=2,
        policy=replace(policy, head_made_again=True),
        seconds=seconds,
        peak_gib=peak_gib,
        program=NEMOVL,
        tower_blocks=tower_blocks,
        tiles=tiles,
    )


CASES = (
    Case(
        name="tp4_16k",
        language=_NANO_12B,
        grid=_TP4,
        seq_length=16384,
        documents=_DOCUMENTS_16K,
        packs=2,
        policy=_STOCK,
        seconds=1.347,
        peak_gib=62.5,
    ),
    Case(
        name="tp4_4k_without_sp",
        language=_NANO_12B,
        grid=Grid(tp=4),
        seq_length=4096,
        documents=(4096,),
        packs=4,
        policy=_STOCK,
        seconds=1.827,
        peak_gib=45.4,
    ),
    Case(
        name="tp4_4k",
        language=_NANO_12B,
        grid=_TP4,
        seq_length=4096,
        documents=(4096,),
        packs=4,
        policy=_STOCK,
        seconds=2.054,
        peak_gib=41.8,
    ),
    Case(
        name="tp2_cp2_32k",
        language=_NANO_12B,
        grid=Grid(tp=2, cp=2, sequence_parallel=True),
        seq_length=32768,
        documents=_DOCUMENTS_32K,
        packs=1,
        policy=replace(_BLOCK_44, states=LEAN_STATES),
        seconds=1.799,
        peak_gib=63.5,
        foreign_seconds=0.254,
    ),
    Case(
        name="tp4_32k",
        language=_NANO_12B,
        grid=_TP4,
        seq_length=32768,
        documents=_DOCUMENTS_32K,
        packs=1,
        policy=_BLOCK_44,
        seconds=1.653,
        peak_gib=57.7,
    ),
    Case(
        name="cp4_131k_half_width",
        language=_HALF_WIDTH,
        grid=Grid(cp=4),
        seq_length=131072,
        documents=(131072,),
        packs=1,
        policy=replace(_STOCK, full_recompute_layers=None),
        seconds=2.198,
        peak_gib=39.2,
        foreign_seconds=0.365,
    ),
    _unit("unit_none", 0.660, 45.2, Policy()),
    _unit("unit_selective", 0.683, 43.3, Policy(selective_recompute=True)),
    _unit("unit_full", 0.831, 36.7, Policy(full_recompute_layers=None)),
    _unit("unit_lean", 0.643, 32.2, Policy(states=LEAN_STATES)),
    _unit(
        "unit_visual",
        0.920,
        51.3,
        Policy(selective_recompute=True, tower_recompute="full"),
        tower_blocks=8,
        tiles=32,
    ),
)


def compare() -> list[dict[str, float | str]]:
    """Measured and predicted numbers of every case, and the relative errors."""
    return [_compare(case) for case in CASES]


def _compare(case: Case) -> dict[str, float | str]:
    parts = PARTS if case.tower_blocks else ("language",)
    config = RunConfig(
        model=ModelConfig(parts=parts, language=case.language, vision=VisionConfig(num_layers=case.tower_blocks or 1)),
        precision=PrecisionConfig(params="bf16"),
        trainer=TrainerConfig(train=parts),
    )
    load = PackLoad(
        seq_length=case.seq_length,
        documents=case.documents,
        samples=len(case.documents),
        tiles=case.tiles,
        head_tokens=case.seq_length - case.tiles * config.model.tokens_per_tile,
    )
    peak = memory(config, case.grid, load, case.policy).total / GIB
    gpu = GPU_TYPES["h100_80gb"]
    seconds = step_time(config, case.grid, load, gpu, packs=case.packs, policy=case.policy).total
    seconds += case.foreign_seconds
    return {
        "case": case.name,
        "program": case.program,
        "measured_gib": case.peak_gib,
        "planned_gib": round(peak, 1),
        "memory_error": round(peak / case.peak_gib - 1, 3),
        "measured_seconds": case.seconds,
        "planned_seconds": round(seconds, 3),
        "foreign_seconds": case.foreign_seconds,
        "time_error": round(seconds / case.seconds - 1, 3),
    }
