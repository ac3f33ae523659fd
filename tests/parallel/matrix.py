"""One training step of a small vision-language model in many parallel layouts, on CPU ranks or GPUs.

Every case is a layout, packs and a few options. All ranks of one group go through all cases; rank 0 writes what each
gave: loss, gradient norm, logits, and every gradient gathered to its full shape. The same function without other
processes gives what it should be. As a script it is one rank.

    python tests/parallel/matrix.py --ranks 4 --rank R --folder DIR --cases NAME [NAME ...]
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from matrix_packs import IMAGE, LENGTH, MODEL, MODELS, make_packs

from data_pipelines.schema import Pack
from nemovl_train.checkpoint import saving, sealed
from nemovl_train.config.schema import (
    AdapterConfig,
    AdapterTargets,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RecomputeConfig,
)
from nemovl_train.model import attention, lora, mixer, pruning, vlm
from nemovl_train.model.adapters import TrainedWeights, add_adapters
from nemovl_train.model.batch import PackBatch
from nemovl_train.model.init import full_shape, join_parts, local_part
from nemovl_train.model.vlm import NemotronVL, build_model
from nemovl_train.parallel.layout import Layout, shutdown
from nemovl_train.training import optimizer
from nemovl_train.training.micro_batches import forward_backward
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.step import loss_scales, train_step

MOVE = "move of "
CHANGED = 2
"""Document of the first pack whose tokens change, to see whose logits move."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Attributes:
        parallel: The layout; data parallel is what remains.
        broken: Name of a mechanism to switch off, in `BREAKS`: the result must then differ.
        order: Order of the four packs.
        steps: 0 compares one step's gradients; otherwise that many optimizer steps, and parameters are compared.
    """

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: str = "hybrid"
    packs: str = "images"
    mode: str = "square"
    divisor: str = "global"
    train: tuple[str, ...] = ("vision", "projector", "language")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    order: tuple[int, ...] = (0, 1, 2, 3)
    longest_piece: int | None = None
    overlap: bool = False
    distributed: bool = False
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    steps: int = 0
    broken: str | None = None

    def alone(self) -> "Case":
        """What it is compared with: the same without other ranks, pieces, overlap or sharding."""
        return replace(
            self,
            parallel=ParallelConfig(),
            order=(0, 1, 2, 3),
            longest_piece=None,
            overlap=False,
            distributed=False,
            recompute=RecomputeConfig(),
            broken=None,
        )


def run_in(
    layout: Layout, case: Case, backend: str = "torch", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Loss, gradient norm, logits of the first pack, and all gradients or parameters, whole and on the host."""
    with switched_off(case.broken), _pieces_of(case.longest_piece), _small_buckets():
        found = _outcome(case, MODELS[case.model], layout, backend, dtype)
    if case.broken is None:
        _check_replicas(found, layout)
    return found


def _check_replicas(found: dict[str, torch.Tensor], layout: Layout) -> None:
    """Every rank has what the first has, bit by bit: loss, logits, whole gradients, parameters."""
    mine = torch.cat([tensor.double().flatten() for tensor in found.values()]).to(layout.device)
    first = mine.clone()
    dist.broadcast(first, src=0)
    assert torch.equal(mine, first), "ranks differ"


