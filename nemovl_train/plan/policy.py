"""How a training program spends memory and work. `policy_of` says what `nemovl train` does with a config."""

from dataclasses import dataclass, replace

from nemovl_train.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes a trained parameter takes besides its weight.

    Attributes:
        gradient: Of the gradient, held whole by every rank that holds the weight.
        optimizer: Of master weight and moments, shared out by the distributed optimizer.
    """

    gradient: int
    optimizer: int


FP32_STATES = StateBytes(gradient=4, optimizer=12)
BF16_MOMENTS = StateBytes(gradient=4, optimizer=6)
"""bfloat16 moments, and 16 bits that make a float32 master weight of the bfloat16 one."""
LEAN_STATES = StateBytes(gradient=2, optimizer=6)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Choices of a training program that decide memory and time.

    Attributes:
        states: Bytes of gradient and optimizer state of a bfloat16 weight.
        full_recompute_layers: Language layers, from the first, that keep their input alone; None is all of them.
        inputs_on_host: They keep it in host memory.
        states_on_host: Optimizer state is in host memory but for the update.
        selective_recompute: The other layers make outputs of norms, squared ReLU and gated norm again.
        tower_recompute: `none`, `selective`, `full`, `offload` or `tiles`, as in `recompute.vision`.
        fused_gated_norm: The gated norm keeps no input of its own: it is part of the scan's kernel or, over context
            parallel ranks, reads the scan's output again.
        chunked_loss: Logits exist for some positions at a time; else all at once.
        head_everywhere: Logits are made at every position, not at the supervised ones alone.
        head_made_again: Logits are made again in backward: four products instead of three.
    """

    states: StateBytes = FP32_STATES
    full_recompute_layers: int | None = 0
    inputs_on_host: bool = False
    states_on_host: bool = False
    selective_recompute: bool = False
    tower_recompute: str = "none"
    fused_gated_norm: bool = True
    chunked_loss: bool = True
    head_everywhere: bool = False
    head_made_again: bool = False


STATES = {"fp32": FP32_STATES, "bf16_moments": BF16_MOMENTS, "lean": LEAN_STATES}


def policy_of(config: RunConfig) -> Policy:
    """What `nemovl train` does with a config."""
    recompute = config.recompute
    return Policy(
        states=STATES[config.optim.states],
        full_recompute_layers=recompute.language_layers if recompute.language in ("full", "offload") else 0,
        inputs_on_host=recompute.language == "offload",
        states_on_host=config.optim.offload,
        selective_recompute=recompute.language == "selective",
        tower_recompute=recompute.vision,
    )


LEANER: tuple[dict[str, str | bool], ...] = (
    {"recompute.language": "selective", "recompute.vision": "full"},
    {"recompute.language": "full", "recompute.vision": "full"},
    {"recompute.language": "full", "recompute.vision": "tiles"},
    {"recompute.language": "full", "recompute.vision": "full", "optim.states": "bf16_moments"},
    {"recompute.language": "full", "recompute.vision": "tiles", "optim.states": "bf16_moments"},
    {"recompute.language": "full", "recompute.vision": "tiles", "optim.states": "lean"},
    {"recompute.language": "offload", "recompute.vision": "tiles", "optim.states": "bf16_moments"},
    {
        "recompute.language": "offload",
        "recompute.vision": "tiles",
        "optim.states": "bf16_moments",
        "optim.offload": True,
    },
)
"""Options that a plan tries for a run that does not fit, from the least cost to the largest."""


def leaner(config: RunConfig, options: dict[str, str | bool]) -> RunConfig:
    """A config with such options."""
    for key, value in options.items():
        section, _, leaf = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{leaf: value})})
    return config
