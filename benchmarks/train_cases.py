"""Cases of `train.py`: what is trained, on what packs, in which layout. One YAML file each in `cases/`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from nemovl_train.config.schema import (
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ProjectorConfig,
    RecomputeConfig,
    TokenIds,
    VisionConfig,
)

FOLDER = Path(__file__).parent / "cases"
SECTIONS = {"parallel": ParallelConfig, "recompute": RecomputeConfig, "optim": OptimConfig}


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
        seq_length: Tokens of a pack.
        mean_tokens: Mean length of a document, lognormal with sigma 0.9, cut to fill the pack; 0 is one document.
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
    seq_length: int = 16384
    mean_tokens: int = 3500
    visual: float = 0.0
    packs: int = 64
    micro_batches: int = 16
    warm: int = 3
    steps: int = 10
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, weight_decay=0.1, beta2=0.95))

    def small(self) -> Case:
        """The same at laptop widths: layers, packs and steps are few, options stay. States are float32 on a CPU."""
        kinds = "".join(dict.fromkeys(self.hybrid_pattern))
        return replace(
            self,
            hybrid_pattern=kinds,
            vocab_size=272,
            vision_layers=min(self.vision_layers, 2),
            seq_length=256,
            mean_tokens=min(self.mean_tokens, 60),
            packs=2,
            micro_batches=2,
            warm=1,
            steps=2,
            optim=replace(self.optim, states="fp32"),
            recompute=replace(self.recompute, language_layers=None if self.recompute.language_layers is None else 1),
        )

    def model(self, *, small: bool) -> ModelConfig:
        """Sizes: the 12B model's widths, or a laptop's."""
        parts = ("vision", "projector", "language") if self.vision_layers else ("language",)
        rows = self.vocab_size - 16
        widths: dict[str, Any] = {}
        vision: dict[str, Any] = {}
        projector = ProjectorConfig()
        if small:
            widths = {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16}
            widths |= {"ffn_hidden_size": 160, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_state_dim": 16}
            widths |= {"mamba_num_groups": 2, "chunk_size": 32}
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


def load_case(name: str, changes: list[str]) -> Case:
    """A case by its file's name, with changes like `recompute.language=full` or `steps=4`.

    Raises:
        SystemExit: There is no such case or key; says which there are.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        raise SystemExit(f"no case {name!r}; there are {', '.join(sorted(p.stem for p in FOLDER.glob('*.yaml')))}")
    values: dict[str, Any] = {"case": name} | yaml.safe_load(path.read_text())
    for change in changes:
        key, _, value = change.partition("=")
        section, _, leaf = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[leaf] = yaml.safe_load(value)
    try:
        for section, kind in SECTIONS.items():
            if section in values:
                default = Case(case=name).optim if section == "optim" else kind()
                values[section] = replace(default, **values[section])
        return Case(**values | {"train": tuple(values.get("train", ("language",)))})
    except TypeError as error:
        raise SystemExit(f"{path.name} {' '.join(changes)}: {error}") from error
