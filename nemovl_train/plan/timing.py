"""Seconds of one optimizer step by kind of work: the FLOPs of `model/flops.py` over measured rates, and the rest.

The constants below come from one profile (case `tp4_16k` of calibration.py); the other cases there test them.
"""

from dataclasses import dataclass, fields

from nemovl_train.config.schema import RunConfig
from nemovl_train.model.flops import PackFlops, training_flops
from nemovl_train.plan.hardware import GPU_TYPES, Gpu
from nemovl_train.plan.load import Grid, PackLoad
from nemovl_train.plan.memory import optimizer_bytes
from nemovl_train.plan.policy import Policy, policy_of
from nemovl_train.plan.traffic import flows
from nemovl_train.plan.trainable import adapted_parts, trainable

# Seconds on the profiled GPU; device memory bounds these kernels, so they scale with its copy rate.
_MIXER = 0.82e-6 / 10240
"""Of convolution, scan and gated norm, forward and backward, a token and inner channel (0.82 us a token and layer)."""
_ELEMENTWISE = 81e-3 / (32768 / 4 * 62 * 5120)
"""Of norms, activations, residual additions, copies and the rest, a token, layer and hidden channel of a rank."""
_UPDATE = 50e-3 / (12.31e9 / 4)
"""Of clipping and AdamW, a parameter whose optimizer state the rank holds."""
_LAUNCHES_PER_LAYER = 57
"""Kernel launches a layer and pack, forward and backward: 14,162 in a step of 4 packs through 62 layers."""
_LAUNCH = 129e-6
"""Host time of a launch, on the virtual machine of the profile; a faster host has less."""
_TOWER_EFFICIENCY = 0.62
"""The tower's matrix products are narrow: share of the GEMM rate that makes case `unit_visual` as far off as the same
layers without a tower, `unit_selective`."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on the slowest rank.

    Attributes:
        matrices: Products with weights in the language layers and the head.
        attention: Attention core.
        mixer: Convolution, scan and gated norm of the Mamba layers.
        elementwise: Norms, activations, additions.
        vision: Tower and projector.
        features: Exchange of features between the ranks of a pack.
        tensor_parallel: Exposed exchange between tensor parallel ranks.
        context_parallel: Exposed exchange between context parallel ranks.
        host: What is left when the host cannot launch as fast as the GPU runs.
        reduce: Gradients summed and weights sent back over data parallel ranks, as if nothing were hidden behind work;
            `optim.overlap_grad_reduce` and `optim.overlap_param_gather` hide a part that nobody has measured.
        update: Clipping and AdamW.
        state_copies: Optimizer state out to host memory and back in, with `optim.offload`: both are waited for.
    """

    matrices: float
    attention: float
    mixer: float
    elementwise: float
    vision: float
    features: float
    tensor_parallel: float
    context_parallel: float
    host: float
    reduce: float
    update: float
    state_copies: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(self.components().values())

    def components(self) -> dict[str, float]:
        """Seconds by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def step_time(
    config: RunConfig, grid: Grid, load: PackLoad, gpu: Gpu, *, packs: int, policy: Policy | None = None
) -> StepTime:
    """Seconds of one step.

    Args:
        config: Model, and parts that train.
        grid: How ranks share the work.
        load: An average pack.
        gpu: Type of the GPUs.
        packs: Packs that one group of TP x CP ranks takes in the step.
        policy: What the training program keeps and recomputes.
    """
    policy = policy or policy_of(config)
    work = pack_flops(config, load, policy)
    traffic = {flow.purpose: flow.seconds for flow in flows(config, grid, load, policy, gpu, packs=packs)}
    kernels = {name: packs * value for name, value in _kernels(config, grid, load, gpu, policy, work).items()}
    tensor, context = traffic.pop("tensor parallel", 0.0), traffic.pop("context parallel", 0.0)
    features = traffic.pop("features", 0.0)
    host = packs * _LAUNCH * _LAUNCHES_PER_LAYER * config.model.language.num_layers
    return StepTime(
        **kernels,
        features=features,
        tensor_parallel=tensor,
        context_parallel=context,
        host=max(0.0, host - sum(kernels.values()) - features - tensor - context),
        reduce=sum(traffic.values()),
        update=_update(config, grid),
        state_copies=_state_copies(config, grid, gpu, policy),
    )


def pack_flops(config: RunConfig, load: PackLoad, policy: Policy | None = None, *, useful: bool = False) -> PackFlops:
    """Model FLOPs of one pack.

    Args:
        config: Model, and parts that train.
        load: An average pack.
        policy: Where logits are made.
        useful: Leave the padding out.
    """
    return training_flops(
        config.model,
        document_lengths=load.documents if useful else load.computed_documents,
        num_tiles=load.tiles,
        head_tokens=load.seq_length if policy and policy.head_everywhere else load.head_tokens,
        train=config.trainer.train,
        adapted=adapted_parts(config),
    )


def _kernels(
    config: RunConfig, grid: Grid, load: PackLoad, gpu: Gpu, policy: Policy, work: PackFlops
) -> dict[str, float]:
    """Seconds that one pack takes on its ranks."""
    size = config.model.language
    again = size.num_layers if policy.full_recompute_layers is None else policy.full_recompute_layers
    passes = 3 if "language" in config.trainer.train else 2
    # A recomputed layer runs forward once more: a third of a trained layer's products, half of a frozen one's.
    recompute = 1 + again / size.num_layers / passes
    recompute_mixing = 1 + again / size.num_layers / 3
    # Norms and activations run forward once more in either case.
    elementwise = 4 / 3 if policy.selective_recompute else recompute_mixing
    layers = work.mamba + work.mlp + work.attention - work.attention_core
    # Forward once, and the two products of backward; an earlier form of the loss ran forward again there.
    head = work.head * (4 / 3 if policy.head_made_again else 1)
    slower = GPU_TYPES["h100_80gb"].copy_bytes / gpu.copy_bytes
    tokens = load.seq_length / grid.pack_ranks
    mamba_channels = size.hybrid_pattern.count("M") * size.mamba_inner_size
    share = load.dealt_tiles(grid.pack_ranks) / load.tiles if load.tiles else 0.0
    tower = work.vision * (
        4 / 3
        if load.tiles and policy.tower_recompute in ("full", "offload", "tiles") and trainable(config)["vision"].learns
        else 1
    )
    return {
        "matrices": (layers * recompute + head) / grid.pack_ranks / gpu.gemm_flops,
        "attention": work.attention_core * recompute_mixing / grid.pack_ranks / gpu.attention_flops,
        "mixer": slower * _MIXER * tokens * mamba_channels * recompute_mixing,
        "elementwise": slower * _ELEMENTWISE * tokens * size.num_layers * size.hidden_size * elementwise,
        "vision": (tower / _TOWER_EFFICIENCY + work.projector) * share / gpu.gemm_flops,
    }


def _state_copies(config: RunConfig, grid: Grid, gpu: Gpu, policy: Policy) -> float:
    """Nothing runs beside them: the state leaves after the update, and is back before the next (`Resting`)."""
    return 2 * optimizer_bytes(config, grid, policy) / gpu.host_link_bytes if policy.states_on_host else 0.0


def _update(config: RunConfig, grid: Grid) -> float:
    held = 0.0
    for part, row in trainable(config).items():
        share = grid.tp if part == "language" else 1
        held += row.trained / share / (grid.gpus / share if config.optim.distributed else 1)
    return held * _UPDATE
