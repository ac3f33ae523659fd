import itertools
import logging

import numpy as np
import pytest
import torch

from data_pipelines.config import LossWeightConfig
from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.loader import PackStream, QuarantineWatch, heldout_packs, open_sources, plan_of
from data_pipelines.media.image import decode_image, image_tiles
from data_pipelines.media.rules import RenderRules, lay_out
from data_pipelines.pack import BadSample, PackBuilder, loss_weights
from data_pipelines.template import encode_record

TPT = 4


def first_packs(config, count, **options):
    stream = PackStream(config, tokens_per_tile=TPT, seed=3, global_batch=1, **options)
    packs = [next(stream)[0] for _ in range(count)]
    stream.close()
    return packs


def documents(pack):
    bounds = pack.cu_seqlens.tolist()
    spans = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
    return spans[: len(pack.sample_keys)], spans[len(pack.sample_keys) :]


def test_contract_of_every_pack(mixed_folder, configure, tokenizer):
    config = configure({"mixed": mixed_folder})
    size = config.seq_length
    for pack in first_packs(config, 25):
        spans, tail = documents(pack)
        for name, dtype in (("input_ids", torch.int64), ("labels", torch.int64), ("loss_weight", torch.float32)):
            assert getattr(pack, name).shape == (size,)
            assert getattr(pack, name).dtype == dtype
        assert pack.seq_idx.dtype == pack.cu_seqlens.dtype == torch.int32
        assert (len(pack.cu_seqlens) - 1) % 8 == 0
        assert pack.cu_seqlens[0] == 0
        assert pack.cu_seqlens[-1] == size
        longest = max(b - a for a, b in spans + tail)
        assert longest <= pack.max_seqlen <= size
        assert pack.max_seqlen % 64 == 0 or pack.max_seqlen == size
        for number, (a, b) in enumerate(spans + tail):
            assert (pack.seq_idx[a:b] == number).all()
            assert torch.equal(pack.position_ids[a:b], torch.arange(b - a))
            assert pack.labels[b - 1] == -100, "the last token of a sample predicts nothing"
        shifted = pack.labels[:-1]
        assert torch.equal(shifted[shifted != -100], pack.input_ids[1:][shifted != -100])
        assert ((pack.loss_weight > 0) == (pack.labels != -100)).all()
        for a, b in tail:
            assert (pack.input_ids[a:b] == tokenizer.pad_id).all()
            assert (pack.labels[a:b] == -100).all()
        assert len(tail) == (1 if pack.stats["padding"] else 0)
        assert pack.stats["tokens"] + pack.stats["padding"] == size
        image = pack.input_ids == tokenizer.special("<image>")
        places = (pack.tile_token_start[:, None] + torch.arange(TPT)).flatten()
        assert torch.equal(image.nonzero().flatten(), places.sort().values)
        assert pack.stats["visual_tokens"] == len(places)
        assert len(pack.tiles) == len(pack.tile_token_start)
        assert pack.tiles.shape[1:] == (3, 64, 64)
        assert pack.tiles.dtype == torch.uint8
        assert len(pack.media_of_tile) == len(pack.is_thumbnail) == len(pack.frame_time) == len(pack.tiles)


def test_planned_length_is_materialised_length(mixed_folder, configure, rules_options, tokenizer):
    config = configure({"mixed": mixed_folder}, seq_length=100, packing="none")  # many samples have to shrink
    stream = PackStream(config, tokens_per_tile=TPT, seed=3, global_batch=1)
    for number in range(60):
        planned = stream.planned(number)[0].samples[0]
        pack = next(stream)[0]
        assert pack.stats["tokens"] == planned.length <= 100
        assert pack.stats["quarantined"] == 0
    assert stream.plan.shrunk > 5
    dataset = Dataset.open(mixed_folder, "train")
    rules = RenderRules.from_config(config)
    for row in range(len(dataset)):
        layouts = [lay_out(s, rules, max_tiles=4, max_frames=8) for s in dataset.shapes(row)]
        encoded = encode_record(dataset.read(row).record, layouts, tokenizer, tokens_per_tile=TPT)
        assert len(encoded.input_ids) == dataset.lengths[row]
        assert (encoded.labels != -100).sum() == dataset.row(row)["supervised_tokens"]


def test_tiles_sit_where_their_tokens_are(tmp_path, write, configure, record, picture):
    data = [picture(128, 128, seed=1), picture(60, 60, seed=2)]
    media = {f"image{i}.png": d for i, d in enumerate(data)}
    folder = write(tmp_path / "d", [(record("r", "<image> a <image>", "x", images=2), media)])
    pack = first_packs(configure({"d": folder}), 1)[0]
    rules = RenderRules.from_config(configure({}))
    dataset = Dataset.open(folder, "train")
    expected = [
        image_tiles(decode_image(d), lay_out(s, rules, max_tiles=4, max_frames=1), 64)
        for d, s in zip(data, dataset.shapes(0), strict=True)
    ]
    assert torch.equal(pack.tiles, torch.cat(expected))
    assert pack.media_of_tile.tolist() == [0] * 5 + [1]
    assert pack.is_thumbnail.tolist() == [False] * 4 + [True, False]
    assert pack.frame_time.isnan().all()


def test_frames_carry_their_times(tmp_path, write, configure, record, clip):
    folder = write(tmp_path / "d", [(record("r", "q", "x", videos=1), {"video0.mp4": clip(40, 10)})])
    pack = first_packs(configure({"d": folder}), 1)[0]
    assert pack.frame_time.tolist() == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
    assert [round(float(t.float().mean()) / 2) for t in pack.tiles] == pytest.approx(range(0, 40, 5), abs=3)


