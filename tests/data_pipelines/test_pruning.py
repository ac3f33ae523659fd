"""Videos with part of their visual tokens, from the rules of a folder to packs: lengths, places, refusals."""

import json

import pytest
import torch

from data_pipelines.dataset import Dataset
from data_pipelines.exceptions import DataError
from data_pipelines.loader import PackStream
from data_pipelines.media.rules import MediaShape, RenderRules, lay_out, tokens_kept

TPT = 4
RATE = 0.7


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory, write, mixed_samples):
    return write(tmp_path_factory.mktemp("pruned") / "mixed", mixed_samples(24), video_pruning_rate=RATE)


def test_places_of_a_clip_are_as_many_as_the_rule_keeps():
    for rate in (0.1, 0.5, 0.75, 0.99):
        rules = RenderRules(
            template="nano_v2_vl", tile_size=512, max_tiles=12, use_thumbnail=True, video_fps=2.0, max_frames=128,
            video_pruning_rate=rate,
        )  # fmt: skip
        for frames in (1, 2, 8, 40, 900):
            layout = lay_out(MediaShape("video", 640, 480, 10.0, frames), rules, max_tiles=12, max_frames=128)
            counts = layout.tile_tokens(256)
            assert len(counts) == layout.tiles
            assert sum(counts) == tokens_kept(layout.tiles, 256, rate) >= counts[0] == 256
            assert all(0 <= count <= 256 for count in counts)
        image = lay_out(MediaShape("image", 1600, 1200), rules, max_tiles=12, max_frames=128)
        assert image.tile_tokens(256) == (256,) * image.tiles


@pytest.mark.parametrize(("seq_length", "shrunk"), [(400, False), (150, True)])
def test_planned_length_is_materialised_length(pruned_folder, configure, tokenizer, seq_length, shrunk):
    options = {"seq_length": seq_length, "packing": "none", "video_pruning_rate": RATE}
    config = configure({"mixed": pruned_folder}, **options)
    stream = PackStream(config, tokens_per_tile=TPT, seed=3, global_batch=1)
    clips = 0
    for number in range(24):
        planned = stream.planned(number)[0].samples[0]
        pack = next(stream)[0]
        assert pack.stats["tokens"] == planned.length <= seq_length
        assert pack.stats["quarantined"] == 0
        found = int((pack.input_ids == tokenizer.special("<image>")).sum())
        assert pack.stats["visual_tokens"] == found
        if not pack.sample_keys[0].startswith("video"):
            assert pack.tile_tokens is None
            continue
        clips += 1
        assert pack.tile_tokens.dtype == torch.int64
        assert int(pack.tile_tokens.sum()) == found == tokens_kept(len(pack.tiles), TPT, RATE)
        assert found < TPT * len(pack.tiles)
        for start, count in zip(pack.tile_token_start.tolist(), pack.tile_tokens.tolist(), strict=True):
            # Tags stay also around a frame that keeps nothing.
            assert pack.input_ids[start - 1] == tokenizer.special("<img>")
            assert pack.input_ids[start + count] == tokenizer.special("</img>")
    stream.close()
    assert clips >= 4
    assert bool(stream.plan.shrunk) == shrunk


def test_a_folder_counted_at_another_rate_is_refused(pruned_folder, mixed_folder, configure, tokenizer):
    ask = RenderRules.from_config(configure({}, video_pruning_rate=RATE))
    off = RenderRules.from_config(configure({}))
    with pytest.raises(DataError, match=r"video_pruning_rate \(0.7, the run has 0.0\)"):
        Dataset.open(pruned_folder, "train", rules=off, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"video_pruning_rate \(0.0, the run has 0.7\)"):
        Dataset.open(mixed_folder, "train", rules=ask, tokenizer=tokenizer)


def test_rules_of_videos_count_where_there_are_videos(tmp_path, write, mixed_samples, configure, tokenizer):
    still = [sample for sample in mixed_samples(12) if "video" not in sample[0]["id"]]
    folders = [write(tmp_path / "still", still), write(tmp_path / "text", [s for s in still if not s[1]])]
    other = configure({}, video_pruning_rate=RATE, max_frames=5, video_fps=1.0)
    for folder in folders:
        dataset = Dataset.open(folder, "train", rules=RenderRules.from_config(other), tokenizer=tokenizer)
        assert not dataset.has_videos
        dataset.close()
    rules = RenderRules.from_config(configure({}, video_pruning_rate=RATE, max_tiles=2))
    with pytest.raises(DataError, match=r"other rules: max_tiles \(4, the run has 2\)\. Set"):
        Dataset.open(folders[0], "train", rules=rules, tokenizer=tokenizer)
    moving = write(tmp_path / "moving", mixed_samples(12))
    with pytest.raises(
        DataError, match=r"video_fps \(2.0, the run has 1.0\); max_frames \(8, the run has 5\); video_pr"
    ):
        Dataset.open(moving, "train", rules=RenderRules.from_config(other), tokenizer=tokenizer)


def test_a_folder_that_does_not_know_of_it_is_read_as_before(tmp_path, write, mixed_samples, configure, tokenizer):
    folder = write(tmp_path / "d", mixed_samples(8))
    off = RenderRules.from_config(configure({}))
    info = json.loads((folder / "dataset.json").read_text())
    assert info["rules"].pop("video_pruning_rate") == 0.0
    (folder / "dataset.json").write_text(json.dumps(info))
    assert RenderRules(**info["rules"]) == off
    assert info["rules_sha256"] == off.digest(tokenizer.digest())
    assert len(Dataset.open(folder, "train", rules=off, tokenizer=tokenizer)) == 8


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_an_impossible_rate_is_refused(rate, configure):
    with pytest.raises(DataError, match=r"at least 0 .* and below 1"):
        RenderRules.from_config(configure({}, video_pruning_rate=rate))
