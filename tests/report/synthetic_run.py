"""A run folder as a five-stage schedule leaves it, made of numbers instead of training."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

STAGES = (
    ("stage0_projector_warmup", 256, 160, 4.9, 2.1, ["projector"]),
    ("stage1_sft_16k", 256, 420, 3.2, 0.62, ["vision", "projector", "language"]),
    ("stage2_video_sft_49k", 768, 140, 1.4, 0.55, ["vision", "projector", "language"]),
    ("stage3_code_recovery_49k", 768, 110, 2.6, 1.7, ["language"]),
    ("stage4_long_context_300k", 4864, 40, 1.9, 1.2, ["language"]),
)
SOURCES = {
    "digits_read": [0.11, 0.86, 0.87, 0.81, 0.83],
    "digits_count": [0.09, 0.31, 0.34, 0.33, 0.33],
    "ocr_line": [0.0, 0.22, 0.25, 0.2, 0.19],
    "video_clip": [0.14, 0.2, 0.71, 0.66, 0.68],
    "python_code": [None] * 5,
}
HOSTILE = '<script>alert("x")</script> & <img src=http://evil.example/x.png onerror=alert(1)>'


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(num_steps: int, seq_length: int, first: float, last: float) -> list[dict[str, Any]]:
    """Rows of a stage whose loss falls from `first` to `last`."""
    rng, rows, seen = random.Random(seq_length + num_steps), [], 0
    for step in range(1, num_steps + 1):
        share = step / num_steps
        fill = rng.uniform(0.9, 0.999)
        tokens = int(8 * seq_length * fill)
        seen += tokens
        decay = math.exp(-5 * share)
        lr = 1e-3 * min(1.0, step / (0.1 * num_steps)) * 0.5 * (1 + math.cos(math.pi * share))
        rows.append(
            {
                "step": step,
                "loss": (last + (first - last) * decay) * rng.lognormvariate(0, 0.08),
                "grad_norm": (0.5 + 4 * decay) * rng.lognormvariate(0, 0.3),
                "lr": lr,
                "applied": True,
                "tokens": tokens,
                "supervised_tokens": tokens // 4,
                "visual_tokens": tokens // 3,
                "samples": 30,
                "tiles": 40,
                "fill": fill,
                "tokens_per_second": 9000 * rng.lognormvariate(0, 0.06),
                "step_seconds": tokens / 9000,
                "data_seconds": 0.01,
                "tokens_seen": seen,
                "packs_consumed": 8 * step,
            }
        )
    return rows


def config(name: str, seq_length: int, num_steps: int, trained: list[str]) -> dict[str, Any]:
    return {
        "run": {"name": "demo", "stage": name, "root": "runs"},
        "data": {"seq_length": seq_length, "packing": "bfd", "sources": {"digits_read": {"path": "data/digits_read"}}},
        "optim": {"lr": 1e-3 if seq_length < 500 else 3e-4, "clip_grad": 1.0},
        "trainer": {"steps": num_steps, "global_batch": 8, "train": trained, "init_from": None},
    }


def digit_picture(path: Path, text: str, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (side, side), (18, 20, 26))
    ImageDraw.Draw(image).text((side // 3, side // 4), text, fill=(240, 240, 240))
    image.save(path)


def predictions(folder: Path, stage: int) -> list[dict[str, Any]]:
    rows = []
    for index in range(4):
        name = f"predictions/digit_{index}.png"
        digit_picture(folder / name, str(index + 3), 32)
        answer = str(index + 3) if (stage + index) % 3 else "8"
        rows.append(
            {
                "source": "digits_read",
                "key": f"digit-{index}",
                "question": HOSTILE if index == 1 else "Which digit is shown?",
                "reference": str(index + 3),
                "prediction": answer,
                "correct": answer == str(index + 3),
                "images": [name],
            }
        )
    frames = [f"predictions/frame_{index}.png" for index in range(6)]
    for index, frame in enumerate(frames):
        digit_picture(folder / frame, "*" * (index % 3 + 1), 64)
    rows.append(
        {
            "source": "video_clip",
            "key": "clip-1",
            "question": "Does the square move left or right?",
            "reference": "right",
            "prediction": "right" if stage > 1 else "left",
            "correct": stage > 1,
            "images": frames,
        }
    )
    rows.append(
        {
            "source": "long_facts",
            "key": "fact-1",
            "question": "The quick fox reads a book. " * 200 + "What colour is the door of house 12?",
            "reference": "green",
            "prediction": "",
            "correct": False,
            "images": [],
        }
    )
    return rows


def evaluation(stage: int) -> dict[str, Any]:
    sources = {
        name: {
            "loss": 2.5 - 1.2 * (scores[stage] or 0.1 * stage),
            "exact_match": scores[stage],
            "samples": 200,
            "supervised_tokens": 900,
        }
        for name, scores in SOURCES.items()
    }
    return {"step": 100, "seconds": 4.2, "sources": sources}


def events(start: float, num_steps: int, seconds: float, parent: str) -> list[dict[str, Any]]:
    return [
        {"time": start, "event": "start", "step": 0, "parent": parent, "resumed_from_step": 0},
        {"time": start + seconds, "event": "checkpoint", "step": num_steps, "folder": f"step_{num_steps:08d}"},
        {"time": start + seconds + 1, "event": "end", "step": num_steps},
    ]


def write_run(root: Path) -> Path:
    """Write `root/demo` with everything in it, and return it."""
    run, start, parent, entries = root / "demo", 1_790_000_000.0, "parts/joined/step_00000000", []
    for index, (name, seq_length, num_steps, first, last, trained) in enumerate(STAGES):
        folder = run / name
        rows = metrics(num_steps, seq_length, first, last)
        write_lines(folder / "metrics.jsonl", rows)
        seconds = sum(row["step_seconds"] for row in rows)
        write_lines(folder / "events.jsonl", events(start, num_steps, seconds, parent))
        write_json(folder / "evaluation.json", evaluation(index))
        write_json(folder / "predictions.json", predictions(folder, index))
        options = config(name, seq_length, num_steps, trained)
        (folder / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        checkpoint = f"{name}/checkpoints/step_{num_steps:08d}"
        write_json(run / checkpoint / "state.json", {"step": num_steps})
        (run / checkpoint / "COMPLETE").touch()
        entries.append(
            {"name": name, "recipe": f"tiny/{name}", "state": "done", "parent": parent, "checkpoint": checkpoint}
        )
        parent, start = checkpoint, start + seconds + 6
    for part, loss in (("language", 5.6), ("vision", 3.1)):
        write_lines(run / "parts" / part / "metrics.jsonl", metrics(120, 300, loss, loss / 2))
        write_lines(run / "parts" / part / "events.jsonl", events(1_790_000_000.0 - 90, 120, 30, ""))
    write_json(run / "schedule.json", {"format_version": 1, "stages": entries})
    write_json(run / "environment.json", {"python": "3.12.11", "torch": "2.11.0", "git": {"commit": "7ed4cc2"}})
    write_json(
        run / "hf" / "verification.json",
        {
            "ok": False,
            "command": "nemovl convert verify runs/demo/hf",
            "date": "2026-11-22",
            "versions": {"transformers": "5.23.0", "torch": "2.11.0"},
            "parameters": 1234567,
            "checks": [
                {"name": "inventory", "ok": True, "detail": {"number format": "float32"}},
                {"name": "files", "ok": True, "detail": {}},
                {
                    "name": "logits",
                    "ok": False,
                    "detail": {"largest difference": {"text": 3.1e-6, "text + two tiles": 2.4e-5}},
                },
            ],
        },
    )
    return run
