"""One document through a Mamba, an attention and an MLP layer over context parallel ranks, against fp32 on one device.

    python benchmarks/long_block.py --processes 2 --out O.json           # GPUs: te in bf16, 12B widths, 311,296 tokens
    python benchmarks/long_block.py --processes 2 --small --out O.json   # CPU: fp32, laptop widths, 2,048 tokens

The reference is written anew from the layers' definitions: the Mamba layer one group of heads at a time over the whole
document, attention and MLP at sampled positions, each over all keys before it. It sees the bf16-rounded weights and
inputs of the run in fp32.

Shape legend: S tokens, E hidden, K sampled positions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from ranks import rank_parser, start_ranks

SAMPLES = 96
BOUNDS = {"bf16": 2e-2, "fp32": 1e-5}
STALL_SECONDS = 240


def main() -> None:
    """Parent: start the ranks and judge. Child: one rank."""
    parser = rank_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=311296)
    parser.add_argument("--small", action="store_true", help="laptop widths and 2,048 tokens, fp32")
    args = parser.parse_args()
    if args.rank is not None:
        run_rank(args)
        return
    start_ranks(args.processes)
    result = json.loads(args.out.read_text())
    print(json.dumps(result, indent=1))
    sys.exit(result["worst_relative_error"] > result["bound"])


def run_rank(args: argparse.Namespace) -> None:
    """Run the block; rank 0 compares and writes."""
    import faulthandler

    import torch
    import torch.distributed as dist

    from nemovl_train.config.schema import ParallelConfig
    from nemovl_train.parallel.layout import Layout

    faulthandler.dump_traceback_later(STALL_SECONDS, exit=True)
    cuda = torch.cuda.is_available()
    if cuda:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gpu"))
        from gpu_packs import one_configuration_per_kernel
        from shared_gpus import local_rank

        gpu = local_rank(args.rank, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(gpu)
        torch.cuda.set_device(gpu)
        one_configuration_per_kernel()
    store = dist.FileStore(args.store, args.processes)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=args.rank, world_size=args.processes)
    config = sizes(small=args.small)
    layout = Layout.create(ParallelConfig(cp=args.processes), config)
    tokens, dtype = (2048, torch.float32) if args.small else (args.tokens, torch.bfloat16)
    generator = torch.Generator(device=layout.device).manual_seed(0)
    hidden = torch.empty(tokens, config.hidden_size, dtype=dtype, device=layout.device)
    for part in hidden.split(4096):
        part.copy_(torch.randn(part.shape, generator=generator, device=layout.device))
    positions = sampled(tokens, args.processes)
    model, found, timing = through_the_block(config, layout, hidden, positions, small=args.small)
    if args.rank == 0:
        with torch.no_grad():
            expected = reference(model, config, hidden.float(), positions.to(layout.device))
        errors = ((found.float() - expected).norm(dim=1) / expected.norm(dim=1)).cpu()
        result = {
            "case": "long_block",
            "date": time.strftime("%Y-%m-%d"),
            "command": f"python benchmarks/long_block.py --processes {args.processes}" + " --small" * args.small,
            "device": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if cuda else "CPU",
            "processes": args.processes,
            "tokens": tokens,
            "dtype": str(dtype),
            "worst_relative_error": float(errors.max()),
            "worst_at": int(positions[errors.argmax()]),
            "median_relative_error": float(errors.median()),
            "bound": BOUNDS["fp32" if args.small else "bf16"],
            **timing,
        }
        args.out.write_text(json.dumps(result, indent=1))
    dist.barrier()
    faulthandler.cancel_dump_traceback_later()


def sizes(*, small: bool):
    """One layer of each kind: 12B widths, or a laptop's."""
    from nemovl_train.config.schema import LanguageConfig

    if not small:
        return LanguageConfig(hybrid_pattern="M*-", vocab_size=1024, base_vocab_size=1000)
    return LanguageConfig(
        hidden_size=64,
        hybrid_pattern="M*-",
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=16,
        ffn_hidden_size=96,
        mamba_num_heads=8,
        mamba_head_dim=16,
        mamba_state_dim=16,
        mamba_num_groups=2,
        chunk_size=32,
        vocab_size=64,
        base_vocab_size=64,
    )


