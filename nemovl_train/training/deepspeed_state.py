"""Weights and optimizer state of a DeepSpeed run, as megatron-core's sharded checkpoints take them.

Weights are saved whole, under the names and in the form of any other run's, so that whatever reads a checkpoint
(another stage, export, evaluation) needs no DeepSpeed. Each rank is the owner of every n-th tensor: it alone holds the
copy that is saved or was read. Optimizer state is saved as it lies in each rank's memory, without copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemovl_train.model.vlm import NemotronVL
from nemovl_train.parallel.layout import Layout
from nemovl_train.training.deepspeed_float32 import MOMENTS

# isort: split
# The layout module makes megatron-core importable without CUDA, so it comes first.
from megatron.core.dist_checkpointing import ShardedTensor

_STEPS = "optimizer.deepspeed.steps"


class WholeWeights:
    """The model's weights, tensor by tensor, wherever DeepSpeed keeps them. Made before DeepSpeed takes the model.

    Args:
        model: A model that is whole on every rank.
        layout: Ranks.
    """

    def __init__(self, model: NemotronVL, layout: Layout) -> None:
        self.layout = layout
        self.entries = model.sharded_state_dict()
        tensors = model.state_dict(keep_vars=True)
        self.tensors: dict[str, Tensor] = {name: tensors[name] for name in self.entries}
        for entry in self.entries.values():
            entry.data = None  # the whole tensors of a model that is about to be taken apart

    def sharded_state_dict(self) -> dict[str, Any]:
        """Whole tensors of which this rank is the owner, on the CPU. Collective."""
        found = {}
        for number, (name, entry) in enumerate(self.entries.items()):
            whole = self._whole(self.tensors[name], owner=self._owner(number))
            if whole is not None:
                found[name] = replace(entry, data=whole, replica_id=(0, 0, 0))
        return found

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> None:
        """Take over what the owners read. Collective."""
        own = {name for number, name in enumerate(self.entries) if self._owner(number) == self.layout.rank}
        assert not strict or own == set(state_dict), sorted(own ^ set(state_dict))
        for number, name in enumerate(self.entries):
            self._take(self.tensors[name], state_dict.get(name), owner=self._owner(number))

    def _owner(self, number: int) -> int:
        return number % self.layout.world_size

    def _whole(self, tensor: Tensor, owner: int) -> Tensor | None:
        from deepspeed import zero

        # Does nothing to a parameter that is not partitioned.
        with zero.GatheredParameters([tensor] if isinstance(tensor, nn.Parameter) else []):
            return tensor.detach().to("cpu", copy=True) if owner == self.layout.rank else None

    @torch.no_grad()
    def _take(self, tensor: Tensor, whole: Tensor | None, owner: int) -> None:
        from deepspeed import zero

        partitioned = hasattr(tensor, "ds_id")
        with zero.GatheredParameters([tensor] if partitioned else [], modifier_rank=owner if partitioned else None):
            if whole is not None:
                tensor.copy_(whole)
            if not partitioned:
                dist.broadcast(tensor.data, src=owner)


class ZeroState:
    """Master weights and moments of DeepSpeed's ZeRO optimizers.

    Args:
        zero: DeepSpeed's optimizer.
        stage: Its ZeRO stage.
        names: Names of parameters by their `id`.
        layout: Ranks.
    """

    def __init__(self, zero: Any, stage: int, names: dict[int, str], layout: Layout) -> None:
        self.zero, self.stage, self.names, self.layout = zero, stage, names, layout
        self.steps = 0

    def sharded(self) -> dict[str, Any]:
        """Views of this rank's state. Padding at the end depends on the number of ranks, so shapes may differ."""
        ranks = (0, self.layout.rank, self.layout.world_size)
        entries: dict[str, Any] = {
            key: ShardedTensor.from_rank_offsets(key, view, ranks, allow_shape_mismatch=True)
            for key, view in self._views()
        }
        steps = torch.tensor([self.steps])
        return entries | {_STEPS: ShardedTensor.from_rank_offsets(_STEPS, steps, replica_id=self.layout.rank)}

    @torch.no_grad()
    def restore(self, loaded: dict[str, Tensor]) -> None:
        """Take over what `sharded` described."""
        self.steps = int(loaded[_STEPS].item())
        for key, view in self._views():
            if view.data_ptr() != loaded[key].data_ptr():
                view.copy_(loaded[key])
        for flat in self._flat():
            self._adam(flat)["step"].fill_(self.steps)

    def _flat(self) -> list[Tensor]:
        """Master weights of this rank, a tensor a group."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        """Stages 1 and 2 cut a group's parameters, laid end to end, between ranks; stage 3 cuts every parameter."""
        for number, flat in enumerate(self._flat()):
            for kind, tensor in (("master", flat.detach()), *((m, self._adam(flat)[m]) for m in MOMENTS)):
                if self.stage < 3:
                    yield f"optimizer.deepspeed.{kind}.group{number}", tensor
                    continue
                parameters = self.zero.fp16_groups[number]
                parts = tensor.split([p.partition_numel() for p in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    yield f"optimizer.deepspeed.{kind}.{self.names[id(parameter)]}", part

    def _adam(self, flat: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a group, made where its first step is still to come."""
        state = self.zero.optimizer.state[flat]
        if not state:
            state["step"] = torch.tensor(float(self.steps), device=flat.device)
            state |= {moment: torch.zeros_like(flat) for moment in MOMENTS}
        return state
