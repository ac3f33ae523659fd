"""Sharded state of megatron-core's distributed optimizer: nothing is gathered, and every layout can load it.

A data parallel rank owns a range of the flat buffer, so of a parameter [rows, columns] it has a run of elements. Such a
run is at most a few boxes: the end of a row, whole rows, the beginning of a row. Each box is a piece of the tensor
that has the parameter's shape, which is what makes it loadable under other TP, CP and DP sizes (irregular tensors as
sets of boxes: ByteCheckpoint, arXiv 2407.20143, section 3.2).

Of megatron-core's own forms, `fully_reshardable` gathers 12 bytes a parameter of the tensor parallel rank's model on
every data parallel rank (78 GB for a 13B model at TP 2), `dp_reshardable` knows no other TP size, and
`fully_sharded_model_space` is refused since 0.14 (`ShardedTensor.flattened_range is not supported`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory  # noqa: E402
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

Box = tuple[int, tuple[int, ...], tuple[int, ...]]
"""First element in the flat run, offsets, sizes."""


def boxes(shape: Sequence[int], begin: int, end: int) -> Iterator[Box]:
    """The run [begin, end) of a row-major tensor as boxes, in order.

    Args:
        shape: Shape of the tensor.
        begin: First element of the run.
        end: One past its last element.

    Yields:
        Element of the tensor that the box starts at, the box's offsets, its sizes.
    """
    if begin >= end:
        return
    if len(shape) <= 1:
        yield begin, (begin,) * len(shape), (end - begin,) * len(shape)
        return
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # all within one row
        yield from _in_row(shape, last, begin, end)
        return
    yield from _in_row(shape, first - 1, begin, first * row)
    if first < last:
        yield first * row, (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, end)


def _in_row(shape: Sequence[int], number: int, begin: int, end: int) -> Iterator[Box]:
    start = number * math.prod(shape[1:])
    for position, offsets, sizes in boxes(shape[1:], begin - start, end - start):
        yield start + position, (number, *offsets), (1, *sizes)


def sharded_state(optimizer: DistributedOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Sharded state of this rank's part of an optimizer.

    Args:
        optimizer: The optimizer.
        model_state: Sharded state dict of the model whose parameters it updates.
        is_loading: Loading fills the state in place.

    Returns:
        `optimizer` (parameter groups, the same on every rank) and `tensors`, a list of sharded tensors whose data are
        views of the optimizer's own. float32 master weights that are the model's weights are left to the model.
    """
    common = _common(optimizer)
    if not optimizer.optimizer.state:
        # A save before the first step that was taken. megatron-core allocates; what is loaded fills it.
        optimizer.load_state_dict(common)
        if not is_loading:
            _begin(optimizer)
    layouts = _layouts(model_state)
    tensors: list[ShardedTensor] = []
    for parameter, begin, end in _owned(optimizer):
        for name, flat in _states(optimizer, parameter).items():
            for whole, start in layouts[parameter]:
                tensors += _pieces(name, whole, flat, begin - start, end - start)
    return {**common, "tensors": tensors}


def load_state(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Take over the step count; the tensors were filled in place.

    All else in the parameter groups is config. megatron-core pairs groups by it, so that a run that continues with
    another learning rate would find none of its own.
    """
    steps = {group["step"] for group in state["optimizer"]["param_groups"] if group.get("step") is not None}
    assert len(steps) <= 1, steps
    for step in steps:
        # Transformer Engine counts in the group, PyTorch for every parameter.
        for group in optimizer.optimizer.param_groups:
            group["step"] = int(step)
        for own in optimizer.optimizer.state.values():
            if "step" in own:
                own["step"].fill_(step)


def _common(optimizer: DistributedOptimizer) -> dict[str, Any]:
    """The optimizer's `state_dict`, which holds nothing of a single parameter.

    It asks the inner optimizer for all of its state on the way, and Transformer Engine's fused Adam answers with copies
    in float32 (2.20, `optimizers/fused_adam.py`): with bfloat16 moments 8 bytes a parameter on the device. So that one
    is shown its smallest parameter alone; it counts its steps in the groups.
    """
    inner = optimizer.optimizer
    held = inner.state
    if held and hasattr(inner, "get_unscaled_state"):
        smallest = min(held, key=torch.Tensor.numel)
        inner.state = defaultdict(dict, {smallest: held[smallest]})
    try:
        return optimizer.state_dict()
    finally:
        inner.state = held


def _begin(optimizer: DistributedOptimizer) -> None:
    """Give what was only allocated the values that the first step would begin with."""
    inner = optimizer.optimizer
    for parameter, own in inner.state.items():
        if "master_param" in own:
            inner.initialize_state(parameter, inner.store_param_remainders)
        else:
            for tensor in own.values():
                tensor.zero_()


def _states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Flat tensors of this rank's run of a parameter, as the optimizer holds them: bit by bit, and to be filled."""
    group, place = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][place]
    states = {name: state for name, state in optimizer.optimizer.state[main].items() if name != "step"}
    separate = main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
    return {**states, "fp32_param": main} if separate else states


def _layouts(model_state: dict[str, Any]) -> dict[torch.Tensor, list[tuple[ShardedTensor, int]]]:
    """For each parameter, the sharded tensors that it consists of and the element at which each begins."""
    entries, _ = extract_sharded_tensors_and_factories(model_state)
    found = {}
    for entry in nested_values(entries):
        parts = list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]
        origin = entry.data.storage_offset()
        for part in parts:
            assert part.data.untyped_storage().data_ptr() == entry.data.untyped_storage().data_ptr(), part.key
            assert part.data.is_contiguous(), f"{part.key}: a part of a parameter has to be a run of its elements"
        found[entry.data] = [(part, part.data.storage_offset() - origin) for part in parts]
    return found


def _owned(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Parameters that this rank has elements of, with the run of elements."""
    for dtypes in optimizer.gbuf_ranges:
        for buckets in dtypes.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _pieces(name: str, whole: ShardedTensor, flat: torch.Tensor, begin: int, end: int) -> Iterator[ShardedTensor]:
    """Sharded tensors for the elements [begin, end), counted from the start of `whole`, whose values are `flat`."""
    extra = whole.prepend_axis_num
    low, high = max(begin, 0), min(end, math.prod(whole.local_shape))
    for position, offsets, sizes in boxes(whole.local_shape, low, high):
        data = flat[position - begin : position - begin + math.prod(sizes)].view(sizes)
        shifted = (*whole.global_offset[:extra], *map(sum, zip(whole.global_offset[extra:], offsets, strict=True)))
        yield replace(
            whole,
            key=f"optimizer.{name}.{whole.key}",
            data=data,
            dtype=data.dtype,
            local_shape=tuple(sizes),
            global_offset=shifted,
            axis_fragmentations=None,
            # Data parallel ranks have different elements: replicas are left only along the other axes.
            replica_id=(*whole.replica_id[:2], 0),
        )
