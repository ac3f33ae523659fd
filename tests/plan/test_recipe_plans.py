"""The full-size recipes: the paper's numbers, legal on every cluster, planned fast and without torch."""

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from nemovl_train.config.compose import compose_run, compose_schedule, compose_stage
from nemovl_train.config.dump import config_hash
from nemovl_train.config.recipes import list_recipes, recipe_kind
from nemovl_train.exceptions import ConfigError
from nemovl_train.plan.cli import plan as plan_verb
from nemovl_train.plan.planner import make_plan, to_json
from nemovl_train.plan.projection import MEASURED, MODELLED
from nemovl_train.plan.search import search
from nemovl_train.plan.timing import StepTime

ROOT = Path(__file__).parents[2]
SCHEDULE = "recipe=nano_12b_v2_vl/schedule"
CLUSTERS = {"h100_x4": 4, "h100_x8": 8, "h100_x64": 64, "h100_x512": 512}
RUNS = [name for name in list_recipes() if name.startswith("nano_") and recipe_kind(name) == "run"]

# arXiv 2511.03929, tables 1 and 2: tokens a sequence, batch, tokens of the stage, peak rate, decay, context parallel.
PAPER = {
    "stage0_projector_warmup": (16_384, 1024, 36.2e9, 2e-4, 0.01, 1),
    "stage1_sft_16k": (16_384, 128, 112.5e9, 2e-5, 0.05, 1),
    "stage2_video_sft_49k": (49_152, 128, 55e9, 2e-5, 0.05, 2),
    "stage3_code_recovery_49k": (49_152, 128, 15e9, 2e-5, 0.05, 2),
    "stage4_long_context_300k": (311_296, 128, 12e9, 2e-5, 0.05, 8),
}
# Tokens a step and steps that follow from the table; the paper itself gives 2,158 for stage 0.
FOLLOWS = {
    "stage0_projector_warmup": (16.8e6, 2158),
    "stage1_sft_16k": (2.10e6, 53_600),
    "stage2_video_sft_49k": (6.29e6, 8_740),
    "stage3_code_recovery_49k": (6.29e6, 2_380),
    "stage4_long_context_300k": (39.8e6, 301),
}


@pytest.mark.parametrize("stage", PAPER)
def test_stages_are_the_papers(stage: str):
    length, batch, tokens, lr, decay, cp = PAPER[stage]
    config = compose_run(f"nano_12b_v2_vl/{stage}")
    assert (config.data.seq_length, config.trainer.global_batch) == (length, batch)
    assert (config.optim.lr, config.optim.weight_decay, config.parallel.cp) == (lr, decay, cp)
    assert (config.optim.beta1, config.optim.beta2, config.optim.warmup_fraction) == (0.9, 0.999, 0.1)
    assert (config.data.loss.mode, config.optim.loss_divisor) == ("square", "pack")
    # The published code weighs turns where there is no context parallelism and samples where there is.
    assert config.data.loss.unit == ("turn" if cp == 1 else "sample")
    warmup = stage.startswith("stage0")
    assert config.trainer.train == (("projector",) if warmup else ("vision", "projector", "language"))
    assert (config.data.packing == "none") == warmup
    planned = to_json(make_plan(config))["data"]
    assert planned["tokens"] == pytest.approx(tokens, rel=0.01)
    assert planned["tokens_per_step"] == pytest.approx(FOLLOWS[stage][0], rel=0.01)
    assert planned["steps"] == pytest.approx(FOLLOWS[stage][1], rel=0.01)
    # Sample counts are rounded in the paper ("approx."): the fill that packing leaves is within them.
    assert planned["samples"] == pytest.approx(config.workload.samples, rel=0.02)
    assert not [text for text in to_json(make_plan(config))["warnings"] if "trainer.steps" in text]


