"""Checkpoints of adapters on their way out: merged into their base, or alone in the layout of the `peft` library."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from nemovl_train.checkpoint.base import parent_of
from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.carried import FOLDER as CARRIED
from nemovl_train.convert.checkpoints import copy_tokenizer, in_formats, refuse_existing, save_as_checkpoint
from nemovl_train.convert.disk import explain_writes
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.mapping import to_hf
from nemovl_train.convert.merging import adapted_model, adapters_of, name_of_base, open_merged
from nemovl_train.convert.names import kind_of, table
from nemovl_train.exceptions import CheckpointError, ConversionError
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.lora import adapters
from nemovl_train.model.vlm import ATTRIBUTES, NemotronVL

log = logging.getLogger(__name__)

_PEFT_REFUSES = "out_proj"
"""Layer of Nemotron-H models that peft 0.21 takes no adapter on (`_check_lora_target_modules_mamba`)."""
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def merge_checkpoint(
    source: Path, out: Path, *, base: Path | None = None, dtype: str | None = None, logits: bool = False
) -> dict[str, Any]:
    """Merge adapters into their base: a checkpoint that training, evaluation and export take like an imported one.

    One layer is in memory at a time (`merging.py`): its sum is made in float32, compared with what the adapter
    computes, and rounded once, to the format of the result.

    Args:
        source: Checkpoint, stage or run folder of a run with adapters.
        out: Folder to make.
        base: Where the base's checkpoint is now; None where it was when training started.
        dtype: `fp32` or `bf16`; None takes that of the run.
        logits: First compare logits of the model with adapters and of the merged one, on text and, where the model
            sees, on text around two tiles. Both are held in memory in float32.

    Returns:
        `checkpoint` (its folder), `layers` and `largest_difference` of the comparison, as a share of the layer's
        largest output; with `logits` also `largest_logit_difference` and `largest_logit`.

    Raises:
        ConversionError: `out` exists, there are no adapters, the base is not the one that was trained on, or the merged
            weights compute something else.
    """
    refuse_existing(out)
    work = out.with_name(f".{out.name}.partial")
    with _checkpoint_errors(), explain_writes(out.parent):
        try:
            shutil.rmtree(work, ignore_errors=True)  # left by a merge that was killed
            work.mkdir(parents=True)
            merged = open_merged(source, base, logits=logits)
            path = save_as_checkpoint(
                merged.info.config,
                merged.tensors,
                work,
                dtype=DTYPES[dtype or merged.run.precision.params],
                origin=merged.origin(),
            )
            if merged.info.tokenizer:
                copy_tokenizer(merged.info.tokenizer, work)
            if "carried" in merged.info.export:
                shutil.copytree(merged.info.export["carried"].folder, work / CARRIED)
            work.rename(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return {"checkpoint": str(out / path.relative_to(work)), **merged.found}


def export_merged(
    source: Path,
    out: Path,
    *,
    base: Path | None = None,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    logits: bool = False,
    **options: Any,
) -> Path:
    """Export a run with adapters as the folder of its merged weights; nothing else is written on the way.

    Args:
        source: As for `merge_checkpoint`.
        out: Folder to make.
        base: As for `merge_checkpoint`.
        tokenizer: Folder with tokenizer.json; None takes the run's own.
        dtype: `fp32` or `bf16`; None takes that of the run.
        logits: As for `merge_checkpoint`.
        **options: `overwrite` and `fp8` of `export_checkpoint`.

    Raises:
        ConversionError: As `merge_checkpoint` and `export_checkpoint`.
    """
    with _checkpoint_errors():
        merged = open_merged(source, base, logits=logits)
        tokenizer = tokenizer or merged.info.tokenizer
        kind = kind_of(merged.info.config)
        if kind != "vision" and tokenizer is None:
            raise ConversionError(f"{source} names no tokenizer; give its folder with --tokenizer DIR")
        entries = {entry.ours: entry for entry in table(merged.info.config, kind)}
        return export_canonical(
            in_formats(merged.tensors, entries, DTYPES[dtype or merged.run.precision.params]),
            merged.info.config,
            out,
            kind=kind,
            tokenizer=tokenizer,
            card=merged.info.facts,
            identity=merged.identity,
            found=merged.found,
            dtype=None if dtype is None else DTYPES[dtype],
            **merged.info.export,
            **options,
        )


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
    with _checkpoint_errors():
        folder, run = adapters_of(source)
    if not run.adapter.targets.language:
        raise ConversionError(f"{source}: the language model has no adapters; merge the others with --merge")
    with _checkpoint_errors(), adapted_model(folder, run, DTYPES[run.precision.params], None) as model:
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
        "base_model_name_or_path": name_of_base(folder, parent_of(folder)),
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


@contextmanager
def _checkpoint_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
