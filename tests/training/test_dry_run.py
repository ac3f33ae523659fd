"""A dry run measures, writes what it found, trains nothing and leaves the folder to the run."""

import json
import logging
from dataclasses import replace

import running
import tiny_runs
import torch

from data_pipelines.loader import PackStream
from data_pipelines.media.rules import tokens_kept
from nemovl_train.checkpoint import sealed
from nemovl_train.config.schema import ParallelConfig
from nemovl_train.exit_codes import ExitCode
from nemovl_train.model.batch import PackBatch
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.dry_run import FILE, images_alone
from nemovl_train.training.folder import StageFolder


def test_it_measures_and_the_run_that_follows_is_as_without_it(data, tmp_path, caplog):
    whole = running.run(tiny_runs.run_config(data, tmp_path / "whole", steps=2))
    config = tiny_runs.run_config(data, tmp_path / "dry", steps=2)
    with caplog.at_level(logging.INFO):
        dry = running.run(replace(config, trainer=replace(config.trainer, dry_run=True)))
    folder = StageFolder.of(config)
    assert dry.code == ExitCode.OK
    assert dry.state["step"] == 0
    assert not list(sealed.published(folder.checkpoints))
    found = json.loads((folder.path / FILE).read_text())
    # Images alone: as many tiles of four tokens as leave one token to predict.
    assert found["tiles"] == 31
    assert found["device_bytes"] > found["peak_bytes"] > 0
    assert found["planned_bytes"] > 0
    assert "nothing was trained" in caplog.text
    after = running.run(config)
    running.assert_same_end(config, after, tiny_runs.run_config(data, tmp_path / "whole", steps=2), whole)


def test_a_pack_of_images_alone_is_a_legal_pack(data):
    config = tiny_runs.run_config(data, data)
    packs = []
    running_pack = tiny_runs.MODEL
    stream = PackStream(config.data, tokens_per_tile=4, seed=1, global_batch=1)
    packs.append(next(stream)[0])
    stream.close()
    made = images_alone(packs[0], running_pack)
    assert made.input_ids.shape == packs[0].input_ids.shape
    assert made.cu_seqlens.shape == packs[0].cu_seqlens.shape
    assert made.cu_seqlens.tolist() == [0] + [128] * (len(made.cu_seqlens) - 1)
    assert int((made.input_ids == running_pack.tokens.image).sum()) == 4 * len(made.tiles)
    layout = Layout.create(ParallelConfig())
    batch = PackBatch.from_pack(made, layout)
    batch.check_tiles(running_pack.tokens.image, 4, running_pack.vision.tile_size)
    assert torch.equal(batch.supervised.cpu(), (made.labels >= 0).nonzero()[:, 0])
    layout.destroy()


def test_where_videos_are_pruned_it_is_one_video_that_fills_the_pack(data):
    config, model = tiny_runs.run_config(data, data), tiny_runs.MODEL
    stream = PackStream(config.data, tokens_per_tile=4, seed=1, global_batch=1)
    pack = next(stream)[0]
    stream.close()
    whole, pruned = images_alone(pack, model), images_alone(pack, model, 0.75)
    assert len(pruned.tiles) > 3 * len(whole.tiles)
    # One frame more would not leave a token to predict.
    assert int(pruned.tile_tokens.sum()) < 128 <= tokens_kept(len(pruned.tiles) + 1, 4, 0.75)
    layout = Layout.create(ParallelConfig())
    for made in (images_alone(replace(pack, tile_tokens=torch.ones(2)), model), pruned):
        PackBatch.from_pack(made, layout).check_tiles(model.tokens.image, 4, model.vision.tile_size)
    layout.destroy()
