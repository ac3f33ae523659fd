"""A base and its adapters as one model: layer by layer from two checkpoints, each compared before it is handed on.

The comparison needs no model: a linear layer with an adapter computes W x + alpha / rank * B (A x), the merged one
(W + alpha / rank * B A) x, and both are tried on a few random inputs in float32. On request the logits of the whole
model are compared too, which takes it in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import adapter_run, base_of
from nemovl_train.checkpoint.streamed import StoredTensors
from nemovl_train.config.adapters import adapted_linears
from nemovl_train.config.schema import ModelConfig, RunConfig
from nemovl_train.convert.checkpoints import find_checkpoint, load_tensors, single_process_model
from nemovl_train.convert.described import CheckpointInfo, Import, describe_checkpoint, import_behind
from nemovl_train.convert.lazy import Spec, Tensors
from nemovl_train.convert.mapping import report
from nemovl_train.convert.ours_check import compute
from nemovl_train.convert.probe import make_probe
from nemovl_train.convert.stored import from_stored
from nemovl_train.exceptions import ConversionError
from nemovl_train.model.adapters import TrainedWeights, add_adapters, merge_adapters
from nemovl_train.model.lora import ADAPTER, merged_weight
from nemovl_train.model.vlm import ATTRIBUTES, NemotronVL

MERGE_BOUND = 1e-5
"""Largest difference in float32 between adapter and merged weight, as a share of the largest output or logit."""
_PROBES = 4
_FIRST = ".lora_a"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged model that is still to be read.

    Attributes:
        info: Sizes, facts and what an export takes besides.
        run: Config of the run that trained the adapters.
        tensors: Canonical tensors; adapted ones in float32, whole ones as their checkpoint has them.
        identity: Hash of where the values come from.
        found: What the comparisons found: `layers`, `largest_difference` (complete once every tensor was read), and
            with logits their two numbers.
        imported: The import behind the base.
        base_name: What the base says about where it came from.
    """

    info: CheckpointInfo
    run: RunConfig
    tensors: Tensors
    identity: str
    found: dict[str, Any]
    imported: Import | None
    base_name: str

    def origin(self) -> dict[str, Any]:
        """What the state of a checkpoint of it says, as that of an imported one would."""
        state = {} if self.imported is None else self.imported.state
        kept: dict[str, Any] = {key: state[key] for key in ("constants", "state_dtype") if key in state}
        if "carried" in self.info.export:
            carried = self.info.export["carried"]
            kept["carried"] = {"model": asdict(carried.config), "media": asdict(carried.media), "dtype": carried.dtype}
        if "bf16_layers" in self.info.export:
            kept["bf16_layers"] = self.info.export["bf16_layers"]
        media = asdict(self.info.export["media"])
        return {"source": self.base_name, "media": media, "facts": self.info.facts, **kept}


def open_merged(source: Path, base: Path | None = None, *, logits: bool = False) -> Merged:
    """Open a run with adapters and its base.

    Args:
        source: Checkpoint, stage or run folder of a run with adapters.
        base: Where the base's checkpoint is now; None where it was when training started.
        logits: Compare logits of the whole model now.

    Raises:
        ConversionError: There are no adapters, or merged weights give other logits.
        CheckpointError: The base is not there, or is another one, or a checkpoint is damaged.
    """
    folder, run = adapters_of(source)
    below = base_of(folder, base)
    found: dict[str, Any] = {}
    tensors = merged_tensors(StoredTensors(below), StoredTensors(folder), run, found)
    if logits:
        with adapted_model(folder, run, torch.float32, below) as model:
            found |= compare_logits(model, run.model, tensors)
    info = describe_checkpoint(folder, parent=below)
    targets = {part: list(patterns) for part, patterns in asdict(run.adapter.targets).items() if patterns}
    adapted = {"rank": run.adapter.rank, "alpha": run.adapter.alpha, "targets": targets}
    # `found` itself: a card or a state is written after the tensors, and then it is complete.
    info.facts.update(adapters=adapted, merged=found)
    # What was compared goes into the card, so a continued export has to compare it as well.
    origin = ["merged", *(sealed.seal_of(path) for path in (folder, below)), asdict(run.adapter), logits]
    return Merged(
        info=info,
        run=run,
        tensors=tensors,
        identity=hashlib.sha256(json.dumps(origin).encode()).hexdigest(),
        found=found,
        imported=import_behind(folder, parent=below),
        base_name=name_of_base(folder, below),
    )


