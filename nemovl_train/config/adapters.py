"""Which linear layers a model has, by name and size, and which of them a config gives adapters. Imports no torch.

The names are those of the built modules inside their part (`decoder.layers.0.mixer.in_proj`); a pattern is a glob over
whole names or over their ends: `in_proj`, `mixer.*`, `decoder.layers.[0-3].*`, `*`.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nemovl_train.config.schema import PARTS, AdapterConfig, LanguageConfig, ModelConfig, RunConfig, VisionConfig

_SHUFFLED_PATCHES = 4
"""Patches that the 2 x 2 pixel shuffle joins into one visual token."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer.

    Attributes:
        part: `vision`, `projector` or `language`.
        name: Name of the module inside its part.
        inputs: Width of what goes in.
        outputs: Width of what comes out.
        split: Side that tensor parallel ranks share: `outputs` (column parallel) or `inputs` (row parallel).
    """

    part: str
    name: str
    inputs: int
    outputs: int
    split: str

    def adapter_parameters(self, rank: int) -> int:
        """Numbers of a low-rank pair on this layer."""
        return rank * (self.inputs + self.outputs)


def linears(model: ModelConfig) -> list[Linear]:
    """Every linear layer that can have an adapter, part by part. Embedding, head and patch embedding are none."""
    found: list[Linear] = []
    if "vision" in model.parts:
        found += _vision(model.vision)
    if "projector" in model.parts:
        joined, inner = _SHUFFLED_PATCHES * model.vision.hidden_size, model.projector.ffn_hidden_size
        found += _pair(
            "projector", "", ("linear_fc1", joined, inner), ("linear_fc2", inner, model.language.hidden_size)
        )
    if "language" in model.parts:
        found += _language(model.language)
    return found


def adapted_linears(model: ModelConfig, adapter: AdapterConfig) -> list[Linear]:
    """The linear layers that get adapters; none when adapters are off."""
    if not adapter.rank:
        return []
    return [
        linear
        for linear in linears(model)
        if any(_matches(pattern, linear.name) for pattern in getattr(adapter.targets, linear.part))
    ]


def adapter_problems(config: RunConfig) -> Iterator[str]:
    """Sentences about adapter options, each with the nearest thing that would work."""
    adapter, trained = config.adapter, config.trainer.train
    asked = [part for part in PARTS if getattr(adapter.targets, part)]
    if not adapter.rank:
        if asked:
            yield f"adapter.targets.{asked[0]} is set, but adapter.rank=0 turns adapters off; set adapter.rank=16"
        return
    if adapter.rank < 0:
        yield f"adapter.rank={adapter.rank}: at least 0; 0 turns adapters off"
    if not adapter.alpha > 0:
        yield f"adapter.alpha={adapter.alpha}: must be above 0; adapter.rank is a common choice"
    if not asked:
        yield "adapter.targets names no layer; set adapter.targets.language=[in_proj,out_proj], or adapter.rank=0"
    if config.trainer.init_from is None:
        yield "trainer.init_from is empty; adapters need the checkpoint of the model that they adapt"
    known = linears(config.model)
    for part in asked:
        yield from _part_problems(part, getattr(adapter.targets, part), config.model, known)
        if part in trained:
            yield (
                f"trainer.train={list(trained)}: {part} has adapters, so its own weights stay frozen; remove it there, "
                f"or set adapter.targets.{part}=[]"
            )


def _part_problems(part: str, patterns: tuple[str, ...], model: ModelConfig, known: list[Linear]) -> Iterator[str]:
    if part not in model.parts:
        yield f"adapter.targets.{part}: the model has no such part; set adapter.targets.{part}=[]"
        return
    narrowest = {linear.name: min(linear.inputs, linear.outputs) for linear in known if linear.part == part}
    for pattern in patterns:
        if any(_matches(pattern, name) for name in narrowest):
            continue
        elsewhere = sorted({linear.part for linear in known if _matches(pattern, linear.name)})
        if elsewhere:
            advice = f"; it does in {', '.join(elsewhere)}"
        else:
            endings = sorted({ending for name in narrowest for ending in _endings(name)})
            close = difflib.get_close_matches(pattern, endings, n=3, cutoff=0.6)
            kinds = sorted({name.rpartition(".")[2] for name in narrowest})
            advice = f"; did you mean {' or '.join(close)}?" if close else f"; its layers are {', '.join(kinds)}"
        yield f"adapter.targets.{part}: {pattern} matches no linear layer of {part}{advice}"


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _endings(name: str) -> Iterator[str]:
    """A name, and what is left of it as words go away in front."""
    words = name.split(".")
    return (".".join(words[start:]) for start in range(len(words)))


def _pair(part: str, prefix: str, first: tuple[str, int, int], second: tuple[str, int, int]) -> list[Linear]:
    """Into the layer, split by its outputs; out of it, split by its inputs."""
    return [
        Linear(part=part, name=prefix + name, inputs=inputs, outputs=outputs, split=split)
        for (name, inputs, outputs), split in ((first, "outputs"), (second, "inputs"))
    ]


def _language(size: LanguageConfig) -> Iterator[Linear]:
    hidden, inner = size.hidden_size, size.mamba_inner_size
    heads = size.num_attention_heads * size.head_dim
    projected = 2 * inner + 2 * size.mamba_num_groups * size.mamba_state_dim + size.mamba_num_heads
    qkv = heads + 2 * size.num_query_groups * size.head_dim
    ffn = size.ffn_hidden_size
    widened = 2 * ffn if size.activation == "swiglu" else ffn
    kinds = {
        "M": (("mixer.in_proj", hidden, projected), ("mixer.out_proj", inner, hidden)),
        "*": (("self_attention.linear_qkv", hidden, qkv), ("self_attention.linear_proj", heads, hidden)),
        "-": (("mlp.linear_fc1", hidden, widened), ("mlp.linear_fc2", ffn, hidden)),
    }
    for number, kind in enumerate(size.hybrid_pattern):
        if kind in kinds:
            yield from _pair("language", f"decoder.layers.{number}.", *kinds[kind])


def _vision(size: VisionConfig) -> Iterator[Linear]:
    width, ffn = size.hidden_size, size.ffn_hidden_size
    for number in range(size.num_layers):
        prefix = f"decoder.layers.{number}."
        attention = (("self_attention.linear_qkv", width, 3 * width), ("self_attention.linear_proj", width, width))
        yield from _pair("vision", prefix, *attention)
        yield from _pair("vision", prefix, ("mlp.linear_fc1", width, ffn), ("mlp.linear_fc2", ffn, width))
