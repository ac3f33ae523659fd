"""Builds the demo: a tokenizer and nine datasets with true labels, the same bytes on every run."""

import hashlib
import json
import logging
import math
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipelines import shards
from data_pipelines.demo import (
    chart_qa,
    digits_count,
    digits_read,
    image_pair,
    long_facts,
    ocr_line,
    python_code,
    text,
    video_clip,
)
from data_pipelines.demo.keyed import HELDOUT, SPLITS, TRAIN
from data_pipelines.demo.records import Sample
from data_pipelines.demo.stdlib_text import modules
from data_pipelines.demo.tokenizer import BASE_VOCAB, load, train_demo_tokenizer
from data_pipelines.exceptions import DataError
from data_pipelines.manifest import FORMAT_VERSION

logger = logging.getLogger(__name__)

RULES: dict[str, Any] = {
    "template": "nano_v2_vl",
    "tile_size": 64,
    "max_tiles": 6,
    "use_thumbnail": True,
    "video_fps": 2.0,
    "max_frames": 16,
}
"""What the tokens are counted with. A run must ask for the same (configs/data/tiny.yaml does)."""

RECORD = "demo.json"
TOKENIZER = "tokenizer"
_MIN_SAMPLES = 2
_PACKAGES = ("av", "matplotlib", "numpy", "pillow", "pyarrow", "scikit-learn", "tokenizers", "webdataset")
_LICENCES = {
    "digits": "scikit-learn digits (UCI optical recognition of handwritten digits), BSD-3-Clause",
    "code and prose": "Python standard library, PSF-2.0",
    "fonts": "DejaVu (inside matplotlib), Bitstream Vera licence",
    "everything else": "generated",
}


@dataclass(frozen=True)
class DemoSet:
    """One dataset of the demo.

    Attributes:
        generate: (seed, count, split) -> samples.
        train: Training samples at scale 1.
        heldout: Held-out samples at scale 1.
        measured: The generator also takes `measure`, which counts the tokens of a text.
    """

    generate: Callable[..., Iterator[Sample]]
    train: int
    heldout: int
    measured: bool = False

    def count(self, split: str, scale: float) -> int:
        """Samples of a split at a scale."""
        return max(_MIN_SAMPLES, round({TRAIN: self.train, HELDOUT: self.heldout}[split] * scale))


SETS = {
    digits_read.NAME: DemoSet(digits_read.generate, 3000, 300),
    digits_count.NAME: DemoSet(digits_count.generate, 1200, 150),
    ocr_line.NAME: DemoSet(ocr_line.generate, 1200, 150),
    chart_qa.NAME: DemoSet(chart_qa.generate, 1200, 150),
    image_pair.NAME: DemoSet(image_pair.generate, 1200, 150),
    video_clip.NAME: DemoSet(video_clip.generate, 400, 60),
    python_code.NAME: DemoSet(python_code.generate, 1200, 60, measured=True),
    long_facts.NAME: DemoSet(long_facts.generate, 150, 16, measured=True),
    text.NAME: DemoSet(text.generate, 3000, 150),
}


def make_demo(out: Path, *, seed: int = 1234, scale: float = 1.0) -> dict[str, Any]:
    """Builds the demo folder, or returns at once when it is there and complete.

    The work is done in a hidden folder beside `out` that takes its place at the end, so a build that was interrupted is
    never taken for a whole one and is simply made again.

    Args:
        out: Folder for `tokenizer/`, one folder per dataset (splits `train` and `heldout`) and `demo.json`.
        seed: Seed of every generator.
        scale: Factor on the number of samples.

    Returns:
        The content of `demo.json` (`inputs`, `datasets`, `files`, `licences`) and `reused`: nothing had to be built.

    Raises:
        DataError: `out` holds something else, the scale makes no sense, or the disk refuses.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise DataError(f"scale {scale} must be a positive number: 1 is the full demo, 0.1 a tenth of it")
    out = Path(out).resolve()
    inputs = _inputs(seed, scale)
    try:
        found = _complete(out, inputs)
        if found is not None:
            return {**found, "reused": True}
        _check_ours(out)
        record = _build_and_publish(out, inputs, seed, scale)
    except OSError as error:
        raise DataError(
            f"cannot write the demo to {out} ({error.strerror}); free space, or choose another folder with --out"
        ) from error
    return {**record, "reused": False}


def _build_and_publish(out: Path, inputs: dict[str, Any], seed: int, scale: float) -> dict[str, Any]:
    work = out.with_name(f".{out.name}.building")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        record = _build(work, inputs, seed, scale)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # a failed build must not keep the disk full
    return record


def _build(work: Path, inputs: dict[str, Any], seed: int, scale: float) -> dict[str, Any]:
    train_demo_tokenizer(work / TOKENIZER)
    tokenizer = load(work / TOKENIZER)

    def measure(content: str) -> int:
        return len(tokenizer.encode(content, add_special_tokens=False).ids)

    datasets = {}
    for name, demo_set in SETS.items():
        generate = partial(demo_set.generate, measure=measure) if demo_set.measured else demo_set.generate
        samples = {split: generate(seed, demo_set.count(split, scale), split) for split in SPLITS}
        shards.write_dataset(work / name, samples, name=name, tokenizer=work / TOKENIZER, **RULES)
        info = json.loads((work / name / "dataset.json").read_text(encoding="utf-8"))
        datasets[name] = {split: _summary(info["splits"][split]) for split in SPLITS}
        logger.info("demo: %s written (%d samples)", name, sum(s["samples"] for s in datasets[name].values()))
    paths = sorted(path for path in work.rglob("*") if path.is_file())
    files = {path.relative_to(work).as_posix(): path.stat().st_size for path in paths}
    record = {"inputs": inputs, "datasets": datasets, "files": files, "licences": _LICENCES}
    (work / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _summary(counts: Mapping[str, Any]) -> dict[str, float]:
    samples = counts["samples"]
    means = {
        "mean_tokens": "total_tokens",
        "mean_supervised_tokens": "supervised_tokens",
        "mean_tiles": "tiles",
    }
    return {"samples": samples, **{name: round(counts[key] / samples, 2) for name, key in means.items()}}


def _inputs(seed: int, scale: float) -> dict[str, Any]:
    """Everything the bytes depend on: when it is the same, so is the demo."""
    own = sorted(Path(__file__).parent.glob("*.py"))
    return {
        "seed": seed,
        "scale": float(scale),
        "base_vocab": BASE_VOCAB,
        "rules": RULES,
        "dataset_format": FORMAT_VERSION,
        "generators": _digest(path.read_text(encoding="utf-8") for path in own),
        "python": platform.python_version(),
        "standard_library": _digest(modules().values()),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def _digest(texts: Iterable[str]) -> str:
    sha = hashlib.sha256()
    for content in texts:
        sha.update(hashlib.sha256(content.encode()).digest())
    return sha.hexdigest()


def _complete(out: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a folder made from the same inputs whose files are all there; None otherwise."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        sizes = {name: (out / name).stat().st_size for name in record["files"]}
        return record if record["inputs"] == inputs and record["files"] == sizes else None
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, AttributeError, ValueError):
        return None


def _check_ours(out: Path) -> None:
    """A demo is replaced as a whole, so the folder must hold nothing that a demo does not."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file; choose a folder with --out")
    strange = sorted({path.name for path in out.iterdir()} - {*SETS, TOKENIZER, RECORD})
    if strange:
        raise DataError(
            f"{out} holds {', '.join(strange[:5])}, which no demo has, and would be replaced: choose another --out"
        )
