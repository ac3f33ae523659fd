"""Ranges and combinations that types cannot express. Every check yields sentences; nothing stops at the first.

A sentence starts with `key=value`, says what is allowed, and names the nearest legal value where there is one.
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from data_pipelines.config import LOSS_MODES, LOSS_UNITS, PACKING_MODES
from nemovl_train.config.adapters import adapter_problems
from nemovl_train.config.nearest import did_you_mean, nearest_multiples
from nemovl_train.config.precision import FP8, fp8_problems
from nemovl_train.config.schema import PARTS, EvalConfig, RunConfig, RunSection, ScheduleConfig, VisionConfig
from nemovl_train.exceptions import ConfigError
from nemovl_train.parallel.legality import launched_processes, layout_problems, nearest_context

ACTIVATIONS = ("squared_relu", "swiglu")
POSITIONS = ("none", "rope")
PROJECTOR_NORMS = ("rmsnorm", "layernorm")
PROJECTOR_ACTIVATIONS = ("squared_relu", "gelu")
VISION_ACTIVATIONS = ("gelu", "gelu_tanh")
PARAMS = ("fp32", "bf16")
BACKENDS = ("auto", "te", "torch")
DIVISORS = ("global", "pack")
ENGINES = ("megatron", "deepspeed")
LANGUAGE_RECOMPUTE = ("none", "selective", "full", "offload")
STATES = ("fp32", "bf16_moments", "lean")
VISION_RECOMPUTE = ("none", "selective", "full", "offload", "tiles")
MAKERS = ("none", "tiny")
GPUS = ("h100_80gb", "h200_141gb", "a100_80gb", "b200_180gb")
MOST_BF16_SUMS = 8
"""Micro-batches of a step whose gradients are added up in bfloat16, which has 8 bits: more would lose small ones."""
PIXEL_SHUFFLE = 2
"""Patches on a side that the projector joins into one token."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def validate_run(config: RunConfig, *, world_size: int | None = None) -> list[str]:
    """Problems of one stage.

    Args:
        config: A complete config.
        world_size: Processes of the run; combinations that need it are skipped when None.
    """
    problems = [
        *_run_section(config.run),
        *_language(config),
        *_tokens(config),
        *_data(config),
        *_precision_and_optim(config),
        *fp8_problems(config),
        *_engine(config),
        *_recompute(config),
        *_trainer(config),
        *adapter_problems(config),
        *_rest(config),
        *_layout(config),
        *_cluster(config),
        *_workload(config),
    ]
    if "vision" in config.model.parts:
        problems += _vision(config.model.vision)
        problems += _tiles(config)
    if world_size is not None:
        problems += world_problems(config, world_size)
    return problems


def world_problems(config: RunConfig, world_size: int) -> list[str]:
    """Problems of running a config on this many processes."""
    if world_size < 1:
        return [f"{world_size} processes: at least 1"]
    problems = layout_problems(config.parallel, world_size)
    group = config.parallel.tp * config.parallel.cp
    if problems:
        return problems
    dp = world_size // group
    most = MOST_BF16_SUMS * dp
    if config.optim.states == "lean" and config.trainer.global_batch > most:
        return [
            f"optim.states=lean: {config.trainer.global_batch} packs over {dp} data parallel ranks would add up more "
            f"than {MOST_BF16_SUMS} gradients in bfloat16 (trainer.global_batch of at most {most}); set "
            "optim.states=bf16_moments"
        ]
    if dp <= config.trainer.global_batch:
        return []
    return [
        f"trainer.global_batch={config.trainer.global_batch}: {dp} data parallel ranks would share it, some would "
        f"never see data; use at least {dp}, or at most {config.trainer.global_batch * group} processes"
    ]


def refuse_processes(stages: Sequence[RunConfig]) -> None:
    """Raise ConfigError where this run's processes do not suit a stage; asked before torch is imported."""
    found = [problem for stage in stages for problem in world_problems(stage, launched_processes())]
    if found:
        raise ConfigError(list(dict.fromkeys(found)))