def test_parameters():
    counted = to_json(make_plan(compose_run("nano_12b_v2_vl/stage1_sft_16k")))["parameters"]
    assert counted["total"] == pytest.approx(13.17e9, rel=1e-3)
    assert counted["parts"]["language"]["count"] == pytest.approx(12.31e9, rel=1e-3)
    warmup = to_json(make_plan(compose_run("nano_12b_v2_vl/stage0_projector_warmup")))["parameters"]
    assert warmup["trained"] == warmup["parts"]["projector"]["count"] == 209_720_320


@pytest.mark.parametrize("recipe", RUNS)
def test_a_cluster_changes_the_layout_and_nothing_that_decides_the_result(recipe: str):
    configs = {name: compose_run(recipe, [f"cluster={name}"]) for name in CLUSTERS}
    assert len({config_hash(config) for config in configs.values()}) == 1
    for name, config in configs.items():
        plan = make_plan(config)
        assert (config.cluster.name, plan.grid.gpus) == (name, CLUSTERS[name])
        # TP stays inside a node; every rank has a pack, and as many as the others.
        assert plan.grid.tp <= config.cluster.gpus_per_node
        assert config.trainer.global_batch % plan.grid.dp == 0
    assert compose_run(recipe) == configs["h100_x512"]


@pytest.mark.parametrize("recipe", RUNS)
def test_blends_are_whole(recipe: str):
    data = compose_run(recipe).data
    assert sum(source.weight for source in data.sources.values()) == pytest.approx(1)
    assert all(source.path.startswith("data/") for source in data.sources.values())


def test_data_and_models_lie_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("NEMOVL_DATA", "/scratch/sets")
    monkeypatch.setenv("NEMOVL_MODELS", "/scratch/models")
    data = compose_run("nano_12b_v2_vl/stage3_code_recovery_49k").data
    assert data.sources["code_reasoning"].path == "/scratch/sets/nano_v2_vl/code_reasoning"
    assert data.tokenizer.startswith("/scratch/models/")
    assert compose_schedule("nano_12b_v2_vl/schedule").parts.vision == "/scratch/models/C-RADIOv2-H"


def test_the_schedule_is_projected_beside_the_papers_hours(capsys):
    """Hours are nodes x 8 GPUs x hours of table 2; what is measured and what is modelled is every part of a step."""
    assert plan_verb([SCHEDULE, "--json"]) == 0
    found = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["projection"]}
    paper = {name: row["paper_gpu_hours"] for name, row in found.items()}
    assert list(paper.values()) == [1536, 15360, 7680, 1792, 2816, 29184]
    assert set(paper) == {*PAPER, "all"}
    assert set(MEASURED) | set(MODELLED) == {field.name for field in fields(StepTime)}
    assert not set(MEASURED) & set(MODELLED)
    for stage in PAPER:
        made = make_plan(compose_run(f"nano_12b_v2_vl/{stage}"))
        times = made.time.components()
        assert found[stage]["gpu_hours"] == pytest.approx(made.hours * 512)
        assert found[stage]["share_measured"] == pytest.approx(
            1 - sum(times[name] for name in MODELLED) / made.time.total
        )
    assert found["stage1_sft_16k"]["paper_tokens_per_second_per_gpu"] == pytest.approx(2034, rel=0.001)
    assert plan_verb([SCHEDULE, "cluster.gpu=h200_141gb"]) == 0
    printed = capsys.readouterr().out
    assert "paper's" in printed
    assert "0%" in printed, "rates of an H200 are not measured"
    assert plan_verb(["recipe=tiny/schedule"]) == 0
    assert "paper's" not in capsys.readouterr().out


def test_stage2_repeats_stage1_in_its_proportions():
    one = compose_run("nano_12b_v2_vl/stage1_sft_16k").data.sources
    two = compose_run("nano_12b_v2_vl/stage2_video_sft_49k").data.sources
    old = sum(two[name].weight for name in one)
    assert old == pytest.approx(8.1 / (8.1 + 1.4), abs=0.01)
    assert all(two[name].weight / old == pytest.approx(source.weight, abs=1e-3) for name, source in one.items())
    assert one["text_reasoning"].weight == pytest.approx(6.5 / 32.5)


