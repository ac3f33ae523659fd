"""Arithmetic of plans against hand counts, real modules and measured runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from nemovl_train.config.compose import compose_run
from nemovl_train.config.schema import ModelConfig, RunConfig, TrainerConfig
from nemovl_train.exceptions import ConfigError
from nemovl_train.plan.calibration import CASES, MEGATRON_CORE, NEMOVL, compare
from nemovl_train.plan.hardware import GIB, GPU_TYPES
from nemovl_train.plan.load import Grid, heaviest, pack_of
from nemovl_train.plan.memory import _kept, _made_in_backward, memory
from nemovl_train.plan.planner import SAVE_BLOCK_BYTES, make_plan, node_scaling, to_json, warnings, would_fit
from nemovl_train.plan.policy import STATES, Policy, policy_of
from nemovl_train.plan.search import search
from nemovl_train.plan.timing import step_time
from nemovl_train.plan.traffic import flows

KEPT = ("cluster=h100_x8", "recompute.language=none", "recompute.vision=none")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def recipe(stage: str, *overrides: str) -> RunConfig:
    return compose_run(f"nano_12b_v2_vl/{stage}", overrides)


@pytest.mark.parametrize("row", compare(), ids=lambda row: row["case"])
def test_plans_meet_measured_runs(row):
    assert abs(row["memory_error"]) < 0.05
    assert abs(row["time_error"]) < 0.1


def test_the_measured_numbers_are_those_of_the_result_files():
    stored = json.loads((RESULTS / "2026-11-22_megatron_core_4xh100.json").read_text())["cases"]
    assert {case.name for case in CASES if case.program == MEGATRON_CORE} == set(stored)
    for case in (case for case in CASES if case.program == MEGATRON_CORE):
        row = stored[case.name]
        assert (case.seconds, case.peak_gib, case.packs) == (row["seconds"], row["peak_gib"], row["packs"])
        assert (case.seq_length, sum(case.documents)) == (row["seq_length"], row["seq_length"])
        assert f"TP{case.grid.tp}" in row["layout"] or case.grid.tp == 1
        assert case.grid.sequence_parallel == ("+ SP" in row["layout"])
        assert case.foreign_seconds == pytest.approx(sum(row.get("profile_seconds", {}).values()))
        if isinstance(row["documents"], list):
            assert list(case.documents) == row["documents"]


def test_this_projects_numbers_are_those_of_the_result_file():
    """`unit_head` ran with an earlier form of the loss and is left out."""
    rows = json.loads((RESULTS / "2026-11-25_train_units_1xh100.json").read_text())["rows"]
    stored = {row["case"]: row for row in rows}
    ours = [case for case in CASES if case.program == NEMOVL]
    assert {case.name for case in ours} == {name for name in stored if name.startswith("unit_")} - {"unit_head"}
    for case in ours:
        row, options = stored[case.name], stored[case.name]["options"]
        left = row["before_gib"] if row["before_gib"] > 0.1 else 0.0
        assert case.seconds == pytest.approx(row["median_step_seconds"], abs=5e-4)
        assert case.peak_gib == pytest.approx(row["peak_gib"] - left, abs=0.06)
        assert (case.language.hybrid_pattern, case.language.vocab_size) == (
            options["hybrid_pattern"],
            options["vocab_size"],
        )
        assert (case.packs, case.seq_length) == (options["micro_batches"], options["seq_length"])
        assert case.tower_blocks == options["vision_layers"]
        assert case.tiles * 256 == options["visual"] * options["seq_length"]
        assert case.policy.states == STATES[options["optim"]["states"]]
        recompute = options["recompute"]
        assert (case.policy.full_recompute_layers is None) == (recompute["language"] == "full")
        assert case.policy.selective_recompute == (recompute["language"] == "selective")
        assert case.policy.tower_recompute == recompute["vision"]


def test_the_page_shows_the_errors_of_today():
    page = (RESULTS.parents[1] / "docs" / "planning.md").read_text()
    for row in compare():
        numbers = [row["measured_gib"], row["planned_gib"], f"{row['memory_error']:+.1%}"]
        numbers += [f"{row['measured_seconds']:.3f}", f"{row['planned_seconds']:.3f}", f"{row['time_error']:+.1%}"]
        assert f"| `{row['case']}` | {' | '.join(map(str, numbers))} |" in page, row


def test_memory_peaks_where_layers_before_the_hungriest_still_keep():
    """By hand: backward of the first Mamba layer from the end, when one MLP and its input have gone."""
    config = recipe("stage3_code_recovery_49k", *KEPT)
    size, load, grid = config.model.language, pack_of(config), Grid(tp=8, sequence_parallel=True)
    found = memory(config, grid, load)
    tokens = load.seq_length
    inner, projected, convolved = 10240, 22656, 10240 + 2 * 8 * 128
    states, products = 3 * 2 * inner * 128 / 128, 2 * 2 * 8 * 128
    mamba = 2 * inner + projected + 2 * convolved + products + states
    mlp = 2 * size.ffn_hidden_size + 2 * size.hidden_size
    assert found.working + found.logits == pytest.approx(2 * tokens * (mamba - mlp) / 8)


@pytest.mark.parametrize("tokens", [32768, 131072, 311296])
def test_a_mamba_layer_takes_what_was_measured(tokens):
    """One layer of the 12B by itself over two context parallel ranks; the longest pack goes through in two pieces."""
    rows = json.loads((RESULTS / "2026-11-25_mamba_context_2xh100.json").read_text())["rows"]
    (measured,) = (r["peak_gib"] for r in rows if (r["form"], r["tokens"]) == ("state_passing", tokens))
    size = replace(recipe("stage4_long_context_300k").model.language, hybrid_pattern="M")
    grid, own = Grid(cp=2), tokens / 2
    kept, hidden = _kept(size, "M", grid, False, Policy(), fp8=False)
    parameters = 2 * 5120 * (22_656 + 10_240) * 2  # weights and their gradients, bfloat16
    planned = (kept + hidden + _made_in_backward(size, "M", grid, own)) * 2 * own + parameters
    assert planned / GIB == pytest.approx(measured, rel=0.1)


def test_pack_of_samples():
    config = recipe("stage1_sft_16k")
    load = pack_of(config)
    assert load.documents == (3462, 3462, 3462, 3462, 16220 - 4 * 3462)
    assert load.computed_documents[-1] == 16384 - 16220
    assert load.samples == pytest.approx(16220 / 3462)
    assert load.tiles == -(-int(16220 * 0.45) // 256)
    alone = pack_of(recipe("stage0_projector_warmup"))
    assert (alone.documents, alone.samples, alone.computed_documents) == ((2769,), 1, (2769, 16384 - 2769))
    text = replace(config, model=replace(config.model, parts=("language",)))
    assert pack_of(text).tiles == 0
    pruned = replace(config, data=replace(config.data, video_pruning_rate=0.75))
    assert pack_of(pruned).tiles == -(-int(16220 * 0.45) // 64)  # a frame that leaves a quarter is a whole one's work
    assert (heaviest(config, load).tiles, heaviest(pruned, load).tiles) == (64, 256)
    longer = replace(config, workload=replace(config.workload, sample_tokens=10**6))
    assert pack_of(longer).documents == (16220,)


def test_states_by_hand():
    """bf16 weights, fp32 gradients: whole on each holder. Master and moments: over those that hold the same weights."""
    config = recipe("stage1_sft_16k", "cluster=h100_x64", "parallel.tp=4")
    plan = make_plan(config)
    language, tower, projector = 12_320_486_912, 651_653_120, 209_720_320
    rest = tower + projector
    assert plan.memory.weights == pytest.approx(2 * (language / 4 + rest))
    assert plan.memory.gradients == pytest.approx(4 * (language / 4 + rest))
    assert plan.memory.optimizer == pytest.approx(12 * (language / 4 / 16 + rest / 64))
    whole = replace(config, optim=replace(config.optim, distributed=False))
    assert make_plan(whole).memory.optimizer == pytest.approx(12 * (language / 4 + rest))
    warmup = make_plan(recipe("stage0_projector_warmup", "cluster=h100_x8"))
    assert warmup.memory.gradients == 4 * projector
    assert warmup.memory.optimizer == 12 * projector / 8


def test_memory_falls_as_it_should():
    config = recipe("stage2_video_sft_49k")
    load = pack_of(config)
    base = memory(config, Grid(tp=4, cp=2, dp=64, sequence_parallel=True), load)
    wider = memory(config, Grid(tp=8, cp=2, dp=32, sequence_parallel=True), load)
    plain = memory(config, Grid(tp=4, cp=2, dp=64), load)
    # One key head a rank, which two context parallel ranks cannot share: each gathers keys and values of six layers.
    gathered = 2 * 6 * 2 * 128 * 49152 / 2
    assert wider.activations == base.activations / 2 + gathered
    assert plain.activations > 1.4 * base.activations  # norms' inputs and outputs whole on every rank
    alone = memory(config, Grid(sequence_parallel=True), load)
    assert base.vision == pytest.approx(alone.vision / 8, rel=0.1)  # the ranks of a pack share its tiles
    again = memory(config, Grid(tp=4, cp=2, dp=64, sequence_parallel=True), load, Policy(full_recompute_layers=None))
    assert again.activations == pytest.approx(2 * 62 * 5120 * 49152 / 8)
    assert again.working > base.working
    frozen = replace(config, trainer=replace(config.trainer, train=("projector",)))
    assert (
        memory(frozen, Grid(tp=4, cp=2), load).activations < 0.75 * memory(config, Grid(tp=4, cp=2), load).activations
    )
    nothing = replace(load, tiles=0)
    assert memory(frozen, Grid(tp=4, cp=2), nothing).activations == 0


def test_device_decides_what_fits():
    assert not make_plan(recipe("stage3_code_recovery_49k", *KEPT)).fits
    bigger = make_plan(recipe("stage3_code_recovery_49k", *KEPT, "cluster.gpu=h200_141gb"))
    assert bigger.fits
    assert bigger.headroom == pytest.approx(143771 * 2**20 - 9 * GIB - bigger.memory.total)
    assert would_fit(bigger) == {}


def test_what_does_not_fit_names_the_options_that_make_it_fit():
    plan = make_plan(recipe("stage2_video_sft_49k", *KEPT))
    first = warnings(plan)[0]
    assert first.startswith("does not fit")
    helping = next(options for options, row in would_fit(plan).items() if row["fits"])
    assert f"set {helping}" in first
    assert make_plan(recipe("stage2_video_sft_49k", "cluster=h100_x8", *helping.split())).fits
    assert make_plan(recipe("stage2_video_sft_49k", "cluster=h100_x8")).fits, "the recipe asks for them"
    assert Policy() == policy_of(plan.config), "the default recomputes nothing"
    assert all(row["bytes"] < plan.memory.total for row in would_fit(plan).values())


def test_what_fits_in_another_layout_says_which():
    plan = make_plan(recipe("stage1_sft_16k", "cluster=h100_x64", "parallel.tp=2"))
    first = warnings(plan)[0]
    assert first.startswith("does not fit")
    assert first.endswith("set parallel.tp=4 parallel.cp=1 parallel.sequence_parallel=true")
    assert make_plan(recipe("stage1_sft_16k", "cluster=h100_x64", *first.split("; set ")[1].split())).fits


def test_warnings():
    plan = make_plan(recipe("stage1_sft_16k", "trainer.global_batch=200", "trainer.steps=100"))
    text = "\n".join(warnings(plan))
    for part in (
        "200 packs on 128 data parallel ranks",
        "workload.samples is 32,500,000",
    ):
        assert part in text, part
    assert "adding gradients takes" in "\n".join(warnings(make_plan(recipe("stage1_sft_16k"))))
    assert "waits" not in text
    short = make_plan(recipe("stage1_sft_16k", "cluster=h100_x8", "data.seq_length=2048", "workload.visual_fraction=0"))
    assert "the GPUs wait for the host" in "\n".join(warnings(short))
    assert "is padding" in "\n".join(warnings(make_plan(recipe("stage0_projector_warmup"))))


def test_traffic_by_hand():
    config = recipe("stage3_code_recovery_49k", "cluster=h100_x64")
    plan = make_plan(config)
    found = {flow.purpose: flow for flow in plan.flows}
    assert plan.packs_per_rank == 16
    tokens = 16 * 49152 / 2
    assert found["tensor parallel"].bytes_per_step == pytest.approx(5 * 62 * tokens * 5120 * 2 * 3 / 4)
    states = 28 * 2 * 16 * 1 * 10240 * 128 * 4 / 4
    attention = 6 * 2 * tokens * (40 + 40 + 16) * 128 * 2 / 4 / 2
    assert found["context parallel"].bytes_per_step == pytest.approx(states + attention)
    assert found["gradients, language"].bytes_per_step == pytest.approx(12_320_486_912 / 4 * 4 * 15 / 16)
    links = {purpose: flow.link for purpose, flow in found.items()}
    assert links["tensor parallel"] == links["context parallel"] == "nvlink"
    assert links["gradients, language"] == links["gradients, vision and projector"] == "network"
    # Two members of a gradient group in each node share two adapters; all eight would be faster than NVLink.
    assert found["gradients, language"].seconds == pytest.approx(found["gradients, language"].bytes_per_step / 90e9)
    far = make_plan(recipe("stage4_long_context_300k"))
    (context,) = (flow for flow in far.flows if flow.purpose == "context parallel")
    assert context.link == "network"
    # One key head a rank cannot be shared by eight: keys and values of the other seven are gathered.
    tokens = 16 * 311_296 / 8
    gathered = 6 * 2 * tokens * 7 * 2 * 128 * 2
    assert context.bytes_per_step == pytest.approx(gathered + 28 * 2 * 16 * 7 * 10240 * 128 * 4 / 8)
    single = flows(config, Grid(), pack_of(config), Policy(), GPU_TYPES["h100_80gb"], packs=1)
    assert single == []


def test_heads_exchanged_instead_of_states():
    config = recipe("stage3_code_recovery_49k", "cluster=h100_x64")
    heads = replace(config, parallel=replace(config.parallel, mamba_context="head_exchange"))
    states, exchanged = (
        next(flow.bytes_per_step for flow in make_plan(c).flows if flow.purpose == "context parallel")
        for c in (config, heads)
    )
    tokens = 16 * 49152 / 2
    columns = 22_656 + 10_240  # of the input projection, and back what the scan made of them
    state = 28 * 2 * 16 * 10240 * 128 * 4 / 4
    assert exchanged - states == pytest.approx(28 * 2 * tokens * columns * 2 / 4 / 2 - state)
    assert all(plan.config.parallel.mamba_context == "head_exchange" for plan in search(heads))


def test_features_travel_to_the_ranks_that_hold_their_tokens():
    config = recipe("stage2_video_sft_49k", "cluster=h100_x64", "parallel.tp=4")
    plan = make_plan(config)
    (moved,) = (flow for flow in plan.flows if flow.purpose == "features")
    assert moved.bytes_per_step == pytest.approx(2 * 16 * plan.load.tiles * 256 / 8 * 5120 * 2 * 7 / 8)
    whole = replace(config, parallel=replace(config.parallel, sequence_parallel=False))
    (copied,) = (flow for flow in make_plan(whole).flows if flow.purpose == "features")
    assert copied.bytes_per_step == 4 * moved.bytes_per_step  # each of the TP ranks holds all rows
    assert plan.time.features > 0


def test_more_nodes_trade_accumulation_for_traffic():
    rows = node_scaling(make_plan(recipe("stage1_sft_16k")))
    assert [row["gpus"] for row in rows] == [4 * 2**i for i in range(8)]
    assert [row["packs_per_rank"] for row in rows] == [2**i for i in range(7, -1, -1)]
    seconds, shares = [row["step_seconds"] for row in rows], [row["reduce_share"] for row in rows]
    assert seconds == sorted(seconds, reverse=True)
    assert shares == sorted(shares)
    assert seconds[-1] > seconds[0] / 128


def test_speed_is_counted_on_useful_tokens():
    padded, packed = (make_plan(recipe(name)) for name in ("stage0_projector_warmup", "stage0_projector_warmup_packed"))
    assert packed.tokens_per_second_per_gpu > 4 * padded.tokens_per_second_per_gpu
    assert packed.mfu > 3 * padded.mfu
    assert 0.2 < packed.mfu < 0.6


def test_search_ranks_what_fits_by_time():
    plans = search(recipe("stage3_code_recovery_49k", "cluster=h100_x64"))
    fit = [plan.fits for plan in plans]
    assert fit == sorted(fit, reverse=True)
    assert 0 < sum(fit) < len(fit)
    seconds = [plan.time.total for plan in plans if plan.fits]
    assert seconds == sorted(seconds)
    layouts = {(plan.grid.tp, plan.grid.cp) for plan in plans}
    assert (4, 2) in layouts
    assert all(plan.grid.gpus == 64 and plan.grid.tp <= 8 for plan in plans)
    assert all(49152 % (plan.grid.pack_ranks * 128) == 0 for plan in plans)


def test_search_says_what_it_needs():
    config = compose_run("tiny/stage1_sft_16k", ["trainer.global_batch=1"])
    with pytest.raises(ConfigError, match=r"cluster\.gpus is empty"):
        search(config)
    with pytest.raises(ConfigError, match=r"no layout on 3 GPUs is legal.*"):
        search(replace(config, cluster=replace(config.cluster, gpus=3)))


def test_adapters_by_hand():
    """Rank 16 on every linear layer of the language model; nothing else has gradients or optimizer state."""
    config = compose_run("finetune/lora")
    size, grid = config.model.language, make_plan(config).grid
    inner = size.mamba_num_heads * size.mamba_head_dim
    projected = 2 * inner + 2 * size.mamba_num_groups * size.mamba_state_dim + size.mamba_num_heads
    heads, keys = size.num_attention_heads * size.head_dim, 2 * size.num_query_groups * size.head_dim
    hidden, ffn = size.hidden_size, size.ffn_hidden_size
    widths = 28 * (hidden + projected + inner + hidden) + 6 * (hidden + heads + keys + heads + hidden)
    widths += 28 * 2 * (hidden + ffn)
    plan = make_plan(config)
    parameters = to_json(plan)["parameters"]
    assert parameters["trained"] == parameters["parts"]["language"]["adapters"] == 16 * widths
    assert plan.memory.gradients == 16 * widths / grid.tp * 4
    assert plan.memory.optimizer == 16 * widths / grid.tp * 12
    assert plan.checkpoint_bytes == 16 * widths * (2 + 12)
    kept = ["recompute.language=none", "recompute.vision=none"]
    full = make_plan(compose_run("finetune/full", ["cluster=h100_x4", *kept]))
    # Layers keep what their adapters read, and their products have no weight gradients.
    assert plan.memory.activations == full.memory.activations
    assert plan.time.matrices == pytest.approx(full.time.matrices * 2 / 3, rel=0.02)
    frozen = replace(
        config, adapter=replace(config.adapter, rank=0), trainer=replace(config.trainer, train=("vision",))
    )
    assert make_plan(frozen).memory.activations < plan.memory.activations


def test_fp8_halves_what_linears_keep_and_leaves_nothing_to_select():
    plain, fp8 = (recipe("stage1_sft_16k", *KEPT, f"precision.fp8={fp8}") for fp8 in ("none", "blockwise"))
    load, grid, size = pack_of(plain), Grid(tp=4, sequence_parallel=True), plain.model.language
    kept = [memory(config, grid, load).activations for config in (plain, fp8)]
    # Inputs of both linears of the 60 layers between the ends lose 15/32 of their bytes, attention's output is kept
    # twice; an MLP layer's is 4 x hidden wide inside, a Mamba layer's 2 x hidden, and each reads its norm's output.
    inner = size.hybrid_pattern[1:-1]
    counts = {kind: inner.count(kind) for kind in "M*-"}
    inputs = counts["M"] * 3 + counts["-"] * 5 + counts["*"]
    numbers = load.seq_length * size.hidden_size / grid.tp
    saved = numbers * (inputs * (1 - 33 / 64) - counts["*"] * 33 / 64)
    assert kept[0] - kept[1] == pytest.approx(2 * saved)
    selective = replace(fp8, recompute=replace(fp8.recompute, language="selective"))
    ends = kept[1] - memory(selective, grid, load).activations
    assert 0 < ends < 0.05 * kept[1], "only the layers at the ends drop anything"


def test_what_goes_to_the_host_leaves_the_device():
    full = recipe("stage4_long_context_300k", "cluster=h100_x8", "recompute.language=full")
    offload = replace(full, recompute=replace(full.recompute, language="offload"))
    plans = [make_plan(config) for config in (full, offload)]
    layers = full.model.language.num_layers
    gone = plans[0].memory.activations - plans[1].memory.activations
    assert gone == pytest.approx(plans[0].memory.activations * (layers - 3) / layers)
    assert plans[0].host_bytes == 0
    assert plans[1].host_bytes == layers * block(plans[0].memory.activations / layers)
    assert to_json(plans[1])["memory"]["host"] == round(plans[1].host_bytes)

    resting = make_plan(replace(full, optim=replace(full.optim, offload=True)))
    before, after = plans[0].memory, resting.memory
    passing = before.activations + before.working + before.vision + before.logits
    # Of what passes and what rests the larger counts.
    assert after.total == pytest.approx(before.total - min(before.optimizer, passing))
    # Matrices of a rank, master weight and two moments each, by hand: those of the 12B at the plan's TP.
    tp, size = resting.grid.tp, full.model.language
    projected = 2 * size.mamba_inner_size + 2 * size.mamba_num_groups * size.mamba_state_dim + size.mamba_num_heads
    heads = size.num_attention_heads * size.head_dim
    matrices = 28 * [projected * 5120, 10240 * 5120, 20480 * 5120, 20480 * 5120]
    matrices += 6 * [(heads + 2 * size.num_query_groups * size.head_dim) * 5120, heads * 5120]
    matrices += 2 * [size.vocab_size * 5120]
    blocks = sum(3 * block(4 * count / tp) for count in matrices) / resting.grid.dp / resting.grid.cp
    assert resting.host_bytes == pytest.approx(blocks, rel=0.15)  # tower and projector are in the plan alone
    assert resting.host_bytes > 1.2 * before.optimizer


def block(size):
    """Bytes of page-locked memory for a tensor, as PyTorch rounds it."""
    return 2 ** (math.ceil(size) - 1).bit_length()


def test_an_input_of_797_megabytes_takes_a_block_of_one_gibibyte():
    layout = ("parallel.tp=1", "parallel.cp=4", "parallel.sequence_parallel=false")
    plan = make_plan(recipe("stage4_long_context_300k", "cluster=h100_x4", "recompute.language=offload", *layout))
    each = 311_296 / 4 * 5120 * 2
    assert each == pytest.approx(797e6, rel=1e-3)
    assert plan.host_bytes == plan.config.model.language.num_layers * 2**30
    moved = make_plan(recipe("stage2_video_sft_49k", "recompute.language=none", "recompute.vision=offload"))
    tiles, tower = moved.heaviest.dealt_tiles(moved.grid.pack_ranks), moved.config.model.vision
    width = 2 * ((tower.tile_size // tower.patch_size) ** 2 + tower.prefix_tokens) * tower.hidden_size
    calls = [128] * (tiles // 128) + [tiles % 128] * bool(tiles % 128)
    assert moved.host_bytes == tower.num_layers * sum(block(width * n) for n in calls) > 0


def test_optimizer_state_on_the_host_costs_the_time_of_two_copies():
    full = recipe("stage1_sft_16k", "cluster=h100_x8")
    plan = make_plan(full)
    resting = make_plan(replace(full, optim=replace(full.optim, offload=True)))
    link = GPU_TYPES["h100_80gb"].host_link_bytes
    assert resting.time.state_copies == pytest.approx(2 * plan.memory.optimizer / link)
    assert resting.time.total - plan.time.total == pytest.approx(resting.time.state_copies)
    assert plan.time.state_copies == 0
    assert "count as hidden" not in "\n".join(warnings(resting))
    assert "the link to host memory" in "\n".join(warnings(resting))
    inputs = make_plan(replace(full, recompute=replace(full.recompute, language="offload")))
    assert inputs.time.state_copies == 0
    assert "count as hidden" in "\n".join(warnings(inputs))


def test_background_saves_take_host_memory_too():
    from nemovl_train.checkpoint import storage

    assert storage._SLAB_BYTES == SAVE_BLOCK_BYTES
    config = recipe("stage1_sft_16k", "cluster=h100_x8")
    plan = make_plan(config)
    # The first rank writes the weights that it has, and its share of the optimizer state, in whole blocks.
    written = plan.memory.weights + plan.memory.optimizer
    assert 0 <= plan.save_bytes - written < SAVE_BLOCK_BYTES
    assert to_json(plan)["memory"]["host_save"] == plan.save_bytes
    waited = replace(config, checkpoint=replace(config.checkpoint, in_background=False))
    assert make_plan(waited).save_bytes == 0


def test_the_units_ran_with_a_loss_that_made_logits_twice():
    """A quarter of that head's time is what today's plans leave out."""
    (case,) = (case for case in CASES if case.name == "unit_none")
    config = RunConfig(
        model=ModelConfig(parts=("language",), language=case.language), trainer=TrainerConfig(train=("language",))
    )
    load = replace(pack_of(recipe("stage1_sft_16k")), tiles=0, head_tokens=16384)
    gpu = GPU_TYPES["h100_80gb"]
    then, now = (
        step_time(config, case.grid, load, gpu, packs=2, policy=policy).matrices
        for policy in (case.policy, replace(case.policy, head_made_again=False))
    )
    assert case.policy.head_made_again
    assert then - now == pytest.approx(2 * 2 * 16384 * 5120 * 16384 / gpu.gemm_flops)