def sampled(tokens: int, ranks: int):
    """[K] positions: around the borders of ranks, the first, the last, and evenly between."""
    import torch

    borders = [tokens * r // ranks + i for r in range(1, ranks) for i in (-1, 0, 1, 2)]
    even = torch.linspace(0, tokens - 1, SAMPLES).long().tolist()
    return torch.tensor(sorted({*borders, *even, 0, tokens - 1}))


def through_the_block(config, layout, hidden, positions, *, small: bool):
    """Forward and backward over the ranks.

    Returns:
        The model, its output at the positions on every rank [K, E], and time and memory of the second pass.
    """
    import torch
    import torch.distributed as dist

    from nemovl_train.model.backend import select_backend
    from nemovl_train.model.init import init_weights
    from nemovl_train.model.language import build_language_model
    from nemovl_train.model.packing import PackParams

    tokens, cuda = len(hidden), layout.device.type == "cuda"
    backend = select_backend("torch" if small else "te")
    model = build_language_model(config, layout, params_dtype=hidden.dtype, backend=backend)
    init_weights(model, seed=1, std=0.02)
    held = layout.context_tokens(tokens)
    ids = torch.zeros(1, tokens, dtype=torch.int32, device=layout.device)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=layout.device)
    own = hidden[held.start : held.stop].unsqueeze(1).clone().requires_grad_()
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        own.grad = None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        out = model.hidden_states(own, PackParams.from_boundaries(ends, ids, tokens, held))
        out.backward(torch.ones_like(out))
        if cuda:
            torch.cuda.synchronize()
    assert torch.isfinite(own.grad).all()
    found = torch.zeros(len(positions), config.hidden_size, device=layout.device)
    mine = [i for i, position in enumerate(positions.tolist()) if position in held]
    found[mine] = out.detach()[positions[mine].to(layout.device) - held.start, 0].float()
    dist.all_reduce(found)
    timing = {"second_pass_seconds": time.perf_counter() - began}
    timing["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return model, found, timing


def reference(model, config, hidden_SE, positions_K):
    """The block's output at the positions in fp32, [K, E]."""
    import torch
    import torch.nn.functional as F

    mamba, attention, mlp = model.decoder.layers
    weights = {name: p.detach().float() for name, p in model.named_parameters()}

    def norm(x, module):
        return F.rms_norm(x, (x.shape[-1],), module.weight.detach().float(), config.norm_eps)

    hidden_SE = hidden_SE + _mamba(mamba.mixer, norm(hidden_SE, mamba.norm))
    # Attention: keys and values of all tokens, queries of the sampled ones.
    normed = norm(hidden_SE, attention.input_layernorm)
    qkv = weights["decoder.layers.1.self_attention.linear_qkv.weight"]
    groups, width = config.num_query_groups, config.head_dim
    per_group = config.num_attention_heads // groups
    rows = qkv.view(groups, per_group + 2, width, -1)
    query = torch.einsum("ke,grde->kgrd", normed[positions_K], rows[:, :per_group])
    attended = query.new_empty(query.shape)
    for group in range(groups):
        key, value = normed @ rows[group, per_group].t(), normed @ rows[group, per_group + 1].t()
        for i, position in enumerate(positions_K.tolist()):
            seen = slice(0, position + 1)
            scores = query[i, group] @ key[seen].t() / width**0.5
            attended[i, group] = scores.softmax(-1) @ value[seen]
    out = attended.flatten(1) @ weights["decoder.layers.1.self_attention.linear_proj.weight"].t()
    sampled_KE = hidden_SE[positions_K] + out
    inner = norm(sampled_KE, mlp.pre_mlp_layernorm) @ weights["decoder.layers.2.mlp.linear_fc1.weight"].t()
    sampled_KE = sampled_KE + F.relu(inner).square() @ weights["decoder.layers.2.mlp.linear_fc2.weight"].t()
    return norm(sampled_KE, model.decoder.final_norm)


def _mamba(mixer, normed_SE):
    """The Mamba layer in fp32, one group of heads at a time with the reference kernels."""
    import torch

    from nemovl_train.model.kernels import reference as kernels
    from nemovl_train.model.mixer import GATED_NORM_EPS

    sizes = mixer.sizes
    parameters = mixer._parameters_outside_projections()
    own = sizes.shared(sizes.groups)
    rows = mixer.in_proj.weight.detach().float().split(sizes.columns)
    out_columns = mixer.out_proj.weight.detach().float().unflatten(1, (sizes.groups, -1))
    ids = torch.zeros(1, len(normed_SE), dtype=torch.int32, device=normed_SE.device)
    total = torch.zeros_like(normed_SE)
    for group in range(sizes.groups):
        p = type(parameters)(*(t.detach().float() for t in parameters.share(sizes, group, sizes.groups).tensors()))
        weight = torch.cat([part.unflatten(0, (sizes.groups, -1))[group] for part in rows])
        gate, mixed, dt = own.split(normed_SE @ weight.t())
        mixed = kernels.causal_conv(mixed, p.conv_weight, p.conv_bias, ids)
        x, b, c = own.states(mixed)
        a, outputs, state = -torch.exp(p.a_log), [], None
        for part in torch.arange(len(x)).split(8192):
            tokens = slice(int(part[0]), int(part[-1]) + 1)
            y, state = kernels.chunk_scan(
                *(x[tokens], dt[tokens], a, b[tokens], c[tokens]),
                d=p.d,
                dt_bias=p.dt_bias,
                seq_idx=ids[:, tokens],
                chunk_size=own.chunk,
                initial_state=state,
            )
            outputs.append(y.flatten(1))
        y = kernels.gated_rms_norm(
            torch.cat(outputs), gate, p.norm_weight, group_size=own.group_size, eps=GATED_NORM_EPS
        )
        total += y @ out_columns[:, group].t()
    return total


if __name__ == "__main__":
    # The library of this checkout, installed or not.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
