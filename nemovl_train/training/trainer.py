"""One stage, from a config to its last checkpoint. `Trainer.fit` is the train loop."""

from __future__ import annotations

import gc
import logging
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from data_pipelines.loader import PackStream
from data_pipelines.schema import Pack
from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import load_base, refuse_adapters
from nemovl_train.config.dump import config_hash, redact, to_plain
from nemovl_train.config.schema import RunConfig
from nemovl_train.evaluation.run import evaluate_stage, refuse_unreadable_sets
from nemovl_train.exceptions import CheckpointError, UserError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.model.adapters import TrainedWeights, add_adapters
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.agree import from_every_rank, on_first_rank
from nemovl_train.parallel.layout import Layout
from nemovl_train.plan.trainable import trainable_text
from nemovl_train.training.callbacks import Callback, MetricsFile, ProgressLine, trackers
from nemovl_train.training.folder import StageFolder, resolve_checkpoint
from nemovl_train.training.lr import learning_rate
from nemovl_train.training.optimizer import Optimizers
from nemovl_train.training.signals import StopRequest
from nemovl_train.training.state import TrainState
from nemovl_train.training.step import StepResult, forward_backward, train_step
from nemovl_train.training.token_ids import refuse_other_ids

log = logging.getLogger(__name__)

DEFAULT_THREADS = torch.get_num_threads()


def run(config: RunConfig) -> ExitCode:
    """Train one stage, or continue it where it stopped.

    Args:
        config: A validated config.

    Returns:
        `ExitCode.OK`, or `ExitCode.REQUEUE` when a signal asked to stop and everything is saved.

    Raises:
        UserError: The folder, the data, the parent's weights or the layout cannot be used; every rank raises it.
    """
    # Always set: a stage that ran before in this process must not decide how this one sums.
    torch.set_num_threads(config.trainer.threads or DEFAULT_THREADS)
    # Frees the stage before this one. What the imports left is then set aside: megatron-core collects at every save.
    gc.collect()
    gc.freeze()
    layout = Layout.create(config.parallel, config.model.language)
    folder = StageFolder.of(config)
    try:
        folder.claim()
        if on_first_rank(folder.is_done):
            log.info("%s: nothing left to do, %d steps are done", folder.path, config.trainer.steps)
            return ExitCode.OK
        return Trainer(config, folder, layout).fit()
    finally:
        folder.release()
        layout.destroy()


