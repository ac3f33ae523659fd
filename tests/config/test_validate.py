"""Ranges and combinations, one wrong value at a time."""

from dataclasses import replace

import pytest

from nemovl_train.config.compose import compose_run
from nemovl_train.config.dump import config_diff
from nemovl_train.config.schema import ModelConfig, RunConfig
from nemovl_train.config.validate import validate_run, world_problems
from nemovl_train.exceptions import ConfigError


@pytest.fixture(scope="module")
def base() -> RunConfig:
    return compose_run("tiny/stage1_sft_16k")


def changed(config, key: str, value):
    head, _, rest = key.partition(".")
    return replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("run.name", "a/b", "run.name='a/b'"),
        ("run.stage", "a/../b", "run.stage"),
        ("run.root", "", "run.root"),
        ("data.seq_length", 0, "at least 1"),
        ("data.seq_length", 250, "nearest: 224 or 256"),
        ("data.packing", "bfdd", "did you mean bfd?"),
        ("data.loss.mode", "squared", "did you mean square?"),
        ("data.loss.unit", "pack", "choose from sample, turn"),
        ("data.tile_size", 512, "nearest: 64"),
        ("data.sources", {}, "data.sources is empty"),
        ("data.tokenizer", "", "tokenizer.json"),
        ("data.video_fps", 0.0, "must be above 0"),
        ("data.video_pruning_rate", 1.0, "between 0 and 1 (exclusive)"),
        ("data.video_pruning_rate", -0.5, "nearest: 0"),
        ("data.num_workers", -1, "at least 0"),
        ("model.vision.tile_size", 48, "nearest: 32 or 64"),
        ("model.vision.max_resolution", 32, "at least 64"),
        ("model.vision.hidden_size", 66, "nearest: 64 or 68"),
        ("model.language.hybrid_pattern", "MX", "hybrid_pattern"),
        ("model.language.num_attention_heads", 6, "nearest: 4 or 8"),
        ("model.language.vocab_size", 2000, "at least 2560"),
        ("model.language.activation", "relu", "squared_relu"),
        ("model.tokens.image", 9999, "a row of the embedding, 0 to 2575"),
        ("model.parts", ("language", "vision"), "come together"),
        ("trainer.train", ("vison",), "did you mean vision?"),
        ("trainer.train", (), "at least one of"),
        ("trainer.steps", 0, "at least 1"),
        ("trainer.global_batch", 0, "at least 1"),
        ("parallel.tp", 3, "parallel.tp=3"),
        ("parallel.sequence_parallel", True, "sequence_parallel"),
        ("precision.backend", "cuda", "choose from auto, te, torch"),
        ("precision.params", "fp16", "did you mean bf16?"),
        ("engine.name", "deepsped", "did you mean deepspeed?"),
        ("engine.offload_optimizer", True, "set engine.name=deepspeed"),
        ("optim.lr", 0.0, "must be above 0"),
        ("optim.lr", float("nan"), "must be above 0"),
        ("optim.min_lr", 1.0, "nearest"),
        ("optim.warmup_fraction", 1.5, "nearest: 1"),
        ("optim.beta2", 1.0, "exclusive"),
        ("optim.loss_divisor", "mean", "choose from global, pack"),
        ("optim.states", "lean", "needs precision.params=bf16"),
        ("optim.states", "bf16", "did you mean bf16_moments?"),
        ("recompute.language", "selectve", "did you mean selective?"),
        ("recompute.vision", "0", "choose from none, selective, full, offload, tiles"),
        ("recompute.language_layers", 2, "recompute.language=full alone"),
        ("checkpoint.keep_last", 0, "at least 1"),
        ("data.packing", "balance", "did you mean balanced"),
        ("data.read.attempts", 0, "data.read.attempts=0: at least 1"),
        ("data.read.timeout_s", 0.0, "data.read.timeout_s=0.0: must be above 0"),
        ("data.shuffle.block_mib", -1.0, "data.shuffle.block_mib=-1.0: must be above 0"),
        ("data.cost.visual_token", -0.1, "at least 0"),
        ("evaluation.max_samples", 0, "at least 1"),
        ("evaluation.seq_length", 100, "nearest: 96 or 128"),
        ("evaluation.every_steps", -1, "at least 0"),
        ("evaluation.keep_best", True, "evaluation.keep_best=true needs a held-out loss while training"),
        ("evaluation.patience", 3, "set evaluation.every_steps=100"),
        ("evaluation.sources", {"x": ""}, "evaluation.sources.x is empty"),
        ("logging.every_steps", 0, "at least 1"),
        ("cluster.gpu", "h100", "did you mean h100_80gb?"),
        ("cluster.gpus", 0, "at least 1"),
        ("cluster.gpus", 12, "nearest: 8 or 16"),
        ("cluster.gpus", 16, "use at least 16, or at most 4 processes"),
        ("cluster.gpus_per_node", 0, "at least 1"),
        ("workload.samples", 0, "at least 1"),
        ("workload.sample_tokens", 0, "at least 1"),
        ("workload.visual_fraction", 1.5, "nearest: 1"),
        ("workload.supervised_fraction", -0.1, "nearest: 0"),
        ("workload.fill", 0.0, "nearest: 0.01"),
    ],
)
def test_one_wrong_value(base: RunConfig, key: str, value, part: str):
    found = validate_run(changed(base, key, value))
    assert any(part in problem for problem in found), found
    assert all("=" in problem or " is empty" in problem or ":" in problem for problem in found)