def _outcome(
    case: Case, config: ModelConfig, layout: Layout, backend: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    _check_groups(layout)
    model, optimizers, optim = make_trainer(case, config, layout, backend, dtype)
    packs = [make_packs(case.packs, case.mode)[i] for i in case.order][layout.dp_rank :: layout.dp]
    found = _logits(model, make_packs(case.packs)[0], layout)
    if case.steps:
        before = {n: whole(p.detach(), p, n, layout) for n, p in model.named_parameters()}
        results = [train_step(optimizers, packs, layout, lr=optim.lr, divisor=case.divisor) for _ in range(case.steps)]
        optimizers.collect_weights()
        found |= {f"loss {i}": torch.tensor(result.loss) for i, result in enumerate(results)}
        found |= {f"norm {i}": torch.tensor(result.grad_norm) for i, result in enumerate(results)}
        after = {n: whole(p.detach(), p, n, layout) for n, p in model.named_parameters()}
        # How far each went, since a step moves a parameter by little of its size.
        return found | {f"{MOVE}{n}": after[n] - before[n] for n in after}
    scales = loss_scales(packs, case.divisor, layout)
    optimizers.zero_grad()
    loss = forward_backward(model, packs, scales, layout)
    dist.all_reduce(loss, group=layout.language_groups.dp_cp)
    optimizers.chained.prepare_grads()
    found |= {"loss": loss.cpu(), "norm": torch.tensor(float(optimizers.chained.get_grad_norm()))}
    return found | {n: whole(p.main_grad, p, n, layout) for n, p in model.named_parameters() if p.requires_grad}


def _check_groups(layout: Layout) -> None:
    """The numbers that the layout promises are those of its groups."""
    groups, vision = layout.language_groups, layout.vision_groups
    assert layout.tp * layout.cp * layout.dp == layout.world_size
    assert (groups.tp_cp.size(), groups.tp_cp.rank()) == (layout.pack_ranks, layout.pack_rank)
    assert (groups.dp.size(), groups.dp.rank()) == (layout.dp, layout.dp_rank)
    assert (vision.tp.size(), vision.cp.size(), vision.dp.size()) == (1, 1, layout.world_size)
    assert vision.dp_cp.rank() == layout.rank
    held = [layout.residual_tokens(LENGTH, rank) for rank in range(layout.pack_ranks)]
    copies = 1 if layout.sequence_parallel else layout.tp
    assert sorted(i for tokens in held for i in tokens) == sorted(list(range(LENGTH)) * copies)


@torch.no_grad()
def _logits(model: NemotronVL, pack: Pack, layout: Layout) -> dict[str, torch.Tensor]:
    """Logits of a pack, and how many rows move in other documents and in its own when one document changes."""
    before = model.logits(PackBatch.from_pack(pack, layout)).float().cpu()
    changed = pack.seq_idx == CHANGED
    ids = torch.where(changed & (pack.input_ids != IMAGE), (pack.input_ids + 7) % 200 + 20, pack.input_ids)
    after = model.logits(PackBatch.from_pack(replace(pack, input_ids=ids), layout)).float().cpu()
    moved = (before != after).any(1)
    assert moved[changed].all(), "a document that changed keeps its logits: the test shows nothing"
    return {"logits": before, "rows moved in other documents": moved[~changed].sum()}


def make_trainer(
    case: Case, config: ModelConfig, layout: Layout, backend: str = "torch", dtype: torch.dtype = torch.float32
) -> tuple[NemotronVL, Optimizers, OptimConfig]:
    """A model whose every tensor matters, and its optimizers."""
    model = build_model(config, layout, params_dtype=dtype, backend=backend, seed=7, recompute=case.recompute)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if parameter.dim() == 1 or "vision_model" in name else 3.0
            parameter.mul_(scale)
    add_adapters(model, case.adapter, layout, seed=7)
    _fill_adapters(model)
    model.freeze(train=case.train)
    optim = OptimConfig(
        lr=1e-3,
        eps=1e-3,  # keeps an update from amplifying the rounding of tiny gradients
        distributed=case.distributed,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap and case.distributed,
    )
    optimizers = Optimizers(model, layout, optim, dtype)
    return model, optimizers, optim


def _fill_adapters(model: NemotronVL) -> None:
    """Second halves start at zero, where first halves have no gradient: give them values, the same in every layout."""
    for number, (_, pair) in enumerate(lora.adapters(model)):
        tp, generator = pair.groups.tp, torch.Generator().manual_seed(number)
        values = torch.randn(full_shape(pair.lora_b, tp.size()), generator=generator) * 0.3
        pair.lora_b.data.copy_(local_part(values, pair.lora_b, tp.size(), tp.rank()))


def whole(tensor: torch.Tensor, parameter: torch.Tensor, name: str, layout: Layout) -> torch.Tensor:
    """A parameter's values or gradient in full shape, from all tensor parallel ranks."""
    group = (layout.language_groups if name.startswith("language_model") else layout.vision_groups).tp
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return join_parts(parts, parameter).float().cpu()


@contextlib.contextmanager
def _pieces_of(tokens: int | None) -> Iterator[None]:
    """Makes Mamba layers cut what they scan into short pieces, as if the kernels' limit were there."""
    kept = mixer.MambaSizes.longest_piece
    if tokens is not None:
        mixer.MambaSizes.longest_piece = property(lambda sizes: tokens)
    try:
        yield
    finally:
        mixer.MambaSizes.longest_piece = kept


@contextlib.contextmanager
def _small_buckets() -> Iterator[None]:
    """Gives every parameter a bucket of its own, so that weights are there only where their own module was called."""
    kept = optimizer._ddp_config
    optimizer._ddp_config = lambda *args, **kwargs: replace(kept(*args, **kwargs), bucket_size=1)
    try:
        yield
    finally:
        optimizer._ddp_config = kept


def _zero_states(scans, group, original=mixer._states_before):
    states, *lefts = original(scans, group)
    return [torch.zeros_like(state) for state in states], *lefts


def _zero_gradients(scans, piece_lefts, rank_lefts, group, original=mixer._gradients_after):
    return [torch.zeros_like(grad) for grad in original(scans, piece_lefts, rank_lefts, group)]


def _zero_halos(mixed, reach, pieces, group, original=mixer._halos):
    return [lambda halo=halo: torch.zeros_like(halo()) for halo in original(mixed, reach, pieces, group)]


def _own_tokens_only(part, group):
    return torch.cat([part] * group.size())


def _first_share(self, sizes, rank, ranks, original=mixer.MambaParameters.share):
    return original(self, sizes, 0, ranks)


def _kept_rows(rows, send, receive, group, original=vlm.exchange_rows):
    return original(rows, send, receive, group).roll(1, 0)


def _low_uncopied(self, low, original=lora.Adapter._exchanged):
    return low if self.column else original(self, low)


BREAKS: dict[str, tuple[object, str, Callable]] = {
    "states between ranks": (mixer, "_states_before", _zero_states),
    "gradients of states between ranks": (mixer, "_gradients_after", _zero_gradients),
    "halo of the convolution": (mixer, "_halos", _zero_halos),
    "share of the mixer's parameters": (mixer.MambaParameters, "share", _first_share),
    "keys and values of other ranks": (attention, "gather_tokens", _own_tokens_only),
    "frame before a rank's first": (pruning, "_frame_before", lambda *args: None),
    "exchange of visual features": (vlm, "exchange_rows", _kept_rows),
    "division of shared gradients": (vlm, "_divide_gradient", lambda features, copies: None),
    "sum of an adapter's gradient over columns": (lora.Adapter, "_exchanged", _low_uncopied),
    "sum of an adapter's gradient over tokens": (lora, "_mark_whole", lambda parameter, summed: None),
    "collection of weights": (Optimizers, "collect_weights", lambda self: None),
    "reduction of gradients": (Optimizers, "reduce_gradients", lambda self, *a, **k: None),
}


@contextlib.contextmanager
def switched_off(name: str | None) -> Iterator[None]:
    """Runs the block with one mechanism replaced by a wrong one."""
    if name is None:
        yield
        return
    owner, attribute, wrong = BREAKS[name]
    kept = getattr(owner, attribute)
    setattr(owner, attribute, wrong)
    try:
        yield
    finally:
        setattr(owner, attribute, kept)


def worst(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, moves: bool = False
) -> tuple[float, str]:
    """Largest relative difference in norm over all tensors but parameters' moves, or over those, and whose it is.

    The key's third of a fused bias has no gradient but rounding, so biases of that projection count absolutely, against
    the norm of the whole gradient.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    norm = float(expected.get("norm", torch.tensor(1.0)))
    largest, where = 0.0, ""
    for name, tensor in expected.items():
        if name.startswith(MOVE) != moves:
            continue
        difference = float((found[name].double() - tensor.double()).norm())
        scale = norm if name.endswith("linear_qkv.bias") else float(tensor.double().norm())
        if difference == 0.0:
            continue
        relative = difference / scale if scale else float("inf")
        if relative > largest or relative != relative:
            largest, where = relative, name
    return largest, where


MOVED = Case(distributed=True, steps=2)
"""What is trained, saved and moved."""


def save_adapters(folder: Path) -> None:
    """Train adapters in TP 2 x CP 2, save them alone, take another step.

    Leaves the folder `adapters`, and in `adapters.pt` the trained parameters and the loss of that step.
    """
    layout = Layout.create(TP2_CP2_SP)
    model, optimizers, optim = make_trainer(ADAPTED, MODEL, layout)
    packs = make_packs("images")[layout.dp_rank :: layout.dp]
    for _ in range(ADAPTED.steps):
        train_step(optimizers, packs, layout, lr=optim.lr, divisor="global")
    saved = TrainedWeights(model)
    saving.save(folder / "adapters", ADAPTED.steps, model=saved, optimizer=optimizers, state={}, run_id="adapters")
    found = {n: whole(p.detach(), p, n, layout) for n, p in model.named_parameters() if n in saved.names}
    loss = train_step(optimizers, packs, layout, lr=optim.lr, divisor="global").loss
    if dist.get_rank() == 0:
        torch.save({**found, "loss": torch.tensor(loss)}, folder / "adapters.pt")
    layout.destroy()


def move_checkpoint(folder: Path) -> None:
    """Train in TP 2 x CP 2 (CP 4 on eight ranks), save, take a step; load in TP 2 x DP, save, take that step there.

    Leaves the folders `first` and `second`, and in `moved.pt` the parameters and losses.
    """
    found = {}
    context = TP2_CP4_SP if dist.get_world_size() == 8 else TP2_CP2_SP
    for name, parallel, source in (("first", context, None), ("second", TP2, "first")):
        layout = Layout.create(parallel)
        model, optimizers, optim = make_trainer(MOVED, MODEL, layout)
        packs = make_packs("images")[layout.dp_rank :: layout.dp]
        options = {"lr": optim.lr, "divisor": "global"}
        if source is None:
            for _ in range(MOVED.steps):
                train_step(optimizers, packs, layout, **options)
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            sealed.load(sealed.step_folder(folder / source, MOVED.steps), model=model, optimizer=optimizers)
        saving.save(folder / name, MOVED.steps, model=model, optimizer=optimizers, state={}, run_id="moved")
        found |= {f"{name} {n}": whole(p.detach(), p, n, layout) for n, p in model.named_parameters()}
        loss = train_step(optimizers, packs, layout, **options).loss
        found |= {f"{name}, loss of the next step": torch.tensor(loss)}
        layout.destroy()
    if dist.get_rank() == 0:
        torch.save(found, folder / "moved.pt")


TP2 = ParallelConfig(tp=2)
TP2_SP = ParallelConfig(tp=2, sequence_parallel=True)
CP2 = ParallelConfig(cp=2)
CP4 = ParallelConfig(cp=4)
TP2_CP2 = ParallelConfig(tp=2, cp=2)
TP2_CP2_SP = ParallelConfig(tp=2, cp=2, sequence_parallel=True)
TP2_CP4_SP = ParallelConfig(tp=2, cp=4, sequence_parallel=True)
TP4_CP2_SP = ParallelConfig(tp=4, cp=2, sequence_parallel=True)
CP8 = ParallelConfig(cp=8)


def heads(parallel: ParallelConfig) -> ParallelConfig:
    """The same layout with the Mamba layers' other form."""
    return replace(parallel, mamba_context="head_exchange")


EVERYWHERE = AdapterConfig(rank=4, alpha=6.0, targets=AdapterTargets(vision=("*",), projector=("*",), language=("*",)))
LANGUAGE = AdapterConfig(rank=4, alpha=6.0, targets=AdapterTargets(language=("*",)))


ADAPTED = Case(distributed=True, steps=2, train=("projector",), adapter=LANGUAGE)
"""What is trained with adapters and saved without its base."""


# On four ranks: what is left beside TP and CP is data parallel, so every layout here is one of four ranks.
CASES: dict[str, Case] = {
    "dp4": Case(),
    "tp2 dp2": Case(parallel=TP2),
    "tp2 sp dp2": Case(parallel=TP2_SP),
    "cp2 dp2": Case(parallel=CP2),
    "cp4": Case(parallel=CP4),
    "tp2 cp2": Case(parallel=TP2_CP2),
    "tp2 cp2 sp": Case(parallel=TP2_CP2_SP),
    "cp2 dp2 heads": Case(parallel=heads(CP2)),
    "cp4 heads": Case(parallel=heads(CP4)),
    "tp2 cp2 sp heads": Case(parallel=heads(TP2_CP2_SP)),
    "cp4 few heads": Case(parallel=CP4, model="few_heads"),
    "tp2 cp2 sp few heads": Case(parallel=TP2_CP2_SP, model="few_heads"),
    "cp2 dp2 one head": Case(parallel=CP2, model="one_head"),
    "cp2 dp2 rotary": Case(parallel=CP2, model="rotary"),
    "cp4 rotary": Case(parallel=CP4, model="rotary"),
    "tp2 cp2 sp rotary": Case(parallel=TP2_CP2_SP, model="rotary"),
    "cp2 dp2 pieces": Case(parallel=CP2, longest_piece=48),
    "cp2 dp2 heads pieces": Case(parallel=heads(CP2), longest_piece=48),
    "dp4 pieces": Case(longest_piece=48),
    "cp4 text": Case(parallel=CP4, packs="text"),
    "cp2 dp2 first": Case(parallel=CP2, packs="first"),
    "tp2 cp2 sp last": Case(parallel=TP2_CP2_SP, packs="last"),
    "dp4 first": Case(packs="first"),
    "cp2 dp2 frozen tower": Case(parallel=CP2, train=("projector", "language")),
    "tp2 cp2 sp frozen language": Case(parallel=TP2_CP2_SP, train=("vision", "projector")),
    "cp4 projector alone": Case(parallel=CP4, train=("projector",)),
    "cp4 projector alone, last": Case(parallel=CP4, train=("projector",), packs="last"),
    "cp2 dp2 language alone": Case(parallel=CP2, train=("language",), packs="first"),
}
CASES |= {
    "cp4 clips": Case(parallel=CP4, packs="clips"),
    "tp2 cp2 clips": Case(parallel=TP2_CP2, packs="clips"),
    "tp2 cp2 sp clips": Case(parallel=TP2_CP2_SP, packs="clips"),
    "tp2 sp dp2 clips": Case(parallel=TP2_SP, packs="clips"),
    "cp2 dp2 clips, frozen tower": Case(parallel=CP2, packs="clips", train=("projector", "language")),
    "tp2 cp2 sp clips sharded overlap": Case(
        parallel=TP2_CP2_SP, packs="clips", distributed=True, overlap=True, steps=3
    ),
}
CASES |= {
    "tp2 dp2 adapters": Case(parallel=TP2, adapter=EVERYWHERE, train=()),
    "tp2 sp dp2 adapters": Case(parallel=TP2_SP, adapter=EVERYWHERE, train=()),
    "tp2 cp2 sp adapters": Case(parallel=TP2_CP2_SP, adapter=LANGUAGE, train=("projector",)),
    "tp2 sp dp2 rotary adapters": Case(parallel=TP2_SP, model="rotary", adapter=LANGUAGE, train=()),
    "tp2 cp2 sp sharded adapters": Case(
        parallel=TP2_CP2_SP, adapter=EVERYWHERE, train=(), distributed=True, overlap=True, steps=3
    ),
}
CASES |= {
    f"cp2 dp2 {mode} {divisor}": Case(parallel=CP2, mode=mode, divisor=divisor, order=(3, 1, 0, 2))
    for mode in ("token", "sample", "square")
    for divisor in ("global", "pack")
}
CASES |= {
    "dp4 overlap": Case(overlap=True, steps=2),
    "dp4 sharded overlap": Case(overlap=True, distributed=True, steps=3, packs="first"),
    "cp2 dp2 sharded overlap": Case(parallel=CP2, overlap=True, distributed=True, steps=3, packs="last"),
    "tp2 cp2 sp sharded overlap": Case(parallel=TP2_CP2_SP, overlap=True, distributed=True, steps=3),
    "cp4 sharded": Case(parallel=CP4, distributed=True, steps=3),
    "cp4 sharded, no image-side weights change": Case(parallel=CP4, distributed=True, steps=2, packs="text"),
}
SELECTIVE = RecomputeConfig(language="selective", vision="selective")
EIGHT: dict[str, Case] = {
    "tp2 cp4 sp": Case(parallel=TP2_CP4_SP),
    "tp2 cp4 sp heads": Case(parallel=heads(TP2_CP4_SP), model="eight_groups"),
    "tp2 cp4 sp sharded overlap": Case(
        parallel=TP2_CP4_SP,
        recompute=RecomputeConfig(language="full", vision="full"),
        overlap=True,
        distributed=True,
        steps=3,
    ),
    "tp4 cp2 sp": Case(parallel=TP4_CP2_SP),
    "cp8": Case(parallel=CP8),
    "cp8 heads": Case(parallel=heads(CP8), model="eight_groups"),
    "cp2 dp4": Case(parallel=CP2),
}
"""Layouts of eight ranks: the published node's."""

CASES |= {
    "tp2 cp2 sp selective": Case(parallel=TP2_CP2_SP, recompute=SELECTIVE),
    "cp4 heads selective": Case(parallel=heads(CP4), recompute=SELECTIVE),
    "tp2 sp dp2 selective": Case(parallel=TP2_SP, recompute=SELECTIVE),
    "tp2 cp2 sp full": Case(parallel=TP2_CP2_SP, recompute=RecomputeConfig(language="full", vision="full")),
    "cp4 full sharded overlap": Case(
        parallel=CP4,
        recompute=RecomputeConfig(language="full", vision="tiles"),
        overlap=True,
        distributed=True,
        steps=3,
    ),
}
CASES["tp2 sp dp2 adapters selective"] = replace(CASES["tp2 sp dp2 adapters"], recompute=SELECTIVE)
CONTROLS: dict[str, Case] = {
    "states": Case(parallel=CP4, broken="states between ranks"),
    "state gradients": Case(parallel=CP4, broken="gradients of states between ranks"),
    "halo": Case(parallel=CP4, broken="halo of the convolution"),
    "shares": Case(parallel=heads(CP4), broken="share of the mixer's parameters"),
    "keys": Case(parallel=CP4, model="few_heads", broken="keys and values of other ranks"),
    "frame before": Case(parallel=CP4, packs="clips", broken="frame before a rank's first"),
    "features": Case(parallel=CP4, broken="exchange of visual features"),
    "shared gradients": Case(parallel=TP2_CP2, broken="division of shared gradients"),
    "adapter's columns": Case(
        parallel=TP2, adapter=LANGUAGE, train=(), broken="sum of an adapter's gradient over columns"
    ),
    "adapter's tokens": Case(
        parallel=TP2_SP, adapter=LANGUAGE, train=(), broken="sum of an adapter's gradient over tokens"
    ),
    "weights": Case(overlap=True, distributed=True, steps=3, broken="collection of weights"),
    "reduction": Case(parallel=CP2, broken="reduction of gradients"),
}
QUICK = (
    *("tp2 sp dp2", "tp2 cp2", "tp2 cp2 sp", "cp4", "cp4 heads", "cp4 few heads", "cp2 dp2 pieces", "cp2 dp2 first"),
    *("cp2 dp2 sharded overlap", "tp2 cp2 sp selective", "tp2 cp2 sp full", "tp2 dp2 adapters"),
    *("tp2 sp dp2 adapters", "tp2 sp dp2 adapters selective", "cp4 clips", "tp2 cp2 clips", "tp2 cp2 sp clips"),
)
"""The cheapest of each mechanism, for every run of the tests; the rest is for the whole matrix."""

QUICK_CONTROLS = (
    *("states", "keys", "features", "shared gradients", "weights", "frame before"),
    *("adapter's columns", "adapter's tokens"),
)


def run_ranks(ranks: int, folder: Path, names: Iterable[str], *options: str, timeout_s: int) -> None:
    """Start one process a rank over all cases and wait; what each case gave is then in `folder`.

    Raises:
        AssertionError: A rank failed or did not end in time; with what it wrote.
    """
    base = [sys.executable, __file__, "--ranks", str(ranks), "--folder", str(folder), *options, "--cases", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context((folder / f"rank{rank}.log").open("w+")) for rank in range(ranks)]
        started = [
            subprocess.Popen([*base, "--rank", str(rank)], env=environment, stderr=log) for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + timeout_s
        # One that failed leaves the others waiting for it.
        while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        ended = [p.poll() for p in started]
        late = next((rank for rank, code in enumerate(ended) if code is None), None)
        failed = next((rank for rank, code in enumerate(ended) if code), late)
        for process in started:
            process.kill()
        if failed is not None:
            logs[failed].seek(0)
            raise AssertionError(f"rank {failed} ended with {started[failed].poll()}:\n{logs[failed].read()}")


def results(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What a case gave."""
    return torch.load(folder / f"{name}.pt")


def fits(case: Case, ranks: int) -> bool:
    """Whether this many ranks can run a case."""
    return ranks % (case.parallel.tp * case.parallel.cp) == 0


def main() -> None:
    """One rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--checkpoint", action="store_true", help="also train, save, load elsewhere and save again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    if cuda:
        sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
        from gpu_packs import one_configuration_per_kernel
        from shared_gpus import local_rank

        gpu = local_rank(args.rank, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(gpu)
        torch.cuda.set_device(gpu)
        one_configuration_per_kernel()
    store = dist.FileStore(str(args.folder / "store"), args.ranks)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=args.rank, world_size=args.ranks)
    every = CASES | CONTROLS | EIGHT
    # Groups take seconds to make on GPUs: cases of one layout share them.
    names = sorted(args.cases, key=lambda name: repr(every[name].parallel))
    for parallel, same in itertools.groupby(names, key=lambda name: every[name].parallel):
        layout = Layout.create(parallel)
        for name in same:
            began = time.perf_counter()
            found = run_in(layout, every[name], args.backend, getattr(torch, args.dtype))
            print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
            if args.rank == 0:
                torch.save(found, args.folder / f"{name}.pt")
        layout.destroy()
    if args.checkpoint:
        move_checkpoint(args.folder)
        save_adapters(args.folder)
    shutdown()


if __name__ == "__main__":
    main()
    sys.exit(0)
