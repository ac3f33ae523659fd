"""Folder -> checkpoint -> tensor and data parallel layouts -> checkpoint -> folder, with marked values.

Every tensor counts up, so each value says where it was. What a rank must hold is written here from the published
layouts (Megatron-LM `ssm/mamba_mixer.py`, `transformer/attention.py`; NVIDIA-NeMo/Megatron-Bridge `nemotronh`), from
the folder's tensors, without the table of names.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemovl_train.config.schema import ModelConfig
from nemovl_train.convert.checkpoints import export_checkpoint, import_checkpoint
from nemovl_train.convert.hf_export import MANIFEST, export_canonical
from nemovl_train.convert.tensor_files import SINGLE

from .test_predecessor import LLAMA
from .tiny import CONFIG, random_tensors

LAYOUTS = ((1, 1), (2, 1), (4, 1), (2, 2))
# Everything that four ranks share divides by four.
WIDE = replace(
    CONFIG,
    name="test-wide",
    language=replace(
        CONFIG.language, num_attention_heads=8, num_query_groups=4, head_dim=4, mamba_num_groups=4, mamba_state_dim=8
    ),
)
LM = WIDE.language
LAYER = "language_model.backbone.layers."


def counting(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every value of the folder is another whole number, each exact in its format."""
    first = 1
    out = {}
    for name, tensor in tensors.items():
        out[name] = torch.arange(first, first + tensor.numel(), dtype=torch.float32).view(tensor.shape)
        first += tensor.numel()
    assert first < 2**24
    return {n: t.to(tensors[n].dtype) for n, t in out.items()}


