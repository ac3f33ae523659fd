"""A folder of the 12B model's width, imported and exported again: time, memory, bytes, bitwise equality.

    python benchmarks/convert.py --layers 62 --work DIR --out FILE

Makes a folder of random bfloat16 weights in the released layout (first N of the 62 layers, everything else whole,
shards of 5 GB), then runs `nemovl convert import` and `export` as processes of their own and reads every exported
tensor back with the safetensors library. The made folder is deleted after the import, so DIR needs room for two
copies: 4.4 GB and 0.35 GB a layer each. Memory is the sum over the command's processes of resident sets, sampled every
20 ms, and the largest process's own high-water mark.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.hf_config import write_config
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.lazy import Spec, Tensors
from nemovl_train.convert.names import Precision, table
from nemovl_train.convert.tensor_files import plan_shards, raw_bytes, write_index, write_shard

SAMPLE_S = 0.02
BLOCK = 1 << 26
GIB = 2**30


def main() -> None:
    """Make, import, export, compare; write the numbers with date, machine and command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=62, help="layers of the language model (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for made weights")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"python benchmarks/convert.py --layers {args.layers}",
        "machine": f"{psutil.cpu_count()} CPUs, {psutil.virtual_memory().total / GIB:.0f} GiB, {platform.machine()}",
        "versions": {p: version(p) for p in ("torch", "megatron-core", "safetensors")}
        | {"python": platform.python_version()},
        "load": psutil.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory(dir=args.work, prefix="nemovl_convert_") as folder:
        result = {**about, "result": measure(args.layers, Path(folder)), "load_at_end": psutil.getloadavg()[0]}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(layers: int, work: Path) -> dict[str, Any]:
    """One round trip.

    Args:
        layers: Layers of the language model.
        work: Empty folder.
    """
    hf, checkpoint, again = work / "hf", work / "checkpoint", work / "again"
    started = time.monotonic()
    hashes = make_folder(layers, hf)
    made = {"layers": layers, "tensors": len(hashes), "shards": len(list(hf.glob("*.safetensors")))}
    size = sum(p.stat().st_size for p in hf.iterdir())
    made |= {"bytes": size, "seconds": round(time.monotonic() - started, 1)}
    imported = command("import", hf, checkpoint)
    shutil.rmtree(hf)
    exported = command("export", checkpoint, again)
    started = time.monotonic()
    strict = HFFolder(again)  # names, shapes and formats against the config
    found = {}
    for file in sorted(again.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                found[name] = hashlib.sha256(raw_bytes(tensors.get_tensor(name))).hexdigest()
    return {
        "made": made,
        "import": imported,
        "export": exported,
        "read_back_seconds": round(time.monotonic() - started, 1),
        "strict_inventory": sorted(strict.files.specs) == sorted(hashes),
        "tensors_equal_bitwise": sum(found.get(name) == value for name, value in hashes.items()),
        "all_equal": found == hashes,
    }


def make_folder(layers: int, out: Path) -> dict[str, str]:
    """Write a folder of random weights in the released layout.

    Args:
        layers: Layers of the language model.
        out: New folder.

    Returns:
        SHA-256 of every tensor.
    """
    released = ModelConfig()
    pattern = released.language.hybrid_pattern[:layers]
    config = replace(released, language=replace(released.language, hybrid_pattern=pattern))
    specs = {}
    for entry in table(config, "vlm"):
        dtype = torch.float32 if entry.precision is Precision.STATE else torch.bfloat16
        specs |= {name: Spec(shape, dtype) for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
    for name in ("norm_mean", "norm_std"):
        specs[f"vision_model.radio_model.input_conditioner.{name}"] = Spec((3, 1, 1), torch.float32)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def read(name: str) -> torch.Tensor:
        # A place of its own in one random block: tensors differ, and nothing slow is drawn for each.
        first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % BLOCK
        spec = specs[name]
        turned = torch.cat([block[first:], block[:first]])
        values = turned.repeat(-(-spec.count // BLOCK))[: spec.count]
        return values.to(spec.dtype).view(spec.shape).contiguous()

    out.mkdir()
    tensors, shards = Tensors(specs, read), plan_shards(specs)
    hashes: dict[str, str] = {}
    for file, names in shards.items():
        hashes |= write_shard(out / file, names, tensors).tensors
    write_index(out, shards, specs)
    write_config(config, out, kind="vlm", dtype="bfloat16")
    return hashes


def command(verb: str, source: Path, out: Path) -> dict[str, Any]:
    """Run one conversion and watch its memory.

    Args:
        verb: `import` or `export`.
        source: Its input.
        out: Its output.

    Returns:
        Seconds, bytes of the output, GiB of the peaks.
    """
    line = [sys.executable, "-m", "nemovl_train.cli", "convert", verb, str(source), "--out", str(out)]
    if verb == "export":
        line += ["--tokenizer", str(_tokenizer(out.parent / "tokenizer"))]
    started, peak, own = time.monotonic(), 0, 0
    process = psutil.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            members = [process, *process.children(recursive=True)]
            peak = max(peak, sum(m.memory_info().rss for m in members))
            own = max(own, _high_water(process.pid))
        except (psutil.Error, OSError):
            pass  # it ended between two looks
        time.sleep(SAMPLE_S)
    if process.returncode != 0:
        sys.exit(f"nemovl convert {verb} ended with {process.returncode}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "bytes": sum(p.stat().st_size for p in out.rglob("*") if p.is_file()),
        "peak_resident_gib_all_processes": round(peak / GIB, 2),
        "high_water_gib_largest_process": round(own / GIB, 2),
    }


def _high_water(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _tokenizer(folder: Path) -> Path:
    """An export of a language model wants a tokenizer; what is in it does not matter here."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    return folder


if __name__ == "__main__":
    main()
