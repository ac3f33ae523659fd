import time

import pytest
from test_plan import plan, random_lengths, source, vlm_source

from data_pipelines import pack
from data_pipelines.bench import as_text as bench_text
from data_pipelines.bench import bench
from data_pipelines.exceptions import DataError
from data_pipelines.fit import Fit
from data_pipelines.forecast import as_text, forecast
from data_pipelines.plan import Plan

BENCH = {"tokens_per_tile": 4, "seed": 1, "global_batch": 2, "tokens_per_second": 1e6, "ranks_per_node": 8}


def test_forecast_counts_what_the_stream_holds():
    sources = [source("long", [80] * 300, 1.0), source("short", [20] * 900, 3.0)]
    p = plan(sources, window_samples=200, step_packs=4)
    found = forecast(p, steps=50, global_batch=4, ranks=2)
    packs = [p.pack(i) for i in range(found["packs_seen"])]
    samples = [sample for pack in packs for sample in pack.samples]
    assert found["packs"] == 200
    assert found["windows_seen"] == -(-200 // p.window_packs)
    assert found["fill"] == pytest.approx(sum(s.length for s in samples) / (len(packs) * 100), abs=1e-5)
    assert found["samples_per_pack"] == pytest.approx(len(samples) / len(packs), abs=0.01)
    long, short = found["sources"]
    assert (long["asked_share"], short["asked_share"]) == (0.25, 0.75)
    assert long["sample_share"] == pytest.approx(0.25, abs=0.01)
    assert long["token_share"] == pytest.approx(80 / 140, abs=0.01)
    assert long["epochs_in_run"] == pytest.approx(
        sum(s.source == "long" for s in samples) / 300 * 200 / len(packs), 1e-2
    )
    assert found["passes"] == pytest.approx(200 / p.pass_packs, rel=1e-3)
    text = as_text(found)
    assert "200 packs of 100 tokens in 50 steps of 4" in text
    assert "\nlong " in text


def test_forecast_counts_what_is_left_out():
    lengths = random_lengths(400, high=120)

    def shrink(row, limit):
        return Fit(max_tiles=1, max_frames=1, length=50)

    least = lengths.copy()
    least[:350] = 50
    p = plan([source(lengths=lengths, least=least, shrink=shrink)], step_packs=4)
    found = forecast(p, steps=10, global_batch=4, ranks=1)
    assert found["too_long"] == int((least > 100).sum()) > 0
    assert found["shrunk"] > 0
    assert found["sources"][0]["usable"] == 400 - found["too_long"]


def test_straggler_is_of_ranks_that_share_a_step():
    p = plan([vlm_source(count=8000)], seq_length=16384, window_samples=4096, step_packs=32)
    ratios = [forecast(p, steps=8, global_batch=32, ranks=ranks)["straggler"]["mean"] for ranks in (1, 8, 32)]
    assert ratios[0] == 1.0 < ratios[1] < ratios[2] <= 1.03
    assert forecast(plan([source(lengths=[9, 9])]), steps=1, global_batch=64, ranks=2)["straggler"] is None
    with pytest.raises(DataError, match="--ranks 33: a step has 32 packs"):
        forecast(p, steps=8, global_batch=32, ranks=33)


@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [
        (Plan, "_make_window", "plan"),
        (pack.PackBuilder, "_read", "read"),
        (pack, "encode_record", "text"),
        (pack, "media_tiles", "media"),
        (pack.PackBuilder, "_join", "join"),
    ],
)
def test_bench_names_the_step_that_was_slowed(mixed_folder, configure, monkeypatch, owner, name, step):
    original = getattr(owner, name)

    def slowed(*args, **options):
        # A window is as slow as its packs together.
        time.sleep(0.05 * (args[0].window_packs if step == "plan" else 1))
        return original(*args, **options)

    monkeypatch.setattr(owner, name, slowed)
    config = configure({"mixed": mixed_folder}, window_samples=32)
    found = bench(config, packs=2, ranks_per_pack=1, **BENCH)
    worker = found["worker"]
    assert found["slowest"] == step
    assert worker["seconds"][step] >= 0.1
    assert worker["packs_per_second"] <= 20
    assert found["advice"] in bench_text(found)


def test_bench_counts_workers_of_ranks_that_share_packs(mixed_folder, configure):
    config = configure({"mixed": mixed_folder}, num_workers=1)
    found = bench(config, packs=6, ranks_per_pack=4, **BENCH)
    worker = found["worker"]
    assert min(worker["tokens_per_second"], worker["tiles_per_second"], found["loader"]["samples_per_second"]) > 0
    assert found["workers_per_rank"] == pytest.approx(4e6 / worker["tokens_per_second"], abs=1)
    assert found["workers_per_node"] == 8 * found["workers_per_rank"]
    text = bench_text(found)
    assert "loader, 1 workers" in text
    assert f"packs that 4 rank(s) share, needs {found['workers_per_rank']} worker(s)" in text
