"""Every option of a run, as frozen dataclasses. Importable without torch or megatron-core.

Hydra merges a recipe into `RunConfig` or `ScheduleConfig`; `validate.py` then checks ranges and combinations.
"""

from dataclasses import dataclass, field

from data_pipelines.config import DataConfig

PARTS = ("vision", "projector", "language")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Hybrid Mamba-2 / attention language model (Nemotron Nano 2, arXiv 2508.14444).

    Attributes:
        hybrid_pattern: One character a layer: `M` Mamba-2, `-` MLP, `*` attention.
        head_dim: Width of an attention head.
        mamba_num_groups: Groups that share B and C; also the groups of the gated norm.
        vocab_size: Rows of embedding and head as stored, padding included.
        base_vocab_size: Rows of the text-only model before the media tags were added.
        position: `none` (order comes from the Mamba layers) or `rope`.
        rope_scaling_factor: Factor by which Llama 3.1 stretches long wavelengths (with its fixed bounds 1, 4 and 8,192
            tokens); 1 stretches none.
    """

    hidden_size: int = 5120
    hybrid_pattern: str = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
    num_attention_heads: int = 40
    num_query_groups: int = 8
    head_dim: int = 128
    ffn_hidden_size: int = 20480
    mamba_num_heads: int = 128
    mamba_head_dim: int = 80
    mamba_state_dim: int = 128
    mamba_num_groups: int = 8
    conv_kernel: int = 4
    chunk_size: int = 128
    norm_eps: float = 1e-5
    activation: str = "squared_relu"
    position: str = "none"
    rope_theta: float = 500000.0
    rope_scaling_factor: float = 1.0
    max_position: int = 131072
    vocab_size: int = 132096
    base_vocab_size: int = 131072
    init_std: float = 0.02

    @property
    def num_layers(self) -> int:
        """Layers, one per pattern character."""
        return len(self.hybrid_pattern)

    @property
    def mamba_inner_size(self) -> int:
        """Width of z and x in a Mamba layer."""
        return self.mamba_num_heads * self.mamba_head_dim


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """RADIO vision transformer (C-RADIOv2, arXiv 2412.07679).

    Attributes:
        tile_size: Side of an input tile in pixels.
        max_resolution: Side in pixels that the learned position grid covers.
        prefix_tokens: Summary and register tokens in front of the patches; read from the weights.
        activation: `gelu` (exact) or `gelu_tanh` (megatron-core's fast form).
        norm_mean: Mean of RGB in [0, 1] that pixels are normalised with.
        norm_std: Standard deviation likewise.
    """

    num_layers: int = 32
    hidden_size: int = 1280
    num_attention_heads: int = 16
    ffn_hidden_size: int = 5120
    patch_size: int = 16
    tile_size: int = 512
    max_resolution: int = 2048
    prefix_tokens: int = 16
    norm_eps: float = 1e-6
    activation: str = "gelu"
    norm_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    norm_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def position_grid(self) -> int:
        """Rows (and columns) of the learned position grid."""
        return self.max_resolution // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Norm, linear, activation, linear.

    Attributes:
        norm: `rmsnorm`, or `layernorm` as in the predecessor.
        activation: `squared_relu`, or `gelu` (exact) as in the predecessor.
        bias: Both linears have biases, as in the predecessor.
    """

    ffn_hidden_size: int = 20480
    norm_eps: float = 1e-5
    norm: str = "rmsnorm"
    activation: str = "squared_relu"
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Ids that the model, not only the tokenizer, has to know."""

    image: int = 131072
    image_start: int = 131073
    image_end: int = 131074
    video: int = 131081
    pad: int = 0
    bos: int = 1
    eos: int = 12


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the three parts. The values of a released model are data in `configs/model/`.

    Attributes:
        parts: Parts that exist; a text-only language model has just `language`.
    """

    name: str = "nano_12b_v2_vl"
    parts: tuple[str, ...] = PARTS
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    tokens: TokenIds = field(default_factory=TokenIds)

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile: patches after the 2 x 2 pixel shuffle."""
        return (self.vision.tile_size // self.vision.patch_size // 2) ** 2


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the language model's parallel axes; data parallel is what remains of the processes.

    Attributes:
        tp: Ranks that share every layer's heads and columns.
        cp: Ranks that share a pack's tokens.
        sequence_parallel: Split the residual stream between layers over the tensor parallel ranks as well.
        mamba_context: With cp > 1, `state_passing` scans every rank's own tokens and hands states on; `head_exchange`
            turns token shares into head shares and back.
        collective_timeout_s: A collective that takes longer ends the run: some rank does not come.
    """

    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    mamba_context: str = "state_passing"
    collective_timeout_s: float = 1200.0


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats.

    Attributes:
        params: `fp32` or `bf16`.
        backend: `te` (Transformer Engine and mamba-ssm on CUDA), `torch` (plain PyTorch, any device), `auto`.
        fp8: `none`, or `blockwise`: linear layers of all parts multiply in FP8 while they train (E4M3, a scale for each
            128 numbers of an activation and each 128 x 128 of a weight). Weights, gradients, checkpoints, evaluation
            and everything between the linear layers stay in `params`. Needs bf16, `te`, and a Hopper GPU or newer.
        bf16_layers: With FP8, language layers at each end of the stack that do not take part.
        bf16_blocks: Likewise blocks at each end of the tower; half of them or more leave all of it in bf16.
    """

    params: str = "fp32"
    backend: str = "auto"
    fp8: str = "none"
    bf16_layers: int = 1
    bf16_blocks: int = 1


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What holds gradients and optimizer state: megatron-core, or DeepSpeed's ZeRO for a run on one or two GPUs.

    Attributes:
        name: `megatron` or `deepspeed`. The rest is for `deepspeed`.
        zero_stage: What data parallel ranks share out: 1 optimizer state, 2 gradients too, 3 weights too.
        offload_optimizer: Keep optimizer state in host memory and update there.
        offload_params: Keep weights in host memory between their uses; needs stage 3.
    """

    name: str = "megatron"
    zero_stage: int = 3
    offload_optimizer: bool = False
    offload_params: bool = False


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """What the backward pass makes again instead of having kept it. Results do not depend on it.

    Attributes:
        language: `none`; `selective` makes outputs of norms, of the squared ReLU and of the Mamba layers' gated norm
            again; `full` keeps the input of each layer alone and runs it again; `offload` is `full` with these inputs
            in host memory.
        language_layers: With `full` or `offload`, so many layers from the first; all of them when None.
        vision: `none`, `selective` (norms and GELU), `full` and `offload` likewise; `tiles` keeps pixels alone and
            encodes a few tiles at a time again, which takes the same memory for any number of tiles.
    """

    language: str = "none"
    language_layers: int | None = None
    vision: str = "none"


@dataclass(frozen=True, kw_only=True)
class AdapterTargets:
    """Linear layers that get adapters, by part: globs over module names or over their ends (`in_proj`, `mixer.*`, `*`).

    A part without patterns has no adapters.
    """

    vision: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    language: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): frozen linear layers compute W x + alpha / rank * B A x.

    Parts that are named in `trainer.train` as well train as a whole, beside the adapters of others.

    Attributes:
        rank: Rows of A and columns of B; 0 turns adapters off.
        alpha: Numerator of the adapters' scale.
        targets: Layers that get them.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: AdapterTargets = field(default_factory=AdapterTargets)