def validate_schedule(config: ScheduleConfig, stages: Sequence[RunConfig]) -> list[str]:
    """Problems of a chain, given its composed stages."""
    problems = [*_run_section(config.run), *_choice("parts.make", config.parts.make, MAKERS)]
    if not config.stages:
        problems.append("stages=[]: a schedule has at least one stage")
    if config.seed < 0:
        problems.append(f"seed={config.seed}: at least 0")
    for key in ("language", "vision"):
        if config.parts.make == "none" and not getattr(config.parts, key):
            problems.append(f"parts.{key} is empty; give the folder of the pretrained part")
    names = [stage.run.stage for stage in stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"run.stage={name}: two stages of the schedule would share this folder; set run.stage in one")
    for index, stage in enumerate(stages):
        if stage.model != config.model:
            keys = ", ".join(_different(asdict(config.model), asdict(stage.model), "model."))
            recipe = config.stages[index].recipe
            problems.append(f"stages.{index} ({recipe}): other model than the schedule's in {keys}")
        if stage.trainer.dry_run:
            problems.append(
                f"stages.{index} ({config.stages[index].recipe}): trainer.dry_run trains nothing that a schedule could "
                "hand on; try the stage alone, with `nemovl train`"
            )
        if stage.adapter.rank:
            problems.append(
                f"stages.{index} ({config.stages[index].recipe}): adapter.rank={stage.adapter.rank}, and a schedule "
                "hands whole models on; train adapters with `nemovl train` and merge them with `nemovl convert merge`"
            )
    return problems


def _different(a: dict[str, object], b: dict[str, object], prefix: str) -> Iterator[str]:
    for key in a:
        left, right = a[key], b[key]
        if isinstance(left, dict) and isinstance(right, dict):
            yield from _different(left, right, f"{prefix}{key}.")
        elif left != right:
            yield f"{prefix}{key}"


def _choice(key: str, value: str, choices: Sequence[str]) -> Iterator[str]:
    if value not in choices:
        hint = did_you_mean(value, choices) or f"; choose from {', '.join(choices)}"
        yield f"{key}={value} is not a choice{hint}"


def _at_least(key: str, value: float, minimum: float) -> Iterator[str]:
    if not value >= minimum or math.isinf(value):
        yield f"{key}={value}: at least {minimum}"


def _positive(key: str, value: float) -> Iterator[str]:
    if not value > 0 or math.isinf(value):
        yield f"{key}={value}: must be above 0"


def _within(key: str, value: float, low: float, high: float, *, open_end: bool = False) -> Iterator[str]:
    if not (low <= value < high if open_end else low <= value <= high):
        near = min(max(value, low), high) if not math.isnan(value) else low
        hint = "" if open_end and near == high else f"; nearest: {near:g}"
        yield f"{key}={value}: between {low:g} and {high:g}{' (exclusive)' if open_end else ''}{hint}"


