"""Loss by source, FLOPs and rank numbers of real steps, against numbers found another way."""

from dataclasses import replace

import pytest
import running
import tiny_runs

from nemovl_train.config.schema import LoggingConfig
from nemovl_train.model.flops import training_flops
from nemovl_train.plan.planner import make_plan


@pytest.fixture(scope="module")
def rows_and_packs(data, tmp_path_factory):
    """Rows of six steps over both sources, and the packs of each step."""
    config = tiny_runs.run_config(data, tmp_path_factory.mktemp("telemetry"))
    config = replace(config, logging=LoggingConfig(progress=False, every_steps=3))
    packs = {}

    def prepare(trainer):
        take = trainer._next_packs

        def taken():
            found = take()
            packs[trainer.state.step + 1] = found[0]
            return found

        trainer._next_packs = taken

    running.run(config, prepare)
    path = running.StageFolder.of(config).path / "metrics.jsonl"
    rows = [running.json.loads(line) for line in path.read_text().splitlines()]
    return config, rows, packs


def test_sources_share_out_the_supervised_tokens(rows_and_packs):
    _, rows, packs = rows_and_packs
    names = set()
    for row in rows:
        counted = {}
        for pack in packs[row["step"]]:
            for number, name in enumerate(pack.dataset_ids):
                inside = pack.seq_idx == number
                counted[name] = counted.get(name, 0) + int((pack.labels[inside] >= 0).sum())
        assert row["source_tokens"] == {name: count for name, count in counted.items() if count}
        assert sum(row["source_tokens"].values()) == row["supervised_tokens"]
        names |= set(row["source_loss"])
    assert names == {"text", "pictures"}


def test_the_loss_by_source_is_that_of_its_tokens(data, tmp_path):
    """With every token of equal weight, the losses by source weigh up to the loss of the step."""
    config = tiny_runs.run_config(data, tmp_path, steps=3)
    config = replace(config, data=replace(config.data, loss=replace(config.data.loss, mode="token")))
    running.run(config)
    assert {name for row in running.rows(config) for name in row["source_loss"]} == {"text", "pictures"}
    for row in running.rows(config):
        total = sum(row["source_loss"][name] * count for name, count in row["source_tokens"].items())
        assert total / row["supervised_tokens"] == pytest.approx(row["loss"], rel=1e-5)


def test_flops_are_those_of_the_planner_for_the_same_pack(rows_and_packs):
    config, rows, packs = rows_and_packs
    first = packs[1]
    lengths = [int((pack.seq_idx == n).sum()) for pack in first for n in range(len(pack.sample_keys))]
    whole = training_flops(
        config.model,
        document_lengths=lengths,
        num_tiles=sum(pack.tiles.shape[0] for pack in first),
        head_tokens=rows[0]["supervised_tokens"],
    )
    assert rows[0]["model_flops"] == pytest.approx(whole.total)
    # The planner's average pack, told what these packs hold, counts the same kind of number.
    workload = replace(
        config.workload,
        sample_tokens=round(rows[0]["tokens"] / rows[0]["samples"]),
        visual_fraction=rows[0]["visual_tokens"] / rows[0]["tokens"],
        supervised_fraction=rows[0]["supervised_tokens"] / rows[0]["tokens"],
        fill=rows[0]["fill"],
    )
    planned = make_plan(replace(config, workload=workload)).useful_flops_per_step
    assert planned == pytest.approx(rows[0]["model_flops"], rel=0.25)


def test_every_rank_tells_at_the_steps_that_are_logged(rows_and_packs):
    _, rows, _ = rows_and_packs
    assert [row["step"] for row in rows if "ranks" in row] == [3, 6]
    ranks = rows[2]["ranks"]
    assert 0 < ranks["busy_seconds"][0] <= rows[2]["step_seconds"]
    assert ranks["data_seconds"] == [rows[2]["data_seconds"]]
    assert ranks["memory_bytes"][0] > 10**8
    assert "mfu" not in rows[0]  # there is no GPU to count against