@dataclass(frozen=True, kw_only=True)
class PartScales:
    """A factor for each part of the model."""

    vision: float = 1.0
    projector: float = 1.0
    language: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay.

    Attributes:
        lr: Peak learning rate.
        lr_scale: What each part's learning rate is multiplied with, all along the schedule.
        min_lr: Learning rate at the end of the cosine.
        warmup_fraction: Share of the run's steps that warm up linearly.
        weight_decay: Decoupled decay. Parameters with one dimension (norms, biases, A_log, D, dt_bias) have none; all
            others do, convolution kernels, position embeddings and class tokens among them (megatron-core's rule).
        clip_grad: Largest global gradient norm.
        loss_divisor: `global` divides by the step's weight sum; `pack` gives every pack with supervision equal weight.
        distributed: Shard optimizer state over data parallel ranks (megatron-core's distributed optimizer).
        overlap_grad_reduce: Reduce the language model's gradients while its backward pass still runs.
        overlap_param_gather: Collect its updated weights while the next forward pass already runs; needs `distributed`
            and `overlap_grad_reduce`.
        states: `fp32` keeps gradients, master weights and moments in float32; `bf16_moments` keeps moments in bfloat16
            and of the float32 master weight only the 16 bits that the bfloat16 weight lacks; `lean` has bfloat16
            gradients as well. The last two need `distributed` and Transformer Engine.
        offload: Keep moments and separate master weights in host memory but for the update itself.
        fuse_grad_accumulation: Transformer Engine's linears add weight gradients to the optimizer's buffer themselves.
    """

    lr: float = 2e-5
    lr_scale: PartScales = field(default_factory=PartScales)
    min_lr: float = 0.0
    warmup_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    loss_divisor: str = "global"
    distributed: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    states: str = "fp32"
    offload: bool = False
    fuse_grad_accumulation: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length of a run and what it trains.

    Attributes:
        steps: Optimiser steps.
        global_batch: Packs of one step over all ranks.
        train: Parts whose own weights have gradients; those of the others stay bit-identical and hold no optimizer
            state. May be empty where adapters train.
        seed: Seed of data order, initial weights and every keyed random choice.
        max_bad_steps: Steps with a non-finite loss or gradient norm that are skipped before the run stops.
        init_from: Checkpoint folder (or run stage) whose weights the run starts from; random weights when None.
        threads: PyTorch threads of a CPU process; 0 keeps PyTorch's choice.
        spike_sigma: A step whose loss or gradient norm is this many standard deviations above the mean of the last 128
            changes nothing and counts as bad; 0 takes every finite step.
        check_replicas_every: Steps between two comparisons of the weights that ranks hold alike; 0 for none.
        stall_timeout_s: Without progress for so long, all stacks are written and the run ends; 0 waits for ever. The
            first step has three times as long.
        time_limit_s: Seconds after which the run has to be over, its save included; 0 takes the end of the SLURM job.
        dry_run: Measure the memory of packs at full length, a pack of images alone among them, with the optimizer's
            state there; write it to `dry_run.json` in the stage's folder and end.
    """

    steps: int = 100
    global_batch: int = 128
    train: tuple[str, ...] = PARTS
    seed: int = 1234
    max_bad_steps: int = 10
    init_from: str | None = None
    threads: int = 0
    spike_sigma: float = 0.0
    check_replicas_every: int = 100
    stall_timeout_s: float = 1800.0
    time_limit_s: float = 0.0
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep. A checkpoint stays when any of the three rules holds it.

    Attributes:
        keep_last: Newest checkpoints that stay.
        keep_every: Those whose step divides by this stay; 0 for none.
        keep_best: Those of the lowest mean loss over the last 128 steps that stay; 0 for none.
        in_background: Training goes on while a checkpoint is written.
        grace_s: Seconds between the scheduler's signal and the kill; a save that is too slow for it is warned about.
        nodes_at_once: Nodes that read a checkpoint at the same time when a run starts; 0 for all.
        accept_changes: Options that this start may change in a run that decides its result by them.
    """

    every_steps: int = 100
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 0
    in_background: bool = True
    grace_s: float = 120.0
    nodes_at_once: int = 0
    accept_changes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation at the end of a stage and, where asked for, while it trains.

    Attributes:
        sources: Dataset folders by name; split `split` of each is read once.
        split: Name of the held-out split.
        seq_length: Tokens of an evaluation pack; longer samples are left out and counted.
        max_samples: Most samples of each source.
        predictions: Greedy answers written out per source, for the report.
        every_steps: Steps between two measurements of the held-out loss while training; 0 measures none. It is the mean
            over the sources, each counting alike.
        keep_best: Keep the weights of the lowest such loss in the stage's folder `best`.
        patience: End the stage after so many measurements in a row without a lower loss; 0 never does.
    """

    sources: dict[str, str] = field(default_factory=dict)
    split: str = "heldout"
    seq_length: int = 16384
    max_samples: int = 200
    predictions: int = 4
    every_steps: int = 0
    keep_best: bool = False
    patience: int = 0


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Console and files. Metrics always go to `metrics.jsonl`."""

    every_steps: int = 10
    progress: bool = True
    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Where the time of some steps goes, written to the stage's folder `profile`.

    Attributes:
        steps: Steps that are profiled, on the first rank; 0 for none.
        after: Steps of this start before them.
        trace: Write the whole trace as well, for a trace viewer.
    """

    steps: int = 0
    after: int = 3
    trace: bool = True


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Hardware that a layout is chosen for. Checks and plans read it; a run takes the processes it is started with.

    Attributes:
        name: Option of the group `cluster` that this is; a schedule hands it to its stages.
        gpu: Type of the GPUs, `h100_80gb`, `h200_141gb`, `a100_80gb` or `b200_180gb`.
        gpus: GPUs of a run; None where the recipe does not say.
        gpus_per_node: GPUs that one NVLink domain joins.
    """

    name: str = ""
    gpu: str = "h100_80gb"
    gpus: int | None = None
    gpus_per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """What a plan assumes about data that it cannot read yet. Training does not look at it.

    Attributes:
        samples: Samples that the run is meant to see; None where nobody said.
        sample_tokens: Mean tokens of a sample, visual ones included.
        visual_fraction: Share of a sample's tokens that are visual.
        supervised_fraction: Share of a sample's tokens that carry loss.
        fill: Share of a pack that holds samples when samples are packed.
    """

    samples: int | None = None
    sample_tokens: int = 2048
    visual_fraction: float = 0.5
    supervised_fraction: float = 0.3
    fill: float = 0.99


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where a run lives: `root` / `name` / `stage`, fixed by the recipe so that a restart finds it again."""

    name: str = "run"
    stage: str = "train"
    root: str = "runs"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One stage or fine-tune."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One entry of a schedule: a recipe, and what to change in it."""

    recipe: str = ""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PartsConfig:
    """The two pretrained parts that a schedule starts from, as Hugging Face folders.

    Attributes:
        language: Folder of the text-only language model.
        vision: Folder of the vision tower.
        make: `tiny` makes both first when they are missing; `none` expects them.
    """

    language: str = ""
    vision: str = ""
    make: str = "none"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A chain of stages, each starting from the weights of the one before.

    Attributes:
        cluster: Hardware of every stage whose overrides name none; what the recipes say when nothing is set.
        seed: Seed of demo data, of made parts and of the new projector.
        export: Write the last stage as a Hugging Face folder, verify it and write the report.
    """

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    parts: PartsConfig = field(default_factory=PartsConfig)
    stages: tuple[StageConfig, ...] = ()
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seed: int = 1234
    export: bool = True
