"""A model with adapters: where they go, what its checkpoints hold, how they become part of the weights."""

from __future__ import annotations

from typing import Any

from nemovl_train.config.adapters import adapted_linears
from nemovl_train.config.schema import AdapterConfig
from nemovl_train.model.init import init_weights
from nemovl_train.model.lora import ADAPTER, Adapter, adapters, attach, merge
from nemovl_train.model.vlm import ATTRIBUTES, NemotronVL
from nemovl_train.parallel.layout import Layout


def add_adapters(model: NemotronVL, adapter: AdapterConfig, layout: Layout, *, seed: int) -> None:
    """Give linear layers their adapters. The base's weights are loaded before: its checkpoints have no adapters.

    Initial values depend on the seed and the parameter's name alone. `NemotronVL.freeze` then says what trains.

    Args:
        model: The model, not yet under DDP.
        adapter: Rank, scale and targets, checked; nothing happens with rank 0.
        layout: Owner of the process groups.
        seed: Seed of the run.
    """
    parts = model.part_modules()
    for spec in adapted_linears(model.sizes, adapter):
        if spec.part not in parts:
            continue
        linear = parts[spec.part].get_submodule(spec.name)
        groups = layout.language_groups if spec.part == "language" else layout.vision_groups
        parallel = layout.sequence_parallel and spec.part == "language"
        pair = Adapter(linear, spec, adapter, groups, sequence_parallel=parallel)
        attach(linear, pair)
        init_weights(
            pair,
            seed=seed,
            std=0.0,
            prefix=f"{ATTRIBUTES[spec.part]}.{spec.name}.{ADAPTER}.",
            tp_size=groups.tp.size(),
            tp_rank=groups.tp.rank(),
        )


def merge_adapters(model: NemotronVL) -> None:
    """Make every adapter part of its layer's weight. One process.

    Args:
        model: Afterwards a model without adapters; its weights keep their format.
    """
    for name in [name for name, _ in adapters(model)]:
        merge(model.get_submodule(name.rpartition(".")[0]))


class TrainedWeights:
    """What a model's checkpoint holds when everything else stands in the checkpoint of its base.

    Args:
        model: A model with adapters; frozen parameters already have `requires_grad=False`.
    """

    def __init__(self, model: NemotronVL) -> None:
        self.model = model
        # In the model's order: equal runs write equal files.
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def sharded_state_dict(self) -> dict[str, Any]:
        """Sharded tensors of the parameters that train, by name."""
        state = self.model.sharded_state_dict()
        assert state.keys() >= set(self.names)
        return {name: state[name] for name in self.names}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Take over the trained parameters, all of them, and nothing else."""
        assert strict
        assert state_dict.keys() == set(self.names), sorted(state_dict.keys() ^ set(self.names))
        self.model.load_state_dict(state_dict, strict=False)
