"""The one owner of process groups, sizes and ranks. No other module asks megatron-core's `parallel_state`."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nemovl_train.config.schema import LanguageConfig, ParallelConfig
from nemovl_train.exceptions import LayoutError
from nemovl_train.parallel import cpu
from nemovl_train.parallel.attempt import own_part
from nemovl_train.parallel.legality import layout_problems

cpu.install_if_no_cuda()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# megatron-core wants its generator tracker seeded before sequence parallel layers run. Nothing draws from it: initial
# weights are keyed by name (model/init.py) and no layer drops out.
_TRACKER_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes, ranks and groups of a run.

    Ranks are numbered tensor parallel first, then context parallel, then data parallel. Tower and projector are data
    parallel over every process: their groups have TP 1, CP 1, DP = `world_size`.

    Attributes:
        language_groups: Groups of the language model, its DDP, optimizer and checkpoints.
        vision_groups: The same for tower and projector.
        mamba_context: How Mamba layers share a pack over context parallel ranks, `state_passing` or `head_exchange`.
        control: All processes, on the host: for decisions that no device should wait for.
        device: Where this process computes: its CUDA device, or the CPU.
    """

    world_size: int
    rank: int
    tp: int
    cp: int
    dp: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    sequence_parallel: bool
    mamba_context: str
    language_groups: ProcessGroupCollection
    vision_groups: ProcessGroupCollection
    control: dist.ProcessGroup
    device: torch.device

    @classmethod
    def create(cls, parallel: ParallelConfig, language: LanguageConfig | None = None) -> "Layout":
        """Joins the processes and makes the groups. Collective: every process calls it with equal arguments.

        Starts torch.distributed when it is not running: NCCL with CUDA, gloo without; one process needs no launcher.

        Args:
            parallel: Sizes of the axes.
            language: Model whose widths have to divide by them, when it is known.

        Raises:
            LayoutError: The sizes do not fit the number of processes or the model.
        """
        device = _start_distributed(parallel.collective_timeout_s)
        world_size = dist.get_world_size()
        problems = layout_problems(parallel, world_size, language)
        if problems:
            raise LayoutError("\n".join(problems))
        assert not parallel_state.model_parallel_is_initialized(), "Layout.destroy() comes before the next create()"
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            context_parallel_size=parallel.cp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=math.ceil(parallel.collective_timeout_s / 60),
        )
        model_parallel_cuda_manual_seed(_TRACKER_SEED, force_reset_rng=True)
        return cls(
            world_size=world_size,
            rank=dist.get_rank(),
            tp=parallel.tp,
            cp=parallel.cp,
            dp=world_size // (parallel.tp * parallel.cp),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            dp_rank=parallel_state.get_data_parallel_rank(),
            sequence_parallel=parallel.sequence_parallel,
            mamba_context=parallel.mamba_context,
            language_groups=ProcessGroupCollection.use_mpu_process_groups(),
            vision_groups=_vision_groups(),
            control=_control_group(),
            device=device,
        )

    @property
    def pack_ranks(self) -> int:
        """Ranks that work on one pack: tensor x context parallel."""
        return self.tp * self.cp

    @property
    def pack_rank(self) -> int:
        """This process's number among them, which is also its rank in `language_groups.tp_cp`."""
        return self.cp_rank * self.tp + self.tp_rank

    def context_tokens(self, length: int, cp_rank: int | None = None) -> range:
        """Positions of a pack that a context parallel rank holds: a run in the pack's own order.

        Args:
            length: Tokens of the pack.
            cp_rank: Whose; this process's when None.
        """
        rank = self.cp_rank if cp_rank is None else cp_rank
        assert length % self.cp == 0, "the config check refuses lengths that do not divide"
        return range(length // self.cp * rank, length // self.cp * (rank + 1))

    def residual_tokens(self, length: int, pack_rank: int | None = None) -> range:
        """Positions whose rows of the residual stream a rank holds: a part of its context with sequence parallelism.

        Args:
            length: Tokens of the pack.
            pack_rank: Whose, as `pack_rank` counts; this process's when None.
        """
        cp_rank, tp_rank = divmod(self.pack_rank if pack_rank is None else pack_rank, self.tp)
        context = self.context_tokens(length, cp_rank)
        if not self.sequence_parallel:
            return context
        assert len(context) % self.tp == 0, "the config check refuses lengths that do not divide"
        part = len(context) // self.tp
        return context[part * tp_rank : part * (tp_rank + 1)]

    def destroy(self) -> None:
        """Frees the groups, so that `create` can make others in the same process. Collective.

        torch.distributed itself stays up: its rendezvous cannot be repeated under a launcher. `shutdown` ends it.
        """
        groups = {
            id(g): g for c in (self.language_groups, self.vision_groups) for g in vars(c).values() if g is not None
        }
        parallel_state.destroy_model_parallel()
        groups[id(self.control)] = self.control
        ours = [g for g in groups.values() if not isinstance(g, list) and g is not dist.group.WORLD]
        # NCCL waits in a communicator's destruction for its other ranks, so all ranks need one order. That of the
        # collection is none: megatron-core fills it from a set of strings, which each process orders in its own way.
        for group in sorted(ours, key=lambda group: (len(group.group_name), group.group_name)):
            dist.destroy_process_group(group)


def launch_rank() -> int:
    """This process's number as its launcher gave it, before torch.distributed is up; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def alone() -> Iterator[None]:
    """Lets one process of several work as if it had been started by itself: layouts made inside are of one process.

    For work before the processes join, or after `shutdown`: the others wait elsewhere, or have left.
    """
    assert not dist.is_initialized() or dist.get_world_size() == 1, "the processes have joined; shutdown() comes first"
    hidden = {name: os.environ.pop(name) for name in _TORCHRUN_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        if hidden:
            shutdown()  # a world of one, or none: the launcher's can follow
        os.environ.update(hidden)


def shutdown() -> None:
    """Ends torch.distributed: at the end of a process, or when the rest of its work needs no other. Collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _start_distributed(timeout_s: float) -> torch.device:
    """Picks this process's device and starts torch.distributed if it is not running."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        # Decays of the scan underflow to denormals, on which a CPU is some twenty times slower.
        torch.set_flush_denormal(True)
        # A hint for CUDA streams; megatron-core warns at every sequence parallel layer without it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if all(name in os.environ for name in _TORCHRUN_VARIABLES):
            store, rank, world_size = next(dist.rendezvous("env://"))
            timeout = timedelta(seconds=timeout_s)
            dist.init_process_group(backend, store=own_part(store), rank=rank, world_size=world_size, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def _control_group() -> dist.ProcessGroup:
    """All processes over gloo: what they decide together would otherwise wait for the device's queue."""
    world = dist.group.WORLD
    assert world is not None
    return world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", group_desc="CONTROL")


def _vision_groups() -> ProcessGroupCollection:
    """Groups of a part that is replicated: a new one over all processes for data, a group of one for all else."""
    everyone = dist.new_group(list(range(dist.get_world_size())), group_desc="VISION_DATA_PARALLEL_GROUP")
    alone = parallel_state.get_pipeline_model_parallel_group()  # always this process only: we do not use pipelines
    data = [
        *("dp", "dp_cp", "dp_cp_gtp_remat", "intra_dp_cp", "tp_dp_cp", "intra_dist_opt"),
        *("expt_dp", "expt_dp_gtp_remat", "intra_expt_dp"),
    ]
    model = [
        *("tp", "pp", "mp", "cp", "tp_cp", "embd", "pos_embd", "gtp_remat"),
        *("ep", "expt_tp", "tp_ep", "tp_ep_pp", "tp_ep_pp_with_egtp_remat", "expt_gtp_remat"),
    ]
    return ProcessGroupCollection(**dict.fromkeys(data, everyone), **dict.fromkeys(model, alone))
