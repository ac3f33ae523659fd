"""What a chain starts from: two pretrained parts in Hugging Face layout, imported and joined into one checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from data_pipelines.config import SourceConfig
from data_pipelines.demo.make import make_demo
from data_pipelines.demo.tokenizer import base_tokenizer
from data_pipelines.loader import heldout_packs
from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.files import replace_text
from nemovl_train.config.compose import compose_run, compose_stage
from nemovl_train.config.schema import ScheduleConfig
from nemovl_train.convert.checkpoints import (
    canonical_state,
    export_checkpoint,
    save_as_checkpoint,
    single_process_model,
)
from nemovl_train.convert.hf_export import export_canonical
from nemovl_train.convert.hf_import import join_parts
from nemovl_train.exceptions import ConfigError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.schedule.tiny_tower import pretrain_tower
from nemovl_train.training import trainer
from nemovl_train.training.folder import StageFolder

log = logging.getLogger(__name__)

TOWER_SOURCES = ("digits_read", "digits_count", "ocr_line", "chart_qa", "image_pair")
PICTURES_PER_SOURCE = 1000


def joined_checkpoint(root: Path) -> Path:
    """Checkpoint with the joined weights, the parent of the first stage."""
    return sealed.step_folder(_joined(root) / "checkpoints", 0)


def _joined(root: Path) -> Path:
    return root / "parts" / "joined"


def prepare_parts(config: ScheduleConfig, root: Path) -> ExitCode:
    """Make what is missing and join the parts into `joined_checkpoint`. For one process.

    Args:
        config: The schedule.
        root: Its run folder.

    Returns:
        `ExitCode.OK`, or `ExitCode.REQUEUE` when the language model's pretraining was asked to stop.
    """
    if sealed.latest(joined_checkpoint(root).parent) is not None:
        return ExitCode.OK
    if config.parts.make == "tiny":
        make_demo(root / "data", seed=config.seed)
        code = _make_language(config, root)
        if code != ExitCode.OK:
            return code
        _make_vision(config, root)
        language, vision = root / "parts" / "language_hf", root / "parts" / "vision_hf"
    else:
        language, vision = Path(config.parts.language), Path(config.parts.vision)
        for key, path in (("parts.language", language), ("parts.vision", vision)):
            if not (path / "config.json").is_file():
                raise ConfigError([f"{key}={str(path)!r} is not a Hugging Face folder: config.json is missing"])
    _join(config, language, vision, _joined(root))
    return ExitCode.OK


def _join(config: ScheduleConfig, language: Path, vision: Path, out: Path) -> None:
    """One checkpoint from both parts; the projector, which neither has, keeps its initial weights."""
    shutil.rmtree(out, ignore_errors=True)  # an import that was cut off left no checkpoint
    save_as_checkpoint(
        config.model,
        join_parts(language, vision, config=config.model),
        out,
        dtype=torch.float32,
        origin={"source": f"{language.name} + {vision.name}"},
        may_lack=("projector",),
        seed=config.seed,
    )


def _make_language(config: ScheduleConfig, root: Path) -> ExitCode:
    """Pretrain the text-only language model with the ordinary trainer and write it as a Hugging Face folder."""
    out = root / "parts" / "language_hf"
    if out.exists():
        return ExitCode.OK
    values = {"run.root": config.run.root, "run.name": config.run.name, "trainer.seed": config.seed}
    run = compose_run("tiny/parts/language", values=values)
    code = trainer.run(run)
    if code != ExitCode.OK:
        return code
    base_tokenizer(root / "data" / "tokenizer", root / "parts" / "tokenizer")
    export_checkpoint(StageFolder.of(run).last_checkpoint, out, tokenizer=root / "parts" / "tokenizer")
    return ExitCode.OK


def _make_vision(config: ScheduleConfig, root: Path) -> None:
    """Pretrain the tower on unlabelled pictures and write it as a Hugging Face folder."""
    out = root / "parts" / "vision_hf"
    if out.exists():
        return
    model_config = replace(config.model, parts=("vision",))
    pictures = _pictures(config, root)
    with single_process_model(model_config, torch.float32, seed=config.seed) as model:
        assert model.vision_model is not None
        losses = pretrain_tower(model.vision_model, pictures, seed=config.seed)
        log.info("tower pretrained: squared error %.3f of the pixels' variance", losses[-1])
        _write_losses(root / "parts" / "vision_pretrain", losses)
        facts = {"data": list(TOWER_SOURCES), "objective": "reconstruction of hidden patches; no labels"}
        export_canonical(canonical_state(model).items(), model_config, out, kind="vision", tokenizer=None, card=facts)


def _write_losses(folder: Path, losses: list[float]) -> None:
    """The curve, for the report. Written at the end: this pretraining is short and starts anew after a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, start=1)]
    replace_text(folder / "metrics.jsonl", "".join(f"{row}\n" for row in rows))


def _pictures(config: ScheduleConfig, root: Path) -> torch.Tensor:
    """Tiles of the training splits under the first stage's media rules, [T, 3, P, P] uint8."""
    rules = compose_stage(config, config.stages[0]).data
    sources = {name: SourceConfig(path=str(root / "data" / name)) for name in TOWER_SOURCES}
    data = replace(rules, sources=sources, packing="sequential")
    tokens_per_tile = config.model.tokens_per_tile
    packs = heldout_packs(data, tokens_per_tile=tokens_per_tile, split="train", max_samples=PICTURES_PER_SOURCE)
    return torch.cat([pack.tiles for pack in packs])