class Trainer:
    """Model, optimizers, data and state of one stage.

    Args:
        config: A validated config.
        folder: The stage's folder, claimed.
        layout: Owner of the process groups.
    """

    def __init__(self, config: RunConfig, folder: StageFolder, layout: Layout) -> None:
        self.config, self.folder, self.layout = config, folder, layout
        dtype = DTYPES[config.precision.params]
        self.model = build_model(
            config.model, layout, params_dtype=dtype, backend=config.precision.backend, seed=config.trainer.seed
        )
        self.state = TrainState(seed=config.trainer.seed, config_hash=config_hash(config))
        resumed_from = folder.newest_checkpoint()
        if resumed_from is None:
            self._load_initial_weights()
        elif config.adapter.rank:
            load_base(resumed_from, self.model)
        add_adapters(self.model, config.adapter, layout, seed=config.trainer.seed)
        self.model.freeze(train=config.trainer.train)
        # With adapters a checkpoint holds what trains, and names the one that holds the rest.
        self.saved = TrainedWeights(self.model) if config.adapter.rank else self.model
        # Built after the initial weights: the distributed optimizer copies its fp32 master weights from them.
        self.optimizers = Optimizers(self.model, layout, config.optim, dtype)
        self.model.config.no_sync_func = self.optimizers.no_sync
        self.model.config.finalize_model_grads_func = self.optimizers.reduce_gradients
        if resumed_from is not None:
            self._restore(resumed_from)
        self.stream = self._open_stream()
        on_first_rank(lambda: refuse_unreadable_sets(config))
        on_first_rank(lambda: log.info("what trains\n%s", trainable_text(config)))
        self.step_keys: tuple[str, ...] = ()
        self.callbacks: list[Callback] = []
        on_first_rank(self._add_callbacks)

    def fit(self) -> ExitCode:
        """Take the remaining steps, then evaluate.

        Returns:
            `ExitCode.OK`, or `ExitCode.REQUEUE` after a stop signal.
        """
        total, every = self.config.trainer.steps, self.config.checkpoint.every_steps
        # Whatever fails, and even where closing one of them fails, the others are closed.
        with ExitStack() as closing:
            closing.callback(self.stream.close)
            for callback in self.callbacks:
                closing.callback(callback.close)
            with StopRequest(self.layout) as stop:
                self._call("on_start")
                while self.state.step < total:
                    packs, data_seconds = self._next_packs()
                    if self.state.step == 0:
                        self._dry_batch(packs)
                    lr = learning_rate(self.config.optim, self.state.step, total)
                    result = train_step(
                        self.model, self.optimizers, packs, self.layout, lr=lr, divisor=self.config.optim.loss_divisor
                    )
                    self._account(result, packs)
                    for callback in self.callbacks:
                        callback.on_step(self, result, lr=lr, data_seconds=data_seconds)
                    self._stop_if_too_many_bad_steps()
                    stopping = stop.agreed()
                    if self.state.step % every == 0 or self.state.step == total or stopping:
                        self.save()
                    if stopping and self.state.step < total:
                        return self._requeue()
                return self._finish(stop)

    def save(self) -> None:
        """Publish a checkpoint of this step and drop the oldest ones. Collective."""
        self.optimizers.collect_weights()
        path = sealed.save(
            self.folder.checkpoints,
            self.state.step,
            model=self.saved,
            optimizer=self.optimizers,
            state=self.state.to_json(),
            run_id=self.folder.run_id,
        )
        sealed.retain(path, self.config.checkpoint.keep_last)
        self._call("on_checkpoint", path)

    def _load_initial_weights(self) -> None:
        source = self.config.trainer.init_from
        if source is None:
            return
        folder = on_first_rank(lambda: resolve_checkpoint(Path(source)))
        on_first_rank(lambda: refuse_adapters(folder))
        try:
            sealed.load(folder, model=self.model)
        except sealed.DamagedError as error:
            raise CheckpointError(
                f"{error}; remove {folder} and start what made it again: it continues from the checkpoint before"
            ) from error
        self.state.parent = str(folder)
        self.state.parent_seal = on_first_rank(lambda: sealed.seal(folder))

    def _restore(self, folder: Path) -> None:
        raw = sealed.load(folder, model=self.saved, optimizer=self.optimizers)
        restored = TrainState.from_json(raw, folder / "state.json")
        for name in ("seed", "config_hash"):
            if getattr(restored, name) != getattr(self.state, name):
                raise CheckpointError(f"{folder}: {name} differs from this run's; choose another run.stage")
        if sealed.step_folder(self.folder.checkpoints, restored.step) != folder:
            raise CheckpointError(f"{folder} holds step {restored.step}: it was renamed; give it its name back")
        self.state = restored
        log.info("%s: continuing after step %d from %s", self.folder.path, restored.step, folder.name)

    def _open_stream(self) -> PackStream:
        refuse_other_ids(self.config.model, self.config.data.tokenizer)
        stream = PackStream(
            self.config.data,
            tokens_per_tile=self.config.model.tokens_per_tile,
            seed=self.config.trainer.seed,
            global_batch=self.config.trainer.global_batch,
            dp_rank=self.layout.dp_rank,
            dp_size=self.layout.dp,
            start_pack=self.state.packs_consumed,
        )
        if self.state.plan_hash and self.state.plan_hash != stream.plan_hash:
            raise CheckpointError(
                f"{self.folder.path}: the data plan changed since the run was saved (datasets, blend, packing or "
                "tokenizer); restore the data, or start another run.name"
            )
        self.state.plan_hash = stream.plan_hash
        return stream

    def _next_packs(self) -> tuple[list[Pack], float]:
        began = time.perf_counter()
        packs = next(self.stream)
        return packs, time.perf_counter() - began

    def _dry_batch(self, packs: list[Pack]) -> None:
        """Forward and backward at full length before the first step: memory and shapes fail here, within seconds."""
        self.optimizers.zero_grad()
        forward_backward(self.model, packs[:1], [1.0], self.layout)
        self.optimizers.zero_grad()

    def _account(self, result: StepResult, packs: list[Pack]) -> None:
        state = self.state
        state.step += 1
        state.packs_consumed = self.stream.packs_consumed
        state.tokens_seen += result.tokens
        state.tokens_supervised += result.supervised
        state.tokens_visual += result.visual
        if not result.applied:
            # Known to all ranks alike, so all of them come here and say what they had.
            keys = from_every_rank([key for pack in packs for key in pack.sample_keys])
            self.step_keys = tuple(dict.fromkeys(key for rank_keys in keys for key in rank_keys))
            state.bad_steps += 1
            log.warning("step %d changed nothing: loss %s, gradient norm %s", state.step, result.loss, result.grad_norm)

    def _stop_if_too_many_bad_steps(self) -> None:
        if self.state.bad_steps > self.config.trainer.max_bad_steps:
            raise UserError(
                f"{self.state.bad_steps} steps had a loss or gradient norm that is not finite (trainer.max_bad_steps="
                f"{self.config.trainer.max_bad_steps}); their samples are in {self.folder.path}/events.jsonl"
            )

    def _requeue(self) -> ExitCode:
        log.warning("%s: saved at step %d, run again to continue", self.folder.path, self.state.step)
        return ExitCode.REQUEUE

    def _finish(self, stop: StopRequest) -> ExitCode:
        if self.config.evaluation.sources:
            log.info("%s: evaluating %d held-out sets", self.folder.path, len(self.config.evaluation.sources))
        self.optimizers.collect_weights()
        evaluated = evaluate_stage(
            self.model, self.config, self.layout, self.folder.path, self.state.step, interrupted=stop.agreed
        )
        if evaluated is None:
            return self._requeue()
        self._call("on_end")
        log.info("%s: done after %d steps", self.folder.path, self.state.step)
        # Asked to stop too late to matter for this stage, but not for what would come after it.
        return ExitCode.REQUEUE if stop.agreed() else ExitCode.OK

    def _add_callbacks(self) -> None:
        options = self.config.logging
        label = f"{self.config.run.name}/{self.config.run.stage}"
        self.callbacks.append(MetricsFile(self.folder.path))
        self.callbacks.append(ProgressLine(label, every_steps=options.every_steps, bar=options.progress))
        if options.tensorboard:
            self.callbacks.append(trackers.tensorboard(self.folder.path))
        if options.wandb:
            self.callbacks.append(trackers.wandb(self.folder.path, name=label, config=redact(to_plain(self.config))))

    def _call(self, hook: str, *args: object) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)
