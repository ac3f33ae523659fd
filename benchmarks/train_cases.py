"""Cases of `train.py`: what is trained, on what packs, in which layout. One YAML file each in `cases/`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nemovl_train.config.schema import (
    AdapterConfig,
    AdapterTargets,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    ProjectorConfig,
    RecomputeConfig,
    TokenIds,
    VisionConfig,
)

FOLDER = Path(__file__).parent / "cases"
HALF_WIDTH = {
    "hidden_size": 2560,
    "num_attention_heads": 20,
    "num_query_groups": 4,
    "ffn_hidden_size": 10240,
    "mamba_num_heads": 64,
}
"""Of the stand-in that long sequences are tried on: half of every width of the 12B model, but for heads' own."""
SECTIONS = {
    "parallel": ParallelConfig,
    "precision": PrecisionConfig,
    "recompute": RecomputeConfig,
    "optim": OptimConfig,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured configuration.

    Attributes:
        case: Name in tables and results.
        kind: `train` takes optimizer steps, `head` measures output layer and loss alone.
        gpus: Processes.
        hybrid_pattern: Layers of the language model.
        vocab_size: Rows of embedding and head.
        vision_layers: Blocks of the tower; 0 leaves tower and projector out.
        train: Parts that train.
        adapted: Layers of the language model that get adapters of rank 16, as `adapter.targets.language` names them.
        engine: Program that trains: `ours`, or a peer, `stock` (megatron-core's own layers, `peer_stock.py`) or
            `transformers` (its own class under FSDP2, `peer_transformers.py`).
        form: What a peer makes of a pack: itself (`packed`), micro-batches of one document each (`alone`), or those in
            rows as long as the pack (`padded`).
        width: 1 for the 12B model's widths, 2 for half of them: the 2.4B stand-in of the long cases.
        seq_length: Tokens of a pack.
        mean_tokens: Mean length of a document, lognormal, cut to fill the pack; 0 is one document.
        sigma: Of the lognormal; 0 makes all documents equally long.
        document_multiple: Lengths are multiples of this, for peers that cut documents.
        visual: Share of the tokens that are visual.
        packs: Different packs of each data parallel rank, taken in turn.
        micro_batches: Packs of a step on each data parallel rank.
        warm: Steps before the timed ones.
        steps: Timed steps.
    """

    case: str
    kind: str = "train"
    gpus: int = 1
    hybrid_pattern: str = LanguageConfig.hybrid_pattern
    vocab_size: int = LanguageConfig.vocab_size
    vision_layers: int = 0
    train: tuple[str, ...] = ("language",)
    adapted: tuple[str, ...] = ()
    engine: str = "ours"
    form: str = "packed"
    width: int = 1
    seq_length: int = 16384
    mean_tokens: int = 3500
    sigma: float = 0.9
    document_multiple: int = 1
    visual: float = 0.0
    packs: int = 64
    micro_batches: int = 16
    warm: int = 3
    steps: int = 10
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.1, beta2=0.95))

    @property
    def adapter(self) -> AdapterConfig:
        """Rank and scale are those of `configs/adapter/lora.yaml`."""
        return AdapterConfig(rank=16 if self.adapted else 0, targets=AdapterTargets(language=self.adapted))

    def small(self) -> Case:
        """The same at laptop widths: layers, packs and steps are few, options stay. All is float32 on a CPU."""
        kinds = "".join(dict.fromkeys(self.hybrid_pattern))
        return replace(
            self,
            hybrid_pattern=kinds,
            vocab_size=272,
            vision_layers=min(self.vision_layers, 2),
            seq_length=256,
            mean_tokens=min(self.mean_tokens, 64),
            document_multiple=min(self.document_multiple, 16),
            packs=2,
            micro_batches=2,
            warm=1,
            steps=2,
            precision=replace(self.precision, fp8="none"),
            optim=replace(self.optim, states="fp32"),
            recompute=replace(self.recompute, language_layers=None if self.recompute.language_layers is None else 1),
        )

    def model(self, *, small: bool) -> ModelConfig:
        """Sizes: the 12B model's widths, or a laptop's."""
        parts = ("vision", "projector", "language") if self.vision_layers else ("language",)
        rows = self.vocab_size - 16
        widths: dict[str, Any] = {} if self.width == 1 else HALF_WIDTH
        vision: dict[str, Any] = {}
        projector = ProjectorConfig()
        if small:
            widths = {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4, "head_dim": 16}
            widths |= {"ffn_hidden_size": 160, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_state_dim": 16}
            widths |= {"mamba_num_groups": 4, "chunk_size": 32}
            vision = {"hidden_size": 48, "num_attention_heads": 4, "ffn_hidden_size": 192, "tile_size": 64}
            vision |= {"max_resolution": 256, "prefix_tokens": 4}
            projector = ProjectorConfig(ffn_hidden_size=80)
        return ModelConfig(
            name=self.case,
            parts=parts,
            language=LanguageConfig(
                hybrid_pattern=self.hybrid_pattern, vocab_size=self.vocab_size, base_vocab_size=rows, **widths
            ),
            vision=VisionConfig(num_layers=max(self.vision_layers, 1), **vision),
            projector=projector,
            tokens=TokenIds(image=rows, image_start=rows + 1, image_end=rows + 2, video=rows + 9),
        )


def load_cases(name: str, changes: list[str]) -> list[Case]:
    """A case by its file's name, and what its file lists under `beside`: the same packs in other programs or layouts.

    Args:
        name: File in `cases`.
        changes: Like `recompute.language=full` or `steps=4`; what `beside` sets itself stays.

    Raises:
        SystemExit: There is no such case or key; says which there are.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        raise SystemExit(f"no case {name!r}; there are {', '.join(sorted(p.stem for p in FOLDER.glob('*.yaml')))}")
    values: dict[str, Any] = {"case": name} | yaml.safe_load(path.read_text())
    beside = values.pop("beside", [])
    for change in changes:
        key, _, value = change.partition("=")
        section, _, leaf = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[leaf] = yaml.safe_load(value)
    try:
        return [_case(name, values), *(_case(name, _merged(values, other)) for other in beside)]
    except TypeError as error:
        raise SystemExit(f"{path.name} {' '.join(changes)}: {error}") from error


def _case(name: str, values: dict[str, Any]) -> Case:
    made = dict(values)
    for section, kind in SECTIONS.items():
        if section in made:
            default = Case(case=name).optim if section == "optim" else kind()
            made[section] = replace(default, **made[section])
    lists = {"train": ("language",), "adapted": ()}
    return Case(**made | {key: tuple(made.get(key, default)) for key, default in lists.items()})


def _merged(values: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`parallel` is replaced whole, since sizes of two layouts do not mix; other sections key by key."""
    sections = {
        key: {**values.get(key, {}), **other[key]} for key in ("precision", "recompute", "optim") if key in other
    }
    return values | other | sections