def _divisible(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    if value < 1:
        yield f"{key}={value}: at least 1"
    elif by > 0 and value % by:
        yield f"{key}={value}: must be a multiple of {by_key} = {by}; nearest: {nearest_multiples(value, by)}"


def _run_section(run: RunSection) -> Iterator[str]:
    rule = "letters, digits, '.', '_' and '-', starting with a letter or digit"
    if not _NAME.fullmatch(run.name):
        yield f"run.name={run.name!r}: {rule}"
    if not all(_NAME.fullmatch(part) for part in run.stage.split("/")):
        yield f"run.stage={run.stage!r}: {rule}; '/' makes a subfolder"
    if not run.root or "\n" in run.root:
        yield f"run.root={run.root!r}: give the folder that holds the runs"


def _language(config: RunConfig) -> Iterator[str]:
    lm, prefix = config.model.language, "model.language"
    unknown = sorted(set(lm.hybrid_pattern) - set("M-*"))
    if unknown or not lm.hybrid_pattern:
        yield f"{prefix}.hybrid_pattern={lm.hybrid_pattern!r}: M (Mamba-2), - (MLP) or * (attention) for each layer"
    for key in ("hidden_size", "head_dim", "ffn_hidden_size", "mamba_head_dim", "mamba_state_dim", "chunk_size"):
        yield from _positive(f"{prefix}.{key}", getattr(lm, key))
    for key in ("norm_eps", "init_std", "rope_theta", "rope_scaling_factor"):
        yield from _positive(f"{prefix}.{key}", getattr(lm, key))
    for key in ("max_position", "conv_kernel", "base_vocab_size"):
        yield from _positive(f"{prefix}.{key}", getattr(lm, key))
    yield from _divisible(
        f"{prefix}.num_attention_heads", lm.num_attention_heads, f"{prefix}.num_query_groups", lm.num_query_groups
    )
    yield from _at_least(f"{prefix}.num_query_groups", lm.num_query_groups, 1)
    yield from _divisible(
        f"{prefix}.mamba_num_heads", lm.mamba_num_heads, f"{prefix}.mamba_num_groups", lm.mamba_num_groups
    )
    yield from _at_least(f"{prefix}.mamba_num_groups", lm.mamba_num_groups, 1)
    yield from _choice(f"{prefix}.activation", lm.activation, ACTIVATIONS)
    yield from _choice(f"{prefix}.position", lm.position, POSITIONS)
    yield from _at_least(f"{prefix}.vocab_size", lm.vocab_size, lm.base_vocab_size)


def _tokens(config: RunConfig) -> Iterator[str]:
    rows = config.model.language.vocab_size
    media = ("image", "image_start", "image_end", "video") if "vision" in config.model.parts else ()
    for key in ("pad", "bos", "eos", *media):
        value = getattr(config.model.tokens, key)
        if not 0 <= value < rows:
            yield f"model.tokens.{key}={value}: a row of the embedding, 0 to {rows - 1} (model.language.vocab_size)"


def _vision(vision: VisionConfig) -> Iterator[str]:
    prefix = "model.vision"
    for key in ("num_layers", "ffn_hidden_size", "patch_size", "norm_eps"):
        yield from _positive(f"{prefix}.{key}", getattr(vision, key))
    yield from _at_least(f"{prefix}.prefix_tokens", vision.prefix_tokens, 0)
    yield from _at_least(f"{prefix}.num_attention_heads", vision.num_attention_heads, 1)
    yield from _divisible(
        f"{prefix}.hidden_size", vision.hidden_size, f"{prefix}.num_attention_heads", vision.num_attention_heads
    )
    unit = PIXEL_SHUFFLE * vision.patch_size
    yield from _divisible(f"{prefix}.tile_size", vision.tile_size, f"2 x {prefix}.patch_size", unit)
    yield from _divisible(f"{prefix}.max_resolution", vision.max_resolution, f"{prefix}.patch_size", vision.patch_size)
    yield from _at_least(f"{prefix}.max_resolution", vision.max_resolution, vision.tile_size)
    yield from _choice(f"{prefix}.activation", vision.activation, VISION_ACTIVATIONS)
    for index, value in enumerate(vision.norm_std):
        yield from _positive(f"{prefix}.norm_std.{index}", value)


def _tiles(config: RunConfig) -> Iterator[str]:
    tile, expected = config.data.tile_size, config.model.vision.tile_size
    if tile != expected:
        yield f"data.tile_size={tile}: must equal model.vision.tile_size; nearest: {expected}"
    yield from _positive("model.projector.ffn_hidden_size", config.model.projector.ffn_hidden_size)
    yield from _positive("model.projector.norm_eps", config.model.projector.norm_eps)
    yield from _choice("model.projector.norm", config.model.projector.norm, PROJECTOR_NORMS)
    yield from _choice("model.projector.activation", config.model.projector.activation, PROJECTOR_ACTIVATIONS)
    if config.model.tokens_per_tile >= config.data.seq_length:
        yield (
            f"data.seq_length={config.data.seq_length}: one tile alone has {config.model.tokens_per_tile} tokens; "
            "no image would fit"
        )


def _data(config: RunConfig) -> Iterator[str]:
    data = config.data
    yield from _choice("data.packing", data.packing, PACKING_MODES)
    yield from _choice("data.loss.mode", data.loss.mode, LOSS_MODES)
    yield from _choice("data.loss.unit", data.loss.unit, LOSS_UNITS)
    for key in ("window_samples", "max_tiles", "max_frames", "document_bucket", "max_seqlen_bucket"):
        yield from _at_least(f"data.{key}", getattr(data, key), 1)
    for key in ("read.attempts", "read.prefetch", "shuffle.blocks"):
        yield from _at_least(f"data.{key}", _option(data, key), 1)
    for key in ("video_fps", "read.timeout_s", "shuffle.block_mib"):
        yield from _positive(f"data.{key}", _option(data, key))
    for key in ("cost.visual_token", "cost.attention_pair"):
        yield from _at_least(f"data.{key}", _option(data, key), 0)
    yield from _at_least("data.num_workers", data.num_workers, 0)
    yield from _within("data.video_pruning_rate", data.video_pruning_rate, 0, 1, open_end=True)
    if not data.tokenizer:
        yield "data.tokenizer is empty; give the folder that holds tokenizer.json"
    if not data.sources:
        yield "data.sources is empty; add +data.sources.NAME.path=FOLDER"
    for name, source in data.sources.items():
        if not source.path:
            yield f"data.sources.{name}.path is empty; give the dataset folder"
        yield from _at_least(f"data.sources.{name}.weight", source.weight, 0)
        if source.epochs is not None:
            yield from _at_least(f"data.sources.{name}.epochs", source.epochs, 0)
        if source.max_samples is not None:
            yield from _at_least(f"data.sources.{name}.max_samples", source.max_samples, 1)
    counted = [name for name, source in data.sources.items() if source.epochs is not None]
    if counted and len(counted) < len(data.sources):
        others = ", ".join(name for name in data.sources if name not in counted)
        yield f"data.sources: {', '.join(counted)} with epochs, {others} with weight; give all of them epochs, or none"
    if data.sources and not any(
        (source.weight if source.epochs is None else source.epochs) > 0 for source in data.sources.values()
    ):
        yield "data.sources: every weight is 0; give at least one source a weight above 0"


def _option(section: object, key: str) -> Any:
    """Value of a dotted key."""
    return functools.reduce(getattr, key.split("."), section)


def _precision_and_optim(config: RunConfig) -> Iterator[str]:
    yield from _choice("precision.params", config.precision.params, PARAMS)
    yield from _choice("precision.backend", config.precision.backend, BACKENDS)
    yield from _choice("precision.fp8", config.precision.fp8, FP8)
    for key in ("bf16_layers", "bf16_blocks"):
        yield from _at_least(f"precision.{key}", getattr(config.precision, key), 0)
    optim = config.optim
    yield from _positive("optim.lr", optim.lr)
    for part in PARTS:
        yield from _positive(f"optim.lr_scale.{part}", getattr(optim.lr_scale, part))
    yield from _within("optim.min_lr", optim.min_lr, 0, max(optim.lr, 0))
    yield from _within("optim.warmup_fraction", optim.warmup_fraction, 0, 1)
    yield from _within("optim.beta1", optim.beta1, 0, 1, open_end=True)
    yield from _within("optim.beta2", optim.beta2, 0, 1, open_end=True)
    yield from _positive("optim.eps", optim.eps)
    yield from _at_least("optim.weight_decay", optim.weight_decay, 0)
    yield from _positive("optim.clip_grad", optim.clip_grad)
    yield from _choice("optim.loss_divisor", optim.loss_divisor, DIVISORS)
    if optim.overlap_param_gather and not (optim.distributed and optim.overlap_grad_reduce):
        yield (
            "optim.overlap_param_gather=true needs optim.distributed=true and optim.overlap_grad_reduce=true; "
            "set both, or optim.overlap_param_gather=false"
        )
    yield from _choice("optim.states", optim.states, STATES)
    if optim.states in STATES[1:]:
        needed = {"precision.params": ("bf16", config.precision.params), "optim.distributed": (True, optim.distributed)}
        for key, (value, found) in needed.items():
            if found != value:
                yield f"optim.states={optim.states} needs {key}={str(value).lower()}; set it, or optim.states=fp32"
        if config.precision.backend == "torch":
            yield f"optim.states={optim.states} needs precision.backend=te (its fused Adam); nearest: optim.states=fp32"


def _recompute(config: RunConfig) -> Iterator[str]:
    recompute, layers = config.recompute, config.model.language.num_layers
    yield from _choice("recompute.language", recompute.language, LANGUAGE_RECOMPUTE)
    yield from _choice("recompute.vision", recompute.vision, VISION_RECOMPUTE)
    if recompute.language_layers is not None:
        yield from _within("recompute.language_layers", recompute.language_layers, 1, layers)
        if recompute.language not in ("full", "offload"):
            yield (
                f"recompute.language_layers={recompute.language_layers} counts with recompute.language=full alone (or "
                "offload); set that, or recompute.language_layers=null"
            )


def _engine(config: RunConfig) -> Iterator[str]:
    engine = config.engine
    yield from _choice("engine.name", engine.name, ENGINES)
    if engine.name == "megatron":
        if engine.offload_optimizer:
            yield "engine.offload_optimizer=true is DeepSpeed's: set optim.offload=true, or set engine.name=deepspeed"
        if engine.offload_params:
            yield "engine.offload_params=true: megatron-core keeps weights on the GPU; set engine.name=deepspeed"
    if engine.name == "deepspeed":
        yield from _deepspeed(config)


def _deepspeed(config: RunConfig) -> Iterator[str]:
    engine, parallel, optim = config.engine, config.parallel, config.optim
    yield from _within("engine.zero_stage", engine.zero_stage, 1, 3)
    for key, value in (("tp", parallel.tp), ("cp", parallel.cp)):
        if value > 1:
            yield f"parallel.{key}={value}: engine.name=deepspeed is data parallel only; set parallel.{key}=1"
    for key in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(optim, key):
            yield f"optim.{key}=true is megatron-core's; set optim.{key}=false with engine.name=deepspeed"
    if optim.offload:
        yield "optim.offload=true is for engine.name=megatron; set engine.offload_optimizer=true instead"
    if optim.states != "fp32":
        yield f"optim.states={optim.states} is megatron-core's; set optim.states=fp32 with engine.name=deepspeed"
    if not optim.distributed:
        yield "optim.distributed=false is megatron-core's; set optim.distributed=true with engine.name=deepspeed"
    for part in PARTS:
        if (scale := getattr(optim.lr_scale, part)) != 1:
            key = f"optim.lr_scale.{part}"
            yield f"{key}={scale} is megatron-core's; set {key}=1 with engine.name=deepspeed"
    if config.adapter.rank:
        yield f"adapter.rank={config.adapter.rank}: engine.name=deepspeed trains whole weights; set adapter.rank=0"
    if every := config.trainer.check_replicas_every:
        yield (
            f"trainer.check_replicas_every={every}: engine.name=deepspeed shares weights out or keeps some to itself; "
            "set trainer.check_replicas_every=0"
        )
    if engine.offload_params and engine.zero_stage < 3:
        yield f"engine.offload_params=true: stage {engine.zero_stage} keeps whole weights; set engine.zero_stage=3"
    if config.precision.params == "bf16" and engine.zero_stage < 3 and engine.offload_optimizer:
        yield (
            f"engine.zero_stage={engine.zero_stage} with engine.offload_optimizer=true and precision.params=bf16: "
            "DeepSpeed would add up gradients in bfloat16; set engine.zero_stage=3"
        )
    elif config.precision.params == "bf16" and engine.zero_stage == 1:
        yield (
            "engine.zero_stage=1 with precision.params=bf16: DeepSpeed has a separate optimizer for this, which is not "
            "supported here; set engine.zero_stage=2"
        )


def _trainer(config: RunConfig) -> Iterator[str]:
    trainer = config.trainer
    for key in ("steps", "global_batch"):
        yield from _at_least(f"trainer.{key}", getattr(trainer, key), 1)
    for key in ("max_bad_steps", "threads", "seed", "spike_sigma", "check_replicas_every", "time_limit_s"):
        yield from _at_least(f"trainer.{key}", getattr(trainer, key), 0)
    yield from _timeouts(config)
    parts = config.model.parts
    for key, names in (("model.parts", parts), ("trainer.train", trainer.train)):
        for name in names:
            yield from _choice(key, name, PARTS)
        needed = key == "model.parts" or not config.adapter.rank
        if (needed and not names) or len(set(names)) != len(names):
            yield f"{key}={list(names)}: name each part once, at least one of {', '.join(PARTS)}"
    absent = [name for name in trainer.train if name in PARTS and name not in parts]
    if absent:
        yield f"trainer.train={list(trainer.train)}: {', '.join(absent)} is not among model.parts={list(parts)}"
    if "language" in parts and ("vision" in parts) != ("projector" in parts):
        yield f"model.parts={list(parts)}: vision and projector come together; use all three or language alone"


def _timeouts(config: RunConfig) -> Iterator[str]:
    stall, collective = config.trainer.stall_timeout_s, config.parallel.collective_timeout_s
    yield from _at_least("trainer.stall_timeout_s", stall, 0)
    yield from _positive("parallel.collective_timeout_s", collective)
    if 0 < stall <= collective:
        yield (
            f"trainer.stall_timeout_s={stall:g}: above parallel.collective_timeout_s = {collective:g}, so that the "
            f"collective that is stuck gets to say so; nearest: {collective * 1.5:g}, or 0 to watch nothing"
        )


def _rest(config: RunConfig) -> Iterator[str]:
    yield from _at_least("checkpoint.every_steps", config.checkpoint.every_steps, 1)
    # Retention must never remove the last good checkpoint.
    yield from _at_least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    for key in ("keep_every", "keep_best", "grace_s", "nodes_at_once"):
        yield from _at_least(f"checkpoint.{key}", getattr(config.checkpoint, key), 0)
    yield from _at_least("evaluation.max_samples", config.evaluation.max_samples, 1)
    yield from _at_least("evaluation.predictions", config.evaluation.predictions, 0)
    yield from _validation(config.evaluation)
    if not config.evaluation.split:
        yield "evaluation.split is empty; give the name of the held-out split"
    for name, path in config.evaluation.sources.items():
        if not path:
            yield f"evaluation.sources.{name} is empty; give the dataset folder"
    yield from _at_least("logging.every_steps", config.logging.every_steps, 1)
    yield from _at_least("profile.steps", config.profile.steps, 0)
    yield from _at_least("profile.after", config.profile.after, 1)


def _validation(options: EvalConfig) -> Iterator[str]:
    for key in ("every_steps", "patience"):
        yield from _at_least(f"evaluation.{key}", getattr(options, key), 0)
    for key in ("keep_best", "patience"):
        value = getattr(options, key)
        if value and not options.every_steps:
            shown = str(value).lower()
            yield f"evaluation.{key}={shown} needs a held-out loss while training; set evaluation.every_steps=100"
    if options.every_steps and not options.sources:
        yield (
            f"evaluation.every_steps={options.every_steps}: evaluation.sources is empty; "
            "add +evaluation.sources.NAME=FOLDER, or set evaluation.every_steps=0"
        )


def _layout(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    group = parallel.tp * parallel.cp
    found = layout_problems(parallel, max(group, 1), config.model.language)
    yield from found
    # With an illegal layout the nearest length would be illegal as well: leave it out of the product.
    unit, name = config.model.language.chunk_size, "model.language.chunk_size"
    cp = nearest_context(parallel, config.data.seq_length, unit) if group > 1 and unit > 0 and not found else None
    if not found and group > 1:
        unit, name = unit * group, f"parallel.tp x parallel.cp x {name}"
    if cp is not None and cp != parallel.cp:
        # The length is what the recipe is about, and does for another layout: the layout is what is wrong.
        length = config.data.seq_length
        yield (
            f"parallel.cp={parallel.cp}: data.seq_length={length} does not divide into whole chunks ({name} = {unit}); "
            f"set parallel.cp={cp}, or data.seq_length={nearest_multiples(length, unit)}"
        )
    else:
        yield from _divisible("data.seq_length", config.data.seq_length, name, unit)
    if config.evaluation.sources:
        yield from _divisible("evaluation.seq_length", config.evaluation.seq_length, name, unit)


def _cluster(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    yield from _choice("cluster.gpu", cluster.gpu, GPUS)
    yield from _at_least("cluster.gpus_per_node", cluster.gpus_per_node, 1)
    if cluster.gpus is None:
        return
    yield from _at_least("cluster.gpus", cluster.gpus, 1)
    node = cluster.gpus_per_node
    if node >= 1 and cluster.gpus > node and cluster.gpus % node:
        yield (
            f"cluster.gpus={cluster.gpus}: whole nodes of cluster.gpus_per_node = {node}; "
            f"nearest: {nearest_multiples(cluster.gpus, node)}"
        )
    if cluster.gpus >= 1:
        parallel = config.parallel
        said = layout_problems(parallel, max(parallel.tp * parallel.cp, 1))
        found = [problem for problem in world_problems(config, cluster.gpus) if problem not in said]
        yield from (f"cluster.gpus={cluster.gpus}: {problem}" for problem in found)


def _workload(config: RunConfig) -> Iterator[str]:
    workload = config.workload
    if workload.samples is not None:
        yield from _at_least("workload.samples", workload.samples, 1)
    yield from _at_least("workload.sample_tokens", workload.sample_tokens, 1)
    yield from _within("workload.visual_fraction", workload.visual_fraction, 0, 1)
    yield from _within("workload.supervised_fraction", workload.supervised_fraction, 0, 1)
    yield from _within("workload.fill", workload.fill, 0.01, 1)
