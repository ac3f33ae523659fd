"""The Mamba-2 mixer of both backends: megatron-core's parameters and checkpoint layout, our forward over packs.

Shape legend: S tokens in a pack, H hidden. "Local" sizes are this tensor parallel rank's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nemovl_train.model.kernels import dispatch
from nemovl_train.model.packing import PackParams
from nemovl_train.parallel import cpu

cpu.install_if_no_cuda()

from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # noqa: E402

# Fixed in the released models: megatron-core and the Hugging Face model hard-code it too.
GATED_NORM_EPS = 1e-5


class GatedNorm(MegatronModule):
    """Holds the weight of the gated RMSNorm, split over tensor parallel ranks by whole groups; the mixer applies it."""

    def __init__(self, config: TransformerConfig, local_size: int, tp_group: Any) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.ones(local_size, dtype=config.params_dtype, device=device))
        _mark_split(self.weight)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The weight as a tensor split along its only axis."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class PackedMambaMixer(MambaMixer):
    """megatron-core's `MambaMixer` for packs, on any device.

    It keeps the parent's parameter names, their tensor parallel partition (`partition_sizes`: z, x, B, C, dt are split
    one by one) and `sharded_state_dict`. The parent's constructor needs mamba-ssm and CUDA, and its forward handles
    inference; both are replaced. Values of parameters come from `init.py` or a checkpoint.

    Dtypes: A_log and D are float32, dt_bias and the rest `config.params_dtype`; A and dt are computed in float32.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
        d_conv: int = 4,
        chunk_size: int = 128,
    ) -> None:
        MegatronModule.__init__(self, config)
        assert pg_collection is not None
        assert config.mamba_num_heads is not None
        assert pg_collection.cp.size() == 1, "the layout check refuses context parallelism before a model is built"
        self.layer_number, self.pp_layer_offset = layer_number, pp_layer_offset
        self.tp_group, self.chunk_size, self.d_conv, self.d_model = pg_collection.tp, chunk_size, d_conv, d_model
        self.headdim, self.d_state = config.mamba_head_dim, config.mamba_state_dim
        self.nheads, self.ngroups = config.mamba_num_heads, config.mamba_num_groups
        self.d_inner = self.nheads * self.headdim
        # The parent's `train()` marks its inference cache stale through this name.
        self._A_neg_exp_cache_stale = True

        tp = self.tp_group.size()
        assert self.nheads % tp == 0
        assert self.ngroups % tp == 0
        assert self.nheads % self.ngroups == 0
        self.nheads_local_tp, self.ngroups_local_tp = self.nheads // tp, self.ngroups // tp
        self.d_inner_local_tp = self.d_inner // tp
        state_columns = self.ngroups_local_tp * self.d_state
        self._build_projections(submodules, [self.d_inner_local_tp] * 2 + [state_columns] * 2 + [self.nheads_local_tp])
        self._build_parameters([self.d_inner_local_tp, state_columns, state_columns])

    def _build_projections(self, submodules: MambaMixerSubmodules, local_columns: list[int]) -> None:
        common = {"config": self.config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            self.d_model,
            sum(local_columns) * self.tp_group.size(),
            init_method=self.config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="fc1",
            **common,
        )
        self.in_proj.weight.partition_sizes = local_columns
        self.out_proj = build_module(
            submodules.out_proj,
            self.d_inner,
            self.d_model,
            init_method=self.config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="fc2",
            **common,
        )

    def _build_parameters(self, local_channels: list[int]) -> None:
        def empty(*shape: int, dtype: torch.dtype = self.config.params_dtype) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(*shape, dtype=dtype, device=torch.cuda.current_device()))
            _mark_split(parameter)
            return parameter

        self.conv1d_weight = empty(sum(local_channels), 1, self.d_conv)
        self.conv1d_bias = empty(sum(local_channels))
        for parameter in (self.conv1d_weight, self.conv1d_bias):
            parameter.partition_sizes = local_channels  # type: ignore[attr-defined]
        self.dt_bias = empty(self.nheads_local_tp)
        self.A_log = empty(self.nheads_local_tp, dtype=torch.float32)
        self.D = empty(self.nheads_local_tp, dtype=torch.float32)
        self.norm = GatedNorm(self.config, self.d_inner_local_tp, self.tp_group)

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: None = None,
        *,
        inference_params: None = None,
        packed_seq_params: PackParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixes along the documents of a pack.

        Args:
            hidden_states: [S, 1, H]; the rank's part of S with sequence parallelism.
            inference_context: Must be None: this forward is for training.
            inference_params: Must be None.
            packed_seq_params: Boundaries of the pack. Without them states would leak from sample to sample.

        Returns:
            [S, 1, H], and no bias.
        """
        assert inference_context is None
        assert inference_params is None
        assert getattr(packed_seq_params, "seq_idx", None) is not None, "a Mamba layer needs seq_idx"
        assert packed_seq_params is not None
        projected, _ = self.in_proj(hidden_states)
        assert projected.shape[1] == 1, "packs are the only batch"
        inner = dispatch.mamba_inner(
            projected.squeeze(1),
            conv_weight=self.conv1d_weight.squeeze(1),
            conv_bias=self.conv1d_bias,
            a_log=self.A_log,
            d=self.D,
            dt_bias=self.dt_bias,
            norm_weight=self.norm.weight,
            seq_idx=packed_seq_params.seq_idx,
            head_dim=self.headdim,
            num_groups=self.ngroups_local_tp,
            chunk_size=self.chunk_size,
            eps=GATED_NORM_EPS,
        )
        return self.out_proj(inner.unsqueeze(1))


def _mark_split(parameter: nn.Parameter) -> None:
    """Tells megatron-core that tensor parallel ranks hold different rows of a parameter."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = 0  # type: ignore[attr-defined]
