"""What a plan will give, from lengths alone: how full its packs are, what is in them, how evenly a step is shared."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.exceptions import DataError
from data_pipelines.plan import Plan
from data_pipelines.sources import TOO_LONG, Window

MOST_WINDOWS = 8


def forecast(plan: Plan, *, steps: int, global_batch: int, ranks: int, windows: int | None = None) -> dict[str, Any]:
    """Look at the first windows of a plan.

    Args:
        plan: The plan.
        steps: Optimiser steps of the run.
        global_batch: Packs of a step.
        ranks: Data-parallel ranks that share a step.
        windows: Windows to make; as many as the run has, at most 8, when None.

    Returns:
        Counts of the run and of one pass over the data, `fill` (share of the packs' tokens that are samples' tokens),
        `straggler` (modelled cost of the slowest rank over the mean, `mean` and `worst` over steps), samples left out
        or reduced, and a row for every source with its share in samples and tokens, as asked and as found.

    Raises:
        DataError: More ranks than packs in a step.
    """
    if not 1 <= ranks <= global_batch:
        raise DataError(f"--ranks {ranks}: a step has {global_batch} packs, so 1 to {global_batch} ranks can share it")
    packs = steps * global_batch
    in_run = -(-packs // plan.window_packs)
    count = windows or min(MOST_WINDOWS, in_run)
    began = time.perf_counter()
    made = [plan.window(k) for k in range(count)]
    seconds = time.perf_counter() - began
    samples = sum(len(w.draw.rows) for w in made)
    placed = sum(len(items) for w in made for items in w.bins)
    tokens = sum(_tokens(w, range(len(w.bins))) for w in made)
    seen = count * plan.window_packs
    return {
        "plan_hash": plan.hash,
        "packing": plan.packing,
        "seq_length": plan.seq_length,
        "steps": steps,
        "global_batch": global_batch,
        "packs": packs,
        "packs_per_pass": round(plan.pass_packs, 1),
        "steps_per_pass": round(plan.pass_packs / global_batch, 1),
        "passes": round(packs / plan.pass_packs, 3),
        "window_packs": plan.window_packs,
        "windows_seen": count,
        "packs_seen": seen,
        "fill": round(tokens / (seen * plan.seq_length), 5),
        "samples_per_pack": round(placed / seen, 2),
        "ranks": ranks,
        "straggler": straggler(made, global_batch, ranks),
        "too_long": plan.dropped[TOO_LONG],
        "no_room": sum(len(w.draw.rows) for w in made) - placed,
        "shrunk": sum(len(w.draw.fits) for w in made),
        "samples_seen": samples,
        "planned_samples_per_second": round(samples / seconds),
        "sources": _mix(plan, made, packs / seen),
    }


def straggler(windows: Sequence[Window], global_batch: int, ranks: int) -> dict[str, float] | None:
    """Cost of a step's dearest rank over the mean rank's; None when the windows hold no whole step."""
    costs = np.concatenate([w.costs for w in windows])
    costs = costs[: len(costs) // global_batch * global_batch].reshape(-1, global_batch)
    if not len(costs):
        return None
    shared = np.stack([costs[:, rank::ranks].sum(1) for rank in range(ranks)], axis=1)
    ratios = shared.max(1) / shared.mean(1)
    return {"mean": round(float(ratios.mean()), 4), "worst": round(float(ratios.max()), 4)}


def _tokens(window: Window, packs: Sequence[int]) -> int:
    return sum(int(window.draw.lengths[window.bins[i]].sum()) for i in packs if window.bins[i])


def _mix(plan: Plan, windows: Sequence[Window], scale: float) -> list[dict[str, Any]]:
    samples, tokens = Counter[int](), Counter[int]()
    for window in windows:
        members = [i for items in window.bins for i in items]
        owners, lengths = window.draw.owners[members], window.draw.lengths[members]
        for index in range(len(plan.sources)):
            mine = owners == index
            samples[index] += int(mine.sum())
            tokens[index] += int(lengths[mine].sum())
    return [
        {
            "name": source.name,
            "samples": len(source.lengths),
            "usable": plan.rows[index],
            "asked_share": round(float(plan.shares[index]), 5),
            "sample_share": round(samples[index] / samples.total(), 5),
            "token_share": round(tokens[index] / tokens.total(), 5),
            "mean_tokens": round(tokens[index] / max(1, samples[index]), 1),
            "epochs_in_run": round(samples[index] * scale / plan.rows[index], 3),
        }
        for index, source in enumerate(plan.sources)
    ]


def as_text(found: dict[str, Any]) -> str:
    """The forecast for a terminal."""
    ratio = found["straggler"]
    shared = (
        f"the slowest has {ratio['mean']:.3f} of the mean cost, at worst {ratio['worst']:.3f}" if ratio else "no step"
    )
    lines = [
        f"{found['packs']:,} packs of {found['seq_length']:,} tokens in {found['steps']:,} steps of "
        f"{found['global_batch']}: {found['passes']:g} passes over the data, {found['steps_per_pass']:,g} steps each",
        f"packing {found['packing']}: {found['fill']:.2%} full, {found['samples_per_pack']:g} samples a pack, "
        f"{found['window_packs']:,} packs a window",
        f"{found['ranks']} ranks: {shared}",
        f"left out: {found['too_long']:,} too long, {found['no_room']:,} without room; {found['shrunk']:,} of "
        f"{found['samples_seen']:,} with fewer tiles or frames",
        "",
        f"{'source':<24}{'samples':>12}{'asked':>8}{'samples':>9}{'tokens':>8}{'mean':>9}{'epochs':>9}",
    ]
    lines += [
        f"{s['name']:<24}{s['samples']:>12,}{s['asked_share']:>8.1%}{s['sample_share']:>9.1%}{s['token_share']:>8.1%}"
        f"{s['mean_tokens']:>9,.0f}{s['epochs_in_run']:>9.2f}"
        for s in found["sources"]
    ]
    rate = found["planned_samples_per_second"]
    return "\n".join([*lines, "", f"from {found['packs_seen']:,} packs, {rate:,} samples planned a second"])