def test_a_blend_has_weights_or_epochs(base: RunConfig):
    sources = {name: replace(source, epochs=2.0) for name, source in base.data.sources.items()}
    assert validate_run(changed(base, "data.sources", sources)) == []
    first, *others = sources
    mixed = {**sources, first: replace(sources[first], epochs=None)}
    (problem,) = validate_run(changed(base, "data.sources", mixed))
    assert f"{others[-1]} with epochs, {first} with weight; give all of them epochs, or none" in problem
    none = {name: replace(source, epochs=0.0) for name, source in sources.items()}
    assert "every weight is 0" in validate_run(changed(base, "data.sources", none))[0]


def test_frozen_text_only_model_needs_no_media_rows(base: RunConfig):
    text = changed(changed(base, "model.parts", ("language",)), "model.language.vocab_size", 2560)
    assert validate_run(changed(text, "trainer.train", ("language",))) == []
    assert "not among model.parts" in validate_run(text)[0]


@pytest.fixture(scope="module")
def full_size() -> RunConfig:
    fp8 = ["cluster=h100_x8", "precision.fp8=blockwise"]
    return compose_run("nano_12b_v2_vl/stage1_sft_16k", fp8)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("precision.fp8", "blockwize", "did you mean blockwise?"),
        ("precision.bf16_layers", -1, "at least 0"),
        ("precision.params", "fp32", "needs precision.params=bf16"),
        ("precision.backend", "torch", "needs precision.backend=te"),
        ("engine.name", "deepspeed", "set precision.fp8=none with engine.name=deepspeed"),
        ("cluster.gpu", "a100_80gb", "has no FP8"),
        ("model.vision.prefix_tokens", 8, "nearest: 16, or keep the tower in bf16 with precision.bf16_blocks=16"),
        ("model.vision.hidden_size", 1288, "nearest: 1280 or 1296"),
        ("model.projector.ffn_hidden_size", 20472, "nearest: 20464 or 20480"),
        ("model.language.hidden_size", 5128, "nearest: 5120 or 5136"),
        ("model.language.mamba_num_heads", 136, "Mamba projection 23944"),
    ],
)
def test_what_fp8_asks_for(full_size: RunConfig, key: str, value, part: str):
    found = validate_run(changed(full_size, key, value))
    assert any(part in problem for problem in found), found