def merged_tensors(base: StoredTensors, adapters: StoredTensors, run: RunConfig, found: dict[str, Any]) -> Tensors:
    """Canonical tensors of the merged model, one layer in memory at a time.

    Args:
        base: Checkpoint of the base.
        adapters: Checkpoint of the adapters, and of parts that trained as a whole.
        run: Config of the run that made it.
        found: Gets the number of `layers`, and the `largest_difference` of the comparison as they are read. An export
            that is continued puts back what it knew.

    Raises:
        ConversionError: The checkpoint has other adapters than its run's config names.
    """
    whole, trained = from_stored(base, run.model), from_stored(adapters, run.model, partial=True)
    scale = run.adapter.alpha / run.adapter.rank
    pairs = {
        f"{name}.weight": f"{name}.{ADAPTER}"
        for linear in adapted_linears(run.model, run.adapter)
        for name in [f"{ATTRIBUTES[linear.part]}.{linear.name}"]
    }
    asked = {f"{pair}{_FIRST}" for pair in pairs.values()}
    weights = (name for name in adapters.specs if name.partition(".")[0] in ATTRIBUTES.values())  # no moments
    held = {name for name in weights if name.endswith(f".{ADAPTER}{_FIRST}")}
    problems = [f"the checkpoint has no {name}, which its run's config asks for" for name in sorted(asked - held)]
    problems += [f"the checkpoint has {name}, which its run's config does not name" for name in sorted(held - asked)]
    report(problems, "the adapters are not those of the config")
    found |= {"layers": len(pairs), "largest_difference": 0.0}
    specs = {
        name: Spec(spec.shape, torch.float32) if name in pairs else trained.specs.get(name, spec)
        for name, spec in whole.specs.items()
    }
    checked: set[str] = set()

    def read(name: str) -> Tensor:
        if name in trained.specs:
            return trained.read(name)
        if name not in pairs:
            return whole.read(name)
        weight, (a, b) = whole.read(name), _pair(adapters, pairs[name])
        merged = merged_weight(weight, a, b, scale)
        if name not in checked:  # a tensor that goes into several of a folder is read for each
            checked.add(name)
            difference = _difference(name, weight, a, b, scale, merged)
            found["largest_difference"] = max(found["largest_difference"], difference)
        return merged

    return Tensors(specs, read)


def _pair(adapters: StoredTensors, prefix: str) -> tuple[Tensor, Tensor]:
    """Both matrices of a layer; the second lies in pieces where its rows are split one kind after the other."""
    first, second = f"{prefix}{_FIRST}", f"{prefix}.lora_b"
    if second in adapters.specs:
        return adapters.read(first), adapters.read(second)
    pieces = sorted(
        (name for name in adapters.specs if name.startswith(f"{second}.part")),
        key=lambda n: int(n.rpartition("part")[2]),
    )
    return adapters.read(first), torch.cat([adapters.read(name) for name in pieces])


def _difference(name: str, weight: Tensor, a: Tensor, b: Tensor, scale: float, merged: Tensor) -> float:
    """Largest difference between layer with adapter and merged layer, as a share of the largest output."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
    inputs = torch.randn(weight.shape[1], _PROBES, generator=torch.Generator().manual_seed(seed))
    expected = weight.float() @ inputs + scale * (b.float() @ (a.float() @ inputs))
    difference = float((merged @ inputs - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= MERGE_BOUND:
        raise ConversionError(
            f"{name}: the merged weight computes something else than the adapter: outputs differ by {difference:.2g} "
            "of the largest; nothing was written"
        )
    return difference


@torch.no_grad()
def compare_logits(model: NemotronVL, config: ModelConfig, tensors: Tensors) -> dict[str, float]:
    """Compare logits of a model with adapters and of the tensors that are to be written.

    Args:
        model: With adapters; afterwards it holds `tensors` and has none.
        config: Its sizes.
        tensors: Every tensor of the merged model.

    Returns:
        `largest_logit_difference` and `largest_logit`.

    Raises:
        ConversionError: They differ by more than rounding.
    """
    probe = make_probe(config)
    before = compute(model, config, probe)
    merge_adapters(model)
    # Its own sums are replaced: what counts is what goes into the folder, read from the checkpoints.
    load_tensors(model, ((name, tensors.read(name)) for name in tensors.specs))
    after = compute(model, config, probe)
    return _compare(before, after)


def _compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    logits = [name for name in before if name.endswith("_logits")]
    largest = max(float(before[name].abs().max()) for name in logits)
    difference = max(float((before[name] - after[name]).abs().max()) for name in logits)
    if not difference <= MERGE_BOUND * max(largest, 1.0):
        raise ConversionError(
            f"merged weights give other logits than the adapters: they differ by {difference:.2g}, the largest is "
            f"{largest:.2g}; nothing was written"
        )
    return {"largest_logit_difference": difference, "largest_logit": largest}


def adapters_of(source: Path) -> tuple[Path, RunConfig]:
    """The newest checkpoint with adapters below a folder, and its run's config.

    Raises:
        ConversionError: It has none.
        CheckpointError: It is not in its stage's folder.
    """
    folder = find_checkpoint(source)
    run = adapter_run(folder)
    if run is None:
        raise ConversionError(f"{folder} has no adapters: it is a whole model already, and exports as it is")
    return folder, run


@contextmanager
def adapted_model(folder: Path, run: RunConfig, dtype: torch.dtype, base: Path | None) -> Iterator[NemotronVL]:
    """The model with its trained parameters, in one process; base weights stay initial ones without a base."""
    with single_process_model(run.model, dtype) as model:
        if base is not None:
            sealed.load(base, model=model)
        add_adapters(model, run.adapter, model.layout, seed=run.trainer.seed)
        model.freeze(train=run.trainer.train)
        sealed.load(folder, model=TrainedWeights(model))
        yield model.eval()


def name_of_base(folder: Path, base: Path | None) -> str:
    """What the base of a checkpoint says about where it came from: the imported folder, or its stage's last step."""
    if base is not None:
        state = json.loads((base / "state.json").read_text(encoding="utf-8"))
        return str(state.get("source", base.name))
    return Path(json.loads((folder / "state.json").read_text(encoding="utf-8"))["parent"]).name
