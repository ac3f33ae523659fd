"""A schedule of two stages of four steps over the mini model, as recipe files."""

from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml
from tiny_runs import BASE_VOCAB, MODEL, RULES, write_tokenizer

from nemovl_train.config.compose import compose_schedule
from nemovl_train.config.schema import ScheduleConfig
from nemovl_train.convert.checkpoints import canonical_state, single_process_model
from nemovl_train.convert.hf_export import export_canonical

GROUPS = ("model", "data", "optim", "precision", "trainer", "checkpoint")
STAGES = {"first": ("pictures", ["projector"]), "second": ("text", ["vision", "projector", "language"])}


def write_parts(root: Path) -> Path:
    """`language_hf` and `vision_hf`, with random weights."""
    text_only = replace(MODEL.language, vocab_size=BASE_VOCAB)
    tokenizer = write_tokenizer(root / "tokenizer", tags=())
    for kind, config in (
        ("language", replace(MODEL, parts=("language",), language=text_only)),
        ("vision", replace(MODEL, parts=("vision",))),
    ):
        with single_process_model(config, torch.float32, seed=3) as model:
            out, owner = root / f"{kind}_hf", tokenizer if kind == "language" else None
            export_canonical(canonical_state(model).items(), config, out, kind=kind, tokenizer=owner, card={})
    return root


def write_recipes(
    folder: Path,
    data: Path,
    parts: Path,
    *,
    steps: int = 4,
    export: bool = False,
    stages: dict[str, tuple[str, list[str]]] = STAGES,
    heldout: bool = False,
) -> Path:
    """Recipe files of the stages and of the schedule; returns the schedule's."""
    folder.mkdir(parents=True, exist_ok=True)
    model = yaml.safe_load(yaml.safe_dump(_plain(asdict(MODEL))))
    for name, (source, train) in stages.items():
        stage = {
            "defaults": [*({f"/{g}": _option(g)} for g in GROUPS), {"/parallel": "single"}, {"/logging": "local"}],
            "run": {"stage": name},
            "model": model,
            "data": {
                **RULES,
                "tokenizer": str(data / "tokenizer"),
                "seq_length": 128,
                "window_samples": 16,
                "sources": {source: {"path": str(data / source)}},
            },
            "optim": {"lr": 3e-3},
            "trainer": {"steps": steps, "global_batch": 2, "train": train},
            "checkpoint": {"every_steps": 2, "nodes_at_once": 1},
        }
        stage["defaults"].append("_self_")
        if heldout:
            sets = {"sources": {source: str(data / source)}, "seq_length": 256, "max_samples": 4, "predictions": 1}
            stage["evaluation"] = sets
        _write(folder / f"{name}.yaml", stage)
    schedule = {
        "defaults": [{"/model": "tiny"}, "_self_"],
        "run": {"name": "chain", "stage": "schedule"},
        "model": model,
        "parts": {"language": str(parts / "language_hf"), "vision": str(parts / "vision_hf"), "make": "none"},
        "stages": [{"recipe": str(folder / f"{name}.yaml")} for name in stages],
        "export": export,
    }
    _write(folder / "schedule.yaml", schedule)
    return folder / "schedule.yaml"


def compose(recipe: Path, root: Path) -> ScheduleConfig:
    return compose_schedule(str(recipe), values={"run.root": str(root)})


def _option(group: str) -> str:
    return {"optim": "adamw", "precision": "fp32"}.get(group, "tiny")


def _plain(values):
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return [_plain(value) for value in values] if isinstance(values, tuple | list) else values


def _write(path: Path, content: dict) -> None:
    path.write_text("# @package _global_\n# Made for a test.\n" + yaml.safe_dump(content, sort_keys=False))
