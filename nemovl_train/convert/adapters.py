"""Checkpoints of adapters on their way out: merged into their base, or alone in the layout of the `peft` library."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemovl_train.checkpoint import saving, sealed
from nemovl_train.checkpoint.base import adapter_run, base_of
from nemovl_train.config.schema import ModelConfig, RunConfig
from nemovl_train.convert.checkpoints import (
    CHECKPOINTS,
    copy_tokenizer,
    describe_checkpoint,
    export_checkpoint,
    find_checkpoint,
    refuse_existing,
    single_process_model,
)
from nemovl_train.convert.disk import explain_writes
from nemovl_train.convert.mapping import dtype_name, to_hf
from nemovl_train.convert.names import kind_of, table
from nemovl_train.convert.ours_check import compute
from nemovl_train.convert.probe import make_probe
from nemovl_train.exceptions import CheckpointError, ConversionError
from nemovl_train.model.adapters import TrainedWeights, add_adapters, merge_adapters
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.lora import adapters
from nemovl_train.model.vlm import ATTRIBUTES, NemotronVL

log = logging.getLogger(__name__)

MERGE_BOUND = 1e-5
"""Largest difference of float32 logits between adapters and merged weights, as a share of the largest logit."""

_STAYS_FLOAT32 = ("A_log", "D")
_PEFT_REFUSES = "out_proj"
"""Layer of Nemotron-H models that peft 0.21 takes no adapter on (`_check_lora_target_modules_mamba`)."""
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def merge_checkpoint(source: Path, out: Path, *, base: Path | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Merge adapters into their base: a checkpoint that training, evaluation and export take like an imported one.

    The sums are made in float32 and rounded once, to the format of the result. Before that, logits of the model with
    adapters and of the merged weights are compared on text and, where the model sees, on text around two tiles.

    Args:
        source: Checkpoint, stage or run folder of a run with adapters.
        out: Folder to make.
        base: Where the base's checkpoint is now; None where it was when training started.
        dtype: `fp32` or `bf16`; None takes that of the run.

    Returns:
        `checkpoint` (its folder), `largest_difference` and `largest_logit` of the comparison.

    Raises:
        ConversionError: `out` exists, there are no adapters, the base is not the one that was trained on, or the merged
            weights give other logits.
    """
    refuse_existing(out)
    folder, run = _adapters_of(source)
    wanted = DTYPES[dtype or run.precision.params]
    work = out.with_name(f".{out.name}.partial")
    with _checkpoint_errors(), explain_writes(out.parent):
        try:
            shutil.rmtree(work, ignore_errors=True)  # left by a merge that was killed
            (work / CHECKPOINTS).mkdir(parents=True)
            with _adapted_model(folder, run, torch.float32, base_of(folder, base)) as model:
                found = _merge_checked(model, run.model)
                _convert(model, wanted)
                state = _state(run, folder, base_of(folder, base), wanted, found)
                path = saving.save(
                    work / CHECKPOINTS, 0, model=model, optimizer=None, state=state, run_id=f"merge/{run.model.name}"
                )
            if run.data.tokenizer:
                copy_tokenizer(Path(run.data.tokenizer), work)
            work.rename(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return {"checkpoint": str(out / path.relative_to(work)), **found}


def export_merged(source: Path, out: Path, *, base: Path | None = None, **options: Any) -> Path:
    """Merge adapters beside `out` and export the result, with the options of `export_checkpoint`.

    Raises:
        ConversionError: As `merge_checkpoint` and `export_checkpoint`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.merged.") as folder:
        merged = Path(folder) / "merged"
        merge_checkpoint(source, merged, base=base, dtype=options.get("dtype"))
        return export_checkpoint(merged, out, **options)


def export_adapters(source: Path, out: Path) -> dict[str, Any]:
    """Write the language model's adapters as a folder that the `peft` library and vLLM read.

    Module names are those of Transformers' own classes. The fused projection of queries, keys and values becomes three
    layers with one first matrix and each its rows of the second.

    Args:
        source: Checkpoint, stage or run folder of a run with adapters.
        out: Folder to make.

    Returns:
        `folder`, `layers` (number of adapted layers) and `left_out` (parts that trained and are not in the folder).

    Raises:
        ConversionError: `out` exists, or the language model has no adapters.
    """
    refuse_existing(out)
    folder, run = _adapters_of(source)
    if not run.adapter.targets.language:
        raise ConversionError(f"{source}: the language model has no adapters; merge the others with --merge")
    with _checkpoint_errors(), _adapted_model(folder, run, DTYPES[run.precision.params], None) as model:
        tensors = peft_tensors(model, run.model)
    left_out = [part for part in ("vision", "projector") if getattr(run.adapter.targets, part)]
    left_out += [part for part in run.trainer.train if part not in left_out]
    if left_out:
        log.warning("%s: %s trained as well and is not in this folder; --merge keeps it", out, ", ".join(left_out))
    if any(name.endswith(f"{_PEFT_REFUSES}.lora_A.weight") for name in tensors):
        log.warning(
            "%s: peft opens no adapters on a Mamba layer's %s (Transformers' fused kernel would pass them by); use "
            "--merge, or train without that layer",
            *(out, _PEFT_REFUSES),
        )
    modules = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_of_name(folder),
        "r": run.adapter.rank,
        "lora_alpha": run.adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": modules,
    }
    with explain_writes(out.parent):
        work = out.with_name(f".{out.name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_file(tensors, str(work / _ADAPTER_WEIGHTS), metadata={"format": "pt"})
        (work / _ADAPTER_CONFIG).write_text(json.dumps(options, indent=1) + "\n", encoding="utf-8")
        work.rename(out)
    return {"folder": str(out), "layers": len(modules), "left_out": left_out}


def peft_tensors(model: NemotronVL, config: ModelConfig) -> dict[str, Tensor]:
    """Names and tensors of the language model's adapters in `peft`'s layout, from a one-process model."""
    entries = {entry.ours: entry for entry in table(config, kind_of(config))}
    found = {}
    for name, pair in adapters(model):
        if not name.startswith(ATTRIBUTES["language"]):
            continue
        entry = entries[f"{name.rpartition('.')[0]}.weight"]
        # Rows of the second matrix are the weight's rows: the table's rule takes them apart as it does the weight's.
        for theirs, rows in zip(entry.hf, to_hf(entry, pair.lora_b.detach()), strict=True):
            module = theirs.removesuffix(".weight").replace("backbone.", "model.", 1)
            found[f"base_model.model.{module}.lora_A.weight"] = pair.lora_a.detach().clone().cpu()
            found[f"base_model.model.{module}.lora_B.weight"] = rows.clone().contiguous().cpu()
    return found


def base_of_name(folder: Path) -> str:
    """What the base says about where it came from: the name of the imported folder, or its stage and step."""
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    parent = Path(state["parent"])
    if (parent / "state.json").is_file():
        return str(json.loads((parent / "state.json").read_text(encoding="utf-8")).get("source", parent.name))
    return parent.name


def _adapters_of(source: Path) -> tuple[Path, RunConfig]:
    folder = find_checkpoint(source)
    run = adapter_run(folder)
    if run is None:
        raise ConversionError(f"{folder} has no adapters: it is a whole model already, and exports as it is")
    return folder, run


@contextmanager
def _adapted_model(folder: Path, run: RunConfig, dtype: torch.dtype, base: Path | None) -> Iterator[NemotronVL]:
    """The model with its trained parameters; base weights stay initial ones without a base."""
    with single_process_model(run.model, dtype) as model:
        if base is not None:
            sealed.load(base, model=model)
        add_adapters(model, run.adapter, model.layout, seed=run.trainer.seed)
        model.freeze(train=run.trainer.train)
        sealed.load(folder, model=TrainedWeights(model))
        yield model.eval()


@torch.no_grad()
def _merge_checked(model: NemotronVL, config: ModelConfig) -> dict[str, float]:
    probe = make_probe(config)
    before = compute(model, config, probe)
    merge_adapters(model)
    after = compute(model, config, probe)
    logits = [name for name in before if name.endswith("_logits")]
    largest = max(float(before[name].abs().max()) for name in logits)
    difference = max(float((before[name] - after[name]).abs().max()) for name in logits)
    if not difference <= MERGE_BOUND * max(largest, 1.0):
        raise ConversionError(
            f"merged weights give other logits than the adapters: they differ by {difference:.2g}, the largest is "
            f"{largest:.2g}; nothing was written"
        )
    return {"largest_difference": difference, "largest_logit": largest}


@torch.no_grad()
def _convert(model: NemotronVL, dtype: torch.dtype) -> None:
    """Parameters to another format in place, one after the other, so that no second model is in memory."""
    for name, parameter in model.named_parameters():
        if not name.endswith(_STAYS_FLOAT32):
            parameter.data = parameter.data.to(dtype)


def _state(run: RunConfig, folder: Path, base: Path, dtype: torch.dtype, found: dict[str, float]) -> dict[str, Any]:
    """As an imported checkpoint's: sizes, format, and what the base's folder had that is no parameter."""
    imported = json.loads((base / "state.json").read_text(encoding="utf-8"))
    kept = {key: imported[key] for key in ("constants", "state_dtype") if key in imported}
    info = describe_checkpoint(folder)
    targets = {part: list(patterns) for part, patterns in asdict(run.adapter.targets).items() if patterns}
    facts = {
        **info.facts,
        "adapters": {"rank": run.adapter.rank, "alpha": run.adapter.alpha, "targets": targets},
        "merged": found,
    }
    return {
        "model": asdict(run.model),
        "dtype": dtype_name(dtype),
        "source": base_of_name(folder),
        "media": asdict(info.export["media"]),
        "facts": facts,
        **kept,
    }


@contextmanager
def _checkpoint_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