def marked_folder(config: ModelConfig, out: Path, tokenizer_dir: Path) -> Path:
    export_canonical(random_tensors(config), config, out, kind="vlm", tokenizer=tokenizer_dir, card={})
    (out / MANIFEST).unlink()
    save_file(counting(load_file(out / SINGLE)), out / SINGLE, metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return marked_folder(WIDE, tmp_path_factory.mktemp("marked") / "hf", tokenizer_dir)


def through_layouts(hf: Path, root: Path, layouts: tuple[tuple[int, int], ...]) -> Path:
    """Import a folder, and have each layout load it and save it again."""
    kept = {n: os.environ.pop(n) for n in ("RANK", "WORLD_SIZE") if n in os.environ}
    checkpoint = import_checkpoint(hf, root / "imported")
    os.environ.update(kept)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    names = [f"{tp},{dp}" for tp, dp in layouts]
    command = [sys.executable, "-m", "tests.convert.tp_ranks", str(checkpoint), str(root), *names]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.fixture(scope="module")
def layouts(marked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return through_layouts(marked, tmp_path_factory.mktemp("layouts"), LAYOUTS)


def columns(tensor: Tensor, rank: int, tp: int) -> Tensor:
    return tensor.chunk(tp, dim=0)[rank]


def rows(tensor: Tensor, rank: int, tp: int) -> Tensor:
    return tensor.chunk(tp, dim=1)[rank]


def pieces(tensor: Tensor, sizes: list[int], rank: int, tp: int) -> Tensor:
    return torch.cat([columns(part, rank, tp) for part in tensor.split(sizes)])


def expected(hf: dict[str, Tensor], rank: int, tp: int) -> dict[str, Tensor]:
    """What a tensor parallel rank holds of the language model, from the folder's tensors."""
    inner, shared, heads = LM.mamba_inner_size, LM.mamba_num_groups * LM.mamba_state_dim, LM.mamba_num_heads
    out = {
        "embedding.word_embeddings.weight": columns(hf["language_model.backbone.embeddings.weight"], rank, tp),
        "output_layer.weight": columns(hf["language_model.lm_head.weight"], rank, tp),
        "decoder.final_norm.weight": hf["language_model.backbone.norm_f.weight"],
    }
    for n, kind in enumerate(LM.hybrid_pattern):
        theirs, ours = f"{LAYER}{n}.mixer.", f"decoder.layers.{n}."
        norm = {"M": "norm", "-": "pre_mlp_layernorm", "*": "input_layernorm"}[kind]
        out[f"{ours}{norm}.weight"] = hf[f"{LAYER}{n}.norm.weight"]
        if kind == "M":
            whole = hf[theirs + "in_proj.weight"]
            out[ours + "mixer.in_proj.weight"] = pieces(whole, [inner, inner, shared, shared, heads], rank, tp)
            for leaf in ("weight", "bias"):
                whole = hf[f"{theirs}conv1d.{leaf}"]
                out[f"{ours}mixer.conv1d_{leaf}"] = pieces(whole, [inner, shared, shared], rank, tp)
            for leaf in ("A_log", "D", "dt_bias", "norm.weight"):
                out[f"{ours}mixer.{leaf}"] = columns(hf[theirs + leaf], rank, tp)
            out[ours + "mixer.out_proj.weight"] = rows(hf[theirs + "out_proj.weight"], rank, tp)
        elif kind == "-":
            out[ours + "mlp.linear_fc1.weight"] = columns(hf[theirs + "up_proj.weight"], rank, tp)
            out[ours + "mlp.linear_fc2.weight"] = rows(hf[theirs + "down_proj.weight"], rank, tp)
        else:
            q, k, v = (hf[f"{theirs}{letter}_proj.weight"].split(LM.head_dim) for letter in "qkv")
            per = LM.num_attention_heads // LM.num_query_groups
            mine = range(rank * LM.num_query_groups // tp, (rank + 1) * LM.num_query_groups // tp)
            blocks = [b for g in mine for b in (*q[g * per : (g + 1) * per], k[g], v[g])]
            out[ours + "self_attention.linear_qkv.weight"] = torch.cat(blocks)
            out[ours + "self_attention.linear_proj.weight"] = rows(hf[theirs + "o_proj.weight"], rank, tp)
    return {"language_model." + name: tensor for name, tensor in out.items()}


@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_every_rank_holds_its_part(tp: int, dp: int, marked: Path, layouts: Path) -> None:
    hf = load_file(marked / SINGLE)
    for rank in range(tp * dp):
        held = load_file(layouts / f"tp{tp}_dp{dp}" / f"rank{rank}.safetensors")
        wanted = expected(hf, rank % tp, tp)
        assert {n for n in held if n.startswith("language_model.")} == wanted.keys()
        for name, tensor in wanted.items():
            assert held[name].dtype == tensor.dtype, name
            assert torch.equal(held[name], tensor), name
        # Tower and projector are whole on every rank.
        assert torch.equal(held["projector.linear_fc1.weight"], hf["mlp1.1.weight"])
        block = hf["vision_model.radio_model.model.blocks.0.attn.qkv.bias"].view(3, WIDE.vision.num_attention_heads, -1)
        fused = held["vision_model.decoder.layers.0.self_attention.linear_qkv.bias"]
        assert torch.equal(fused, block.transpose(0, 1).reshape(-1))


def test_plain_concatenation_of_ranks_is_not_the_tensor(marked: Path, layouts: Path) -> None:
    """The rule that would be wrong shows in these values: the marks can tell."""
    hf = load_file(marked / SINGLE)
    ranks = [load_file(layouts / "tp2_dp1" / f"rank{r}.safetensors") for r in range(2)]
    name = "language_model.decoder.layers.0.mixer.in_proj.weight"
    assert not torch.equal(torch.cat([r[name] for r in ranks]), hf[f"{LAYER}0.mixer.in_proj.weight"])


@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_a_checkpoint_of_any_layout_is_exported_bitwise(
    tp: int, dp: int, marked: Path, layouts: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    out = export_checkpoint(layouts / f"tp{tp}_dp{dp}", tmp_path / "hf", tokenizer=tokenizer_dir)
    back, original = load_file(out / SINGLE), load_file(marked / SINGLE)
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


def test_the_predecessor_in_layouts(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Gate and up of a SwiGLU are split one by one, biases of the projector are whole, and the way back is bitwise."""
    sizes = {"num_attention_heads": 8, "num_query_groups": 4, "head_dim": 4}
    config = replace(LLAMA, language=replace(LLAMA.language, **sizes))
    hf = load_file(marked_folder(config, tmp_path / "hf", tokenizer_dir) / SINGLE)
    root = through_layouts(tmp_path / "hf", tmp_path, ((2, 1), (4, 1)))
    prefix, ours = "language_model.model.layers.1.", "language_model.decoder.layers."
    for tp in (2, 4):
        for rank in range(tp):
            held = load_file(root / f"tp{tp}_dp1" / f"rank{rank}.safetensors")
            gate, up = (columns(hf[f"{prefix}mlp.{name}_proj.weight"], rank, tp) for name in ("gate", "up"))
            assert torch.equal(held[f"{ours}3.mlp.linear_fc1.weight"], torch.cat([gate, up]))
            assert torch.equal(
                held[f"{ours}3.mlp.linear_fc2.weight"], rows(hf[f"{prefix}mlp.down_proj.weight"], rank, tp)
            )
            q, k, v = (hf[f"{prefix}self_attn.{letter}_proj.weight"].split(4) for letter in "qkv")
            blocks = [
                b for g in range(rank * 4 // tp, (rank + 1) * 4 // tp) for b in (q[2 * g], q[2 * g + 1], k[g], v[g])
            ]
            assert torch.equal(held[f"{ours}2.self_attention.linear_qkv.weight"], torch.cat(blocks))
            assert torch.equal(held["projector.linear_fc1.bias"], hf["mlp1.1.bias"])
        out = export_checkpoint(root / f"tp{tp}_dp1", tmp_path / f"out{tp}", tokenizer=tokenizer_dir)
        back = load_file(out / SINGLE)
        assert back.keys() == hf.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in hf.items())
