"""Computes with our model what `reload_check` computes with Transformers' classes, from the same folder.

Run by `verify` in a process of its own: `python -m nemovl_train.convert.ours_check FOLDER OUT`.
Writes OUT/ours.safetensors (float32).

Shape legend: S tokens, V vocabulary rows, T tiles, G patches along a tile's side, E tower width.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_pipelines.schema import IGNORE_LABEL, Pack
from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.checkpoints import load_tensors, single_process_model
from nemovl_train.convert.hf_import import HFFolder
from nemovl_train.convert.probe import Probe, make_probe
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.vlm import NemotronVL


def main(hf_dir: Path, out: Path) -> None:
    """Load, compute, write."""
    folder = HFFolder(hf_dir)
    with single_process_model(folder.config, torch.float32) as model, torch.no_grad():
        load_tensors(model, folder.tensors())
        outputs = compute(model.eval(), folder.config, make_probe(folder.config))
    save_file({n: t.float().cpu().contiguous() for n, t in outputs.items()}, str(out / "ours.safetensors"))


def compute(model: NemotronVL, config: ModelConfig, probe: Probe) -> dict[str, Tensor]:
    """Every quantity that the model's parts allow.

    Returns:
        `text_logits` [S, V], `tower_features` [T, G * G, E], `visual_tokens` [T, tokens_per_tile, H], `mixed_logits`
        [S, V]; those whose parts are missing are left out.
    """
    out: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    if model.language_model is not None:
        out["text_logits"] = _logits(model, config, probe.text, None)
    if model.vision_model is not None:
        tower, tiles = model.vision_model, probe.tiles.to(device)
        out["tower_features"] = tower(tower.normalize(tiles))[:, config.vision.prefix_tokens :]
    if model.projector is not None:
        out["visual_tokens"] = model.encode_tiles(probe.tiles.to(device))
        out["mixed_logits"] = _logits(model, config, probe.mixed, probe)
    return out


def _logits(model: NemotronVL, config: ModelConfig, ids: Tensor, probe: Probe | None) -> Tensor:
    """Logits of one document; the rest of its pack is a padding tail up to a multiple of the scan's chunk."""
    length, chunk = ids.numel(), config.language.chunk_size
    size = -(-length // chunk) * chunk
    tail = size - length
    side = config.vision.tile_size
    tiles = torch.zeros(0, 3, side, side, dtype=torch.uint8) if probe is None else probe.tiles
    start = torch.zeros(0, dtype=torch.int64) if probe is None else probe.tile_start
    pack = Pack(
        index=0,
        input_ids=torch.cat([ids, torch.full((tail,), config.tokens.pad)]),
        labels=torch.full((size,), IGNORE_LABEL),
        loss_weight=torch.zeros(size),
        position_ids=torch.cat([torch.arange(length), torch.arange(tail)]),
        seq_idx=torch.cat([torch.zeros(length), torch.ones(tail)]).to(torch.int32),
        cu_seqlens=torch.tensor([0, length, size], dtype=torch.int32),
        max_seqlen=size,
        tiles=tiles,
        tile_token_start=start,
        media_of_tile=torch.arange(tiles.shape[0], dtype=torch.int32),
        is_thumbnail=torch.zeros(tiles.shape[0], dtype=torch.bool),
        frame_time=torch.full((tiles.shape[0],), float("nan")),
        sample_keys=("probe",),
        dataset_ids=("probe",),
        stats={},
    )
    return model.logits(PackBatch.from_pack(pack, model.layout))[:length]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