@pytest.mark.parametrize("unit", ["sample", "turn"])
@pytest.mark.parametrize("mode", ["token", "sample", "square"])
def test_loss_weights_against_float64(tokenizer, mode, unit):
    turns = [("q", "short"), ("r", "a much longer answer than the first one was")]
    messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    encoded = encode_record({"id": "r", "messages": messages}, [], tokenizer, tokens_per_tile=TPT)
    expected = np.zeros(len(encoded.input_ids), dtype=np.float64)
    counts = [int((encoded.turns == t).sum()) for t in range(2)]
    for position, turn in enumerate(encoded.turns):
        if turn >= 0:
            n = np.float64(counts[turn] if unit == "turn" else sum(counts))
            expected[position] = {"token": 1.0, "sample": 1 / n, "square": n**-0.5}[mode]
    weights = loss_weights(encoded, LossWeightConfig(mode=mode, unit=unit))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    total = {"token": sum(counts), "sample": 1 if unit == "sample" else 2}.get(mode)
    if total is not None:
        assert weights.astype(np.float64).sum() == pytest.approx(total, rel=1e-6)


def test_unknown_loss_mode_is_refused(tokenizer, record):
    encoded = encode_record(record("r", "q", "a"), [], tokenizer, tokens_per_tile=TPT)
    with pytest.raises(DataError, match="choose from token, sample, square"):
        loss_weights(encoded, LossWeightConfig(mode="cube"))


def test_sample_longer_than_the_pack_is_left_out(tmp_path, write, configure, record):
    samples = [(record("long", "word " * 400, "x"), {}), (record("short", "q", "x"), {})]
    folder = write(tmp_path / "d", samples)
    stream = PackStream(configure({"d": folder}), tokens_per_tile=TPT, seed=0, global_batch=1)
    assert [next(stream)[0].sample_keys for _ in range(3)] == [("short",)] * 3
    assert stream.plan.dropped == {"longer_than_pack": 1}


def with_truncated(samples):
    record, media = samples[1]
    return [samples[0], (record, {"image0.png": media["image0.png"][:-200]}), *samples[2:]]


def test_truncated_image_leaves_only_its_own_pack_shorter(tmp_path, write, configure, mixed_samples, picture, caplog):
    samples = mixed_samples(16)
    good = first_packs(configure({"d": write(tmp_path / "good", samples)}), 12)
    folder = write(tmp_path / "bad", with_truncated(samples))
    with caplog.at_level(logging.WARNING):
        bad = first_packs(configure({"d": folder}), 12)
    assert any("image-1" in message and "(image)" in message for message in caplog.messages)
    for a, b in zip(good, bad, strict=True):
        lost = "image-1" in a.sample_keys
        assert b.sample_keys == tuple(key for key in a.sample_keys if key != "image-1")
        assert (a.digest() == b.digest()) != lost
        assert b.stats["quarantined"] == b.stats.get("quarantined_image", 0) == int(lost)
        if lost:
            assert b.stats["padding"] > a.stats["padding"]
            assert b.cu_seqlens[-1] == len(b.input_ids)


def bad(key="k"):
    return BadSample(key, "d", "image", "broken")


def test_run_stops_when_too_much_is_bad():
    watch = QuarantineWatch()
    watch.record((bad(),) * 100)
    with pytest.raises(DataError, match=r"101 of 101, 101 in a row.*'last' of d \(image: broken\)"):
        watch.record((bad("last"),))
    watch = QuarantineWatch()
    for _ in range(10):
        watch.record((bad(), *(None,) * 99))
    watch.record((None,) * 99)
    with pytest.raises(DataError, match="12 of 1101"):
        watch.record((bad(), bad()))


def test_heldout_pass_holds_every_sample_once(mixed_folder, configure):
    config = configure({"a": mixed_folder, "b": mixed_folder})
    packs = list(heldout_packs(config, tokens_per_tile=TPT, split="train"))
    keys = [(d, k) for pack in packs for d, k in zip(pack.dataset_ids, pack.sample_keys, strict=True)]
    dataset = Dataset.open(mixed_folder, "train")
    assert sorted(keys) == sorted((name, dataset.key(i)) for name in "ab" for i in range(len(dataset)))
    again = list(heldout_packs(config, tokens_per_tile=TPT, split="train"))
    assert [p.digest() for p in packs] == [p.digest() for p in again]
    parts = [list(heldout_packs(config, tokens_per_tile=TPT, split="train", dp_rank=r, dp_size=4)) for r in range(4)]
    assert len({len(part) for part in parts}) == 1
    merged = [part[i] for i in range(len(parts[0])) for part in parts]
    assert [p.digest() for p in merged[: len(packs)]] == [p.digest() for p in packs]
    assert all(p.index == -1 and not p.loss_weight.any() for p in merged[len(packs) :])
    few = list(heldout_packs(config, "b", tokens_per_tile=TPT, split="train", max_samples=5))
    assert sum(p.stats["num_samples"] for p in few) == 5
    with pytest.raises(DataError, match="no source 'c'"):
        next(heldout_packs(config, "c", tokens_per_tile=TPT, split="train"))


@pytest.mark.slow
def test_memory_of_a_builder_stays_flat(mixed_folder, configure):
    """Videos, images and text in 4,000 packs; `benchmarks/data.py memory` measures longer runs."""
    import psutil

    config = configure({"mixed": mixed_folder})
    opened = open_sources(config, TPT)
    plan = plan_of(config, opened, seed=3, global_batch=1)
    builder = PackBuilder(config, opened.datasets, opened.rules, opened.tokenizer)
    resident = []
    for number in range(4000):
        builder.build(plan.pack(number))
        if number % 1000 == 999:
            resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] - resident[0] < 8 * 2**20
