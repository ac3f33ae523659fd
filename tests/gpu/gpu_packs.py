"""Packs of random tokens and tiles for any model size, the measure of a difference, and quick Triton kernels."""

import importlib
import pkgutil

import numpy as np
import torch

from data_pipelines.schema import Pack
from nemovl_train.config.schema import ModelConfig


def random_pack(
    config: ModelConfig,
    *,
    lengths: tuple[int, ...],
    tiles: tuple[int, ...],
    seq_length: int,
    only: int | None = None,
    seed: int = 0,
) -> Pack:
    """Documents of given lengths, each starting with its tiles' image tokens; every other token is a target.

    Args:
        config: Sizes and token ids.
        lengths: Tokens of each document, image tokens included.
        tiles: Tiles of each document.
        seq_length: Tokens of the pack; what is left is a padding document.
        only: Keep this document alone, with the same tokens as in the whole pack.
        seed: Seed of tokens and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    per_tile, side = config.tokens_per_tile, config.vision.tile_size
    documents = []
    for length, count in zip(lengths, tiles, strict=True):
        ids = torch.randint(100, config.language.base_vocab_size, (length,), generator=generator)
        ids[: count * per_tile] = config.tokens.image
        pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        documents.append((ids, pixels))
    if only is not None:
        documents = [documents[only]]
    ids = torch.full((seq_length,), config.tokens.pad)
    labels = torch.full((seq_length,), -100)
    starts, begin = [], 0
    for doc, pixels in documents:
        end = begin + len(doc)
        ids[begin:end] = doc
        labels[begin : end - 1] = doc[1:].masked_fill(doc[1:] == config.tokens.image, -100)
        starts += [begin + i * per_tile for i in range(len(pixels))]
        begin = end
    sizes = [len(doc) for doc, _ in documents] + ([seq_length - begin] if begin < seq_length else [])
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    all_tiles = torch.cat([pixels for _, pixels in documents])
    supervised = int((labels >= 0).sum())
    return Pack(
        index=0,
        input_ids=ids,
        labels=labels,
        loss_weight=(labels >= 0).float() / max(1, supervised),
        position_ids=torch.cat([torch.arange(n) for n in sizes]),
        seq_idx=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).int(),
        cu_seqlens=torch.from_numpy(bounds),
        max_seqlen=max(sizes),
        tiles=all_tiles,
        tile_token_start=torch.tensor(starts, dtype=torch.int64),
        media_of_tile=torch.zeros(len(all_tiles), dtype=torch.int32),
        is_thumbnail=torch.zeros(len(all_tiles), dtype=torch.bool),
        frame_time=torch.full((len(all_tiles),), float("nan")),
        sample_keys=tuple(f"sample{i}" for i in range(len(documents))),
        dataset_ids=("random",) * len(documents),
        stats={
            "tokens": begin,
            "supervised_tokens": supervised,
            "visual_tokens": len(starts) * per_tile,
            "padding": seq_length - begin,
        },
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of the expectation, in float64."""
    found, expected = found.detach().double(), expected.detach().double().to(found.device)
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def one_configuration_per_kernel() -> None:
    """Leave Mamba's Triton kernels one of their about 200 configurations; results do not depend on the choice.

    The one with the smallest tiles and fewest stages fits every dtype's shared memory, and trying no other one saves
    minutes.
    """
    import mamba_ssm.ops.triton as kernels
    from triton.runtime.autotuner import Autotuner

    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = [min(kernel.configs, key=_size)]


def _size(config) -> tuple[int, int]:
    tile = 1
    for name, value in config.kwargs.items():
        tile *= value if name.startswith("BLOCK") else 1
    return tile * max(config.num_stages, 1), config.num_warps