def test_fp8_wants_whole_blocks_of_tokens_on_every_rank(full_size: RunConfig):
    """The scan's chunk is the rule otherwise; half a chunk shows that this one is its own."""
    half = changed(full_size, "model.language.chunk_size", 64)
    ranks = half.parallel.tp * half.parallel.cp
    odd = changed(half, "data.seq_length", 64 * ranks * 3)
    (problem,) = validate_run(odd)
    assert f"a multiple of 128 on each of parallel.tp x parallel.cp = {ranks} ranks" in problem
    assert f"nearest: {128 * ranks} or {256 * ranks}" in problem
    assert validate_run(changed(odd, "precision.fp8", "none")) == []


def test_every_full_size_recipe_can_train_in_fp8():
    for stage in ("stage0_projector_warmup", "stage1_sft_16k", "stage4_long_context_300k"):
        for cluster in ("h100_x4", "h100_x64"):
            config = compose_run(f"nano_12b_v2_vl/{stage}", [f"cluster={cluster}", "precision.fp8=blockwise"])
            assert config.precision.fp8 == "blockwise"


def test_a_run_in_bf16_is_continued_in_fp8_only_when_told(full_size: RunConfig):
    (change,) = config_diff(changed(full_size, "precision.fp8", "none"), full_size)
    assert str(change) == "precision.fp8: 'none' -> 'blockwise'"


def test_a_layout_that_its_cluster_does_not_allow_is_said_once(base: RunConfig):
    two = changed(changed(base, "parallel.tp", 2), "cluster.gpus", 3)
    found = validate_run(two)
    assert len(found) == 1
    assert found[0].startswith("cluster.gpus=3: parallel.tp=2 x parallel.cp=1 = 2 does not divide the 3 processes")


def test_context_parallel_lengths(base: RunConfig):
    long = changed(changed(base, "parallel.cp", 2), "data.seq_length", 224)
    found = validate_run(long)
    assert found == [
        "parallel.cp=2: data.seq_length=224 does not divide into whole chunks (parallel.tp x parallel.cp x "
        "model.language.chunk_size = 64); set parallel.cp=1, or data.seq_length=192 or 256"
    ]
    assert validate_run(changed(base, "parallel.cp", 2)) == []
    # The length is fine by itself: the layout is answered with a layout, and one that can run.
    three = validate_run(changed(base, "parallel.cp", 3))
    assert three[0].startswith("parallel.cp=3: data.seq_length=256 ")
    assert "set parallel.cp=2, or data.seq_length=192 or 288" in three[0]
    # A length that no layout could take stays the length's problem.
    bad = validate_run(changed(changed(base, "parallel.cp", 2), "data.seq_length", 250))
    assert any(p.startswith("data.seq_length=250: must be a multiple of") for p in bad)


def test_world_sizes(base: RunConfig):
    assert world_problems(base, 4) == []
    assert "at least 1" in world_problems(base, 0)[0]
    two = changed(base, "parallel.tp", 2)
    assert "3 processes" in world_problems(two, 3)[0]
    assert "use at least 16, or at most 4 processes" in world_problems(base, 16)[0]


def test_bf16_gradients_are_added_up_a_few_times_only(base: RunConfig):
    lean = changed(changed(base, "optim.states", "lean"), "trainer.global_batch", 64)
    assert world_problems(lean, 8) == []
    (problem,) = world_problems(lean, 4)
    assert "at most 32" in problem
    assert "optim.states=bf16_moments" in problem


@pytest.mark.parametrize("name", ["nano_12b_v2_vl", "nano_8b_v1_vl"])
def test_released_sizes_are_legal(name: str):
    overrides = [f"model={name}", "data.tile_size=512", "data.seq_length=16384", "evaluation.seq_length=16384"]
    config = compose_run("tiny/stage1_sft_16k", overrides)
    assert config.model.tokens_per_tile == 256
    for tp in (1, 2, 4, 8):
        assert validate_run(changed(config, "parallel.tp", tp)) == []