def test_packing_saves_most_of_stage_0():
    padded = to_json(make_plan(compose_run("nano_12b_v2_vl/stage0_projector_warmup")))
    packed = to_json(make_plan(compose_run("nano_12b_v2_vl/stage0_projector_warmup_packed")))
    assert padded["data"]["samples_per_pack"] == 1
    assert packed["data"]["samples"] == pytest.approx(padded["data"]["samples"], rel=0.01)
    saves = padded["data"]["packing_saves"]
    assert saves["share_saved"] > 0.7
    # The other recipe, planned for itself, takes what was foretold but for its smaller share of optimizer steps.
    assert packed["time"]["hours"] == pytest.approx(saves["hours"], rel=0.05)
    assert packed["data"]["packing_saves"] is None


@pytest.mark.parametrize("cluster", ["h100_x8", "h100_x64", "h100_x512"])
def test_every_stage_can_be_followed_on_the_same_sets(cluster):
    stages = compose_schedule("nano_12b_v2_vl/schedule").stages
    runs = [compose_run(stage.recipe, [f"cluster={cluster}", "+evaluation=nano_v2_vl"]) for stage in stages]
    assert all(run.evaluation == runs[0].evaluation for run in runs)
    blends = {source.path for run in runs for source in run.data.sources.values()}
    assert set(runs[0].evaluation.sources.values()) <= blends
    assert not compose_run(stages[0].recipe).evaluation.sources


def test_a_schedule_hands_its_cluster_to_the_stages():
    schedule = compose_schedule("nano_12b_v2_vl/schedule", ["cluster=h100_x8", "cluster.gpu=h200_141gb"])
    stages = [compose_stage(schedule, stage) for stage in schedule.stages]
    assert all((s.cluster.gpus, s.cluster.gpu) == (8, "h200_141gb") for s in stages)
    assert stages[1].parallel.tp == 8
    tiny = compose_schedule("tiny/schedule", ["cluster.gpus=2"])
    assert all(compose_stage(tiny, stage).cluster.gpus == 2 for stage in tiny.stages)
    own = replace(schedule.stages[1], overrides=("cluster=h100_x64",))
    assert compose_stage(schedule, own).cluster.gpus == 64


def test_every_recipe_plans_within_five_cpu_seconds_and_without_torch():
    code = (
        "import contextlib, io, json, sys, time\n"
        "from nemovl_train.cli import main\n"
        "from nemovl_train.config.recipes import list_recipes\n"
        "seconds = {}\n"
        "for name in list_recipes():\n"
        "    began = time.process_time()\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        engine = ['engine=megatron'] if 'deepspeed' in name else []\n"
        "        code = main(['plan', f'recipe={name}', *engine, '--json'])\n"
        "    json.loads(out.getvalue())\n"
        "    seconds[name] = (code, time.process_time() - began)\n"
        "print(json.dumps([seconds, [m for m in ('torch', 'megatron', 'transformers') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, imported = json.loads(done.stdout)
    assert imported == []
    assert set(seconds) == set(list_recipes())
    assert all(code == 0 and taken < 5 for code, taken in seconds.values()), seconds


def test_a_run_that_plans_know_nothing_of_is_refused():
    with pytest.raises(ConfigError, match="engine=megatron plans this run"):
        make_plan(compose_run("tiny/finetune_deepspeed"))


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_shipped_layout_fits_where_any_does(cluster: str):
    """The predecessor's recipes keep the published scripts' TP 4 instead."""
    for name in (name for name in RUNS if name.startswith("nano_12b")):
        plan = make_plan(compose_run(name, [f"cluster={cluster}"]))
        assert plan.fits or not search(plan.config)[0].fits, (name, cluster)
