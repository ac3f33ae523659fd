"""Interleaves proven with marked rows; strictness; bitwise round trips in memory."""

import pytest
import torch
from torch import Tensor

from nemovl_train.convert.mapping import canonical_to_hf, constants_of, hf_to_canonical
from nemovl_train.exceptions import ConversionError

from .tiny import CONFIG, random_tensors

LAYER = "language_model.backbone.layers.3.mixer."
BLOCK = "vision_model.radio_model.model.blocks.1.attn."


def hub(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return canonical_to_hf(random_tensors(dtype=dtype), CONFIG)


def test_language_qkv_is_grouped_by_key_value_head() -> None:
    """4 query heads and 2 key/value heads of 8 rows: [q0 q1 k0 v0 | q2 q3 k1 v1]."""
    hf = hub()
    for letter, mark, heads in (("q", 100, 4), ("k", 200, 2), ("v", 300, 2)):
        rows = torch.arange(heads).repeat_interleave(8) + mark
        hf[f"{LAYER}{letter}_proj.weight"] = rows[:, None].expand(-1, 32) + torch.arange(32) / 64
    fused = hf_to_canonical(hf, CONFIG)["language_model.decoder.layers.3.self_attention.linear_qkv.weight"]
    heads = fused[:, 0].view(-1, 8)
    assert torch.equal(heads[:, 0], heads[:, 7])
    assert heads[:, 0].tolist() == [100, 101, 200, 300, 102, 103, 201, 301]
    assert torch.equal(fused[0], 100 + torch.arange(32) / 64)


def test_row_order_inside_a_head_is_kept() -> None:
    hf = hub()
    hf[LAYER + "q_proj.weight"] = torch.arange(32.0)[:, None].expand(-1, 32).contiguous()
    fused = hf_to_canonical(hf, CONFIG)["language_model.decoder.layers.3.self_attention.linear_qkv.weight"]
    assert fused[:16, 0].tolist() == list(range(16))
    assert fused[32:48, 0].tolist() == list(range(16, 32))


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_tower_qkv_is_grouped_by_head(leaf: str) -> None:
    """3 heads of 8 rows: all q, all k, all v on the hub; q_h k_h v_h per head here."""
    hf = hub()
    rows = torch.arange(72.0)
    hf[f"{BLOCK}qkv.{leaf}"] = rows if leaf == "bias" else rows[:, None].expand(-1, 24).contiguous()
    fused = hf_to_canonical(hf, CONFIG)[f"vision_model.decoder.layers.1.self_attention.linear_qkv.{leaf}"]
    found = fused if leaf == "bias" else fused[:, 0]
    expected = [part * 24 + head * 8 + row for head in range(3) for part in range(3) for row in range(8)]
    assert found.tolist() == expected


def test_mamba_tensors_are_plain_copies() -> None:
    hf = hub()
    ours = hf_to_canonical(hf, CONFIG)
    layer, theirs = "language_model.decoder.layers.0.mixer.", "language_model.backbone.layers.0.mixer."
    for mine, other in (("in_proj.weight", "in_proj.weight"), ("conv1d_weight", "conv1d.weight"), ("A_log", "A_log")):
        assert torch.equal(ours[layer + mine], hf[theirs + other])
    assert ours[layer + "conv1d_weight"].shape == (64 + 2 * 2 * 16, 1, 4)


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_round_trip_is_bitwise(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """A_log and D are float32 here whatever the folder holds; that loses nothing, so the way back is exact."""
    hf = canonical_to_hf(random_tensors(dtype=dtype), CONFIG, state_dtype=state_dtype)
    ours = hf_to_canonical(hf, CONFIG)
    assert all(t.dtype == torch.float32 for n, t in ours.items() if n.endswith(("A_log", "mixer.D")))
    back = canonical_to_hf(ours, CONFIG, constants=constants_of(hf, "vlm"), state_dtype=state_dtype)
    assert back.keys() == hf.keys()
    for name in hf:
        assert back[name].dtype == hf[name].dtype, name
        assert torch.equal(back[name], hf[name]), name


def test_constants_are_written_and_passed_through() -> None:
    hf = hub()
    name = "vision_model.radio_model.input_conditioner.norm_mean"
    assert hf[name].shape == (3, 1, 1)
    assert "vision_model.radio_model.summary_idxs" not in hf
    held = constants_of(hf, "vlm") | {"summary_idxs": torch.tensor([0, 2])}
    back = canonical_to_hf(hf_to_canonical(hf, CONFIG), CONFIG, constants=held)
    assert back["vision_model.radio_model.summary_idxs"].tolist() == [0, 2]
    assert hf_to_canonical(back, CONFIG).keys() == hf_to_canonical(hf, CONFIG).keys()


def dropped(hf: dict[str, Tensor]) -> None:
    del hf[LAYER + "k_proj.weight"]


def misspelt(hf: dict[str, Tensor]) -> None:
    hf[LAYER + "k_project.weight"] = hf.pop(LAYER + "k_proj.weight")


def swapped(hf: dict[str, Tensor]) -> None:
    a, b = LAYER + "k_proj.weight", LAYER + "q_proj.weight"
    hf[a], hf[b] = hf[b], hf[a]


def transposed(hf: dict[str, Tensor]) -> None:
    hf[LAYER + "k_proj.weight"] = hf[LAYER + "k_proj.weight"].T


def half(hf: dict[str, Tensor]) -> None:
    hf[LAYER + "k_proj.weight"] = hf[LAYER + "k_proj.weight"].half()


def integer(hf: dict[str, Tensor]) -> None:
    hf[LAYER + "k_proj.weight"] = hf[LAYER + "k_proj.weight"].long()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (dropped, "missing .*k_proj"),
        (misspelt, r"missing .*k_proj.weight \(the folder has .*k_project.weight\)"),
        (swapped, "k_proj.weight has shape"),
        (transposed, r"k_proj.weight has shape \[32, 16\], expected \[16, 32\]"),
        (half, "k_proj.weight is float16, expected float32"),
        (integer, "k_proj.weight is int64, expected float32"),
    ],
)
def test_damage_is_refused_by_name(damage, words: str) -> None:
    hf = hub()
    damage(hf)
    with pytest.raises(ConversionError, match=words):
        hf_to_canonical(hf, CONFIG)


def test_export_refuses_damage_by_name() -> None:
    ours = random_tensors()
    name = "projector.linear_fc1.weight"
    for change, words in (
        ({name: ours[name].T}, "linear_fc1.weight has shape"),
        ({name: ours[name].bfloat16()}, "linear_fc1.weight is bfloat16"),
        ({"projector.linear_fc9.weight": ours[name]}, "unexpected tensor projector.linear_fc9.weight"),
    ):
        with pytest.raises(ConversionError, match=words):
            canonical_to_hf(ours | change, CONFIG)
    del ours[name]
    with pytest.raises(ConversionError, match=r"missing projector\.linear_fc1\.weight"):
        canonical_to_hf(ours, CONFIG)