def test_the_12b_file_equals_the_schema_defaults():
    """The schema's defaults are the released model; the file spells them out for readers."""
    try:
        config = compose_run("tiny/stage1_sft_16k", ["model=nano_12b_v2_vl"])
    except ConfigError as error:
        assert all("tile_size" in p or "seq_length" in p for p in error.problems)  # noqa: PT017
        config = compose_run(
            "tiny/stage1_sft_16k",
            ["model=nano_12b_v2_vl", "data.tile_size=512", "data.seq_length=16384", "evaluation.seq_length=16384"],
        )
    assert config.model == ModelConfig()
    pattern = config.model.language.hybrid_pattern
    assert (pattern.count("M"), pattern.count("-"), pattern.count("*"), len(pattern)) == (28, 28, 6, 62)
    assert [i for i, kind in enumerate(pattern) if kind == "*"] == [7, 16, 25, 34, 43, 52]


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("engine.zero_stage", 0, "between 1 and 3; nearest: 1"),
        ("engine.zero_stage", 4, "nearest: 3"),
        ("parallel.tp", 2, "data parallel only; set parallel.tp=1"),
        ("parallel.cp", 2, "data parallel only; set parallel.cp=1"),
        ("optim.overlap_grad_reduce", True, "set optim.overlap_grad_reduce=false"),
        ("optim.distributed", False, "set optim.distributed=true"),
        ("optim.lr_scale.vision", 0.1, "set optim.lr_scale.vision=1"),
        ("adapter.rank", 16, "trains whole weights; set adapter.rank=0"),
        ("trainer.check_replicas_every", 100, "set trainer.check_replicas_every=0"),
    ],
)
def test_deepspeed_refuses_one_wrong_value(key, value, part):
    config = changed(compose_run("tiny/finetune_deepspeed"), key, value)
    assert any(part in problem for problem in validate_run(config)), validate_run(config)


@pytest.mark.parametrize(
    ("stage", "params", "offload", "problems"),
    [
        (1, "fp32", True, []),
        (2, "bf16", False, []),
        (3, "bf16", True, []),
        (1, "bf16", False, ["set engine.zero_stage=2"]),
        (1, "bf16", True, ["set engine.zero_stage=3"]),
        (2, "bf16", True, ["set engine.zero_stage=3"]),
    ],
)
def test_deepspeed_in_bfloat16_only_where_gradients_add_up_in_float32(stage, params, offload, problems):
    config = compose_run("tiny/finetune_deepspeed")
    for key, value in (
        ("engine.zero_stage", stage),
        ("engine.offload_optimizer", offload),
        ("precision.params", params),
    ):
        config = changed(config, key, value)
    found = validate_run(config)
    assert len(found) == len(problems), found
    assert all(part in problem for part, problem in zip(problems, found, strict=True))


def test_all_problems_of_a_deepspeed_run_at_once():
    config = compose_run("tiny/finetune_deepspeed")
    changes = {
        "engine.zero_stage": 2,
        "engine.offload_params": True,
        "parallel.cp": 2,
        "adapter.rank": 16,
        "optim.lr_scale.language": 2.0,
        "trainer.check_replicas_every": 1,
    }
    for key, value in changes.items():
        config = changed(config, key, value)
    found = " ".join(validate_run(config))
    for part in ("engine.offload_params=true", *(f"{key}=" for key in list(changes)[2:])):
        assert part in found


def test_a_heldout_loss_while_training_needs_sets(base: RunConfig):
    without = replace(base.evaluation, sources={}, every_steps=10)
    (problem,) = validate_run(replace(base, evaluation=without))
    assert "evaluation.every_steps=10: evaluation.sources is empty" in problem
    assert not validate_run(replace(base, evaluation=replace(base.evaluation, every_steps=10, patience=2)))
