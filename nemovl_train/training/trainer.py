"""One stage, from a config to its last checkpoint. `Trainer.fit` is the train loop."""

from __future__ import annotations

import gc
import logging
import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from data_pipelines.loader import PackStream
from data_pipelines.schema import Pack
from nemovl_train.checkpoint import sealed
from nemovl_train.checkpoint.base import load_base, refuse_adapters
from nemovl_train.checkpoint.lineage import write_lineage
from nemovl_train.checkpoint.retention import Keep
from nemovl_train.checkpoint.saving import Saver
from nemovl_train.config.dump import config_hash, redact, to_plain
from nemovl_train.config.schema import RunConfig
from nemovl_train.evaluation.run import evaluate_stage, refuse_unreadable_sets
from nemovl_train.exceptions import CheckpointError, UserError
from nemovl_train.exit_codes import ExitCode
from nemovl_train.model.adapters import add_adapters
from nemovl_train.model.backend import DTYPES
from nemovl_train.model.vlm import build_model
from nemovl_train.parallel.agree import from_every_rank, on_first_rank
from nemovl_train.parallel.layout import Layout
from nemovl_train.plan.trainable import trainable_text
from nemovl_train.training import spikes
from nemovl_train.training.callbacks import Callback, MetricsFile, Profile, ProgressLine, trackers
from nemovl_train.training.control import Control
from nemovl_train.training.deadline import SAFETY, Deadline
from nemovl_train.training.dry_run import dry_run
from nemovl_train.training.ending import Ending, decisive_options
from nemovl_train.training.engine import open_engine
from nemovl_train.training.folder import StageFolder, resolve_checkpoint
from nemovl_train.training.handover import hand_over
from nemovl_train.training.kernel_choices import tune_once
from nemovl_train.training.lost_process import explained, shared_store
from nemovl_train.training.lr import learning_rate
from nemovl_train.training.micro_batches import StepDroppedError
from nemovl_train.training.peers import PeerWatch
from nemovl_train.training.replicas import check_replicas
from nemovl_train.training.signals import StopRequest
from nemovl_train.training.state import TrainState
from nemovl_train.training.step import Limits, StepResult, train_step
from nemovl_train.training.telemetry import StepNumbers, Telemetry
from nemovl_train.training.token_ids import refuse_other_ids
from nemovl_train.training.validation import Validation
from nemovl_train.training.watchdog import Watchdog

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
        RunFailedError: Another process ended, or weights that must be equal differ.
    """
    # Always set: a stage that ran before in this process must not decide how this one sums.
    torch.set_num_threads(config.trainer.threads or DEFAULT_THREADS)
    # Frees the stage before this one. What the imports left is then set aside: megatron-core collects at every save.
    gc.collect()
    gc.freeze()
    # From here on a signal is remembered: nothing is lost by a start that goes on until it can leave in good order.
    with StopRequest() as stop, explained():
        layout = Layout.create(config.parallel, config.model.language)
        with PeerWatch(layout.rank, layout.world_size, shared_store()):
            return _run(config, layout, stop)


def _run(config: RunConfig, layout: Layout, stop: StopRequest) -> ExitCode:
    folder = StageFolder.of(config)
    watchdog = Watchdog(folder.path / "stacks", layout.rank, config.trainer.stall_timeout_s)
    try:
        folder.claim()
        if on_first_rank(folder.is_done):
            log.info("%s: nothing left to do, %d steps are done", folder.path, config.trainer.steps)
            return ExitCode.OK
        return Trainer(config, folder, layout, stop, watchdog).fit()
    finally:
        watchdog.close()
        folder.release()
        layout.destroy()


class Trainer:
    """Model, engine, data and state of one stage.

    Args:
        config: A validated config.
        folder: The stage's folder, claimed.
        layout: Owner of the process groups.
        stop: Stop signals that this process gets.
        watchdog: Told about every step; none by default.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: StageFolder,
        layout: Layout,
        stop: StopRequest | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.config, self.folder, self.layout = config, folder, layout
        self.watchdog = watchdog or Watchdog(folder.path / "stacks", layout.rank, 0)
        dtype = DTYPES[config.precision.params]
        resumed_from = folder.newest_checkpoint()
        # Drawing billions of numbers on a CPU takes minutes. Where a checkpoint replaces them all, any will do.
        replaced = resumed_from is not None or config.trainer.init_from is not None
        self.model = build_model(
            config.model,
            layout,
            params_dtype=dtype,
            backend=config.precision.backend,
            seed=config.trainer.seed,
            recompute=config.recompute,
            precision=config.precision,
            draw_on=layout.device if replaced else "cpu",
        )
        adapter = to_plain(config)["adapter"] if config.adapter.rank else None
        self.state = TrainState(seed=config.trainer.seed, config_hash=config_hash(config), adapter=adapter)
        if resumed_from is None:
            self._load_initial_weights()
        elif config.adapter.rank:
            assert config.trainer.init_from is not None
            load_base(resumed_from.folder, self.model, Path(config.trainer.init_from))
        add_adapters(self.model, config.adapter, layout, seed=config.trainer.seed)
        self.model.freeze(train=config.trainer.train)
        # Before the engine, which may take the weights apart; and a minute or two that are no stall.
        self.watchdog.beat()
        tune_once(self.model, layout, config.data.seq_length)
        self.watchdog.beat()
        # Opened after the initial weights: it copies its fp32 master weights from them.
        self.engine = open_engine(self.model, layout, config)
        self.telemetry = Telemetry(config, layout)
        self.numbers: StepNumbers | None = None
        if resumed_from is not None:
            self._restore(resumed_from)
        self.stream = self._open_stream()
        on_first_rank(lambda: refuse_unreadable_sets(config))
        self.validation = Validation(config, folder, self.engine, layout, interrupted=self._interrupted)
        on_first_rank(lambda: self.validation.rewind(self.state.step))
        on_first_rank(lambda: log.info("what trains\n%s", trainable_text(config)))
        self.step_keys: tuple[str, ...] = ()
        self.callbacks: list[Callback] = []
        on_first_rank(self._add_callbacks)
        options = config.checkpoint
        keep = Keep(last=options.keep_last, every=options.keep_every, best=options.keep_best)
        self.saver = Saver(folder.checkpoints, folder.run_id, keep, in_background=options.in_background)
        self.saved_step = self.state.step if resumed_from is not None else -1
        self.control = Control(
            layout,
            folder.path,
            stop=stop or StopRequest(),
            saver=self.saver,
            deadline=Deadline(config.trainer.time_limit_s),
            watchdog=self.watchdog,
            published=self._published,
        )

    def fit(self) -> ExitCode:
        """Take the remaining steps, then evaluate.

        Returns:
            `ExitCode.OK`, or `ExitCode.REQUEUE` after a stop signal.
        """
        # Whatever fails, and even where closing one of them fails, the others are closed.
        with ExitStack() as closing:
            closing.callback(self.engine.close)
            closing.callback(self.stream.close)
            for callback in self.callbacks:
                closing.callback(callback.close)
            if self.config.trainer.dry_run:
                dry_run(self.engine, self._next_packs()[0][0], self.config, self.layout, self.folder.path)
                return ExitCode.REQUEUE if self.control.stopping() else ExitCode.OK
            self._call("on_start")
            self.validation.measure_if_due(self.state)
            while not self._has_ended():
                if not self._take_step():
                    return self._requeue()
                if self._save_is_due():
                    self.save()
            return self._finish()

    def _has_ended(self) -> bool:
        """All steps are taken, or the held-out loss says that more would not help."""
        return self.state.step >= self.config.trainer.steps or self.validation.exhausted(self.state)

    def save(self) -> None:
        """Begin a checkpoint of this step; the control publishes it later, and drops old ones. Collective."""
        self.engine.collect_weights()
        # A replica that went wrong since the last check must not become what the run continues from.
        self._check_replicas()
        self.control.finish_save()
        self.saver.start(self.state.step, model=self.engine.weights, optimizer=self.engine, state=self.state.to_json())
        self.saved_step = self.state.step
        if not self.config.checkpoint.in_background:
            self.control.finish_save()

    def _take_step(self) -> bool:
        """One step, or False when the ranks decided to stop before it changed anything."""
        began = time.monotonic()
        fetched = self.control.wait_for(self._next_packs)
        if fetched is None:
            return False
        packs, data_seconds = fetched
        if self.state.step == 0:
            self._dry_batch(packs)
        options, state = self.config.trainer, self.state
        lr = learning_rate(self.config.optim, state.step, options.steps)
        try:
            result = train_step(
                self.engine,
                packs,
                self.layout,
                lr=lr,
                divisor=self.config.optim.loss_divisor,
                limits=Limits(
                    spikes.limit(state.recent_losses, options.spike_sigma),
                    spikes.limit(state.recent_norms, options.spike_sigma),
                ),
                between=self.control.stopping,
                before_update=self._check_replicas_when_due,
                telemetry=self.telemetry,
            )
        except StepDroppedError:
            return False
        self._account(result, packs)
        self.numbers = self.telemetry.collect(packs, step=state.step, seconds=result.seconds, data_seconds=data_seconds)
        for callback in self.callbacks:
            callback.on_step(self, result, lr=lr, data_seconds=data_seconds)
        self._stop_if_too_many_bad_steps()
        self.watchdog.beat(stepped=True)
        self.validation.measure_if_due(self.state)
        deadline = self.control.deadline
        deadline.longest_step = max(deadline.longest_step, time.monotonic() - began)
        return True

    def _save_is_due(self) -> bool:
        """Collective: a person's wish is one for all ranks."""
        asked = self.control.ask().save
        if asked:
            self.control.clear_save_file()
        step = self.state.step
        return asked or step % self.config.checkpoint.every_steps == 0 or self._has_ended()

    def _published(self, folder: Path) -> None:
        self._call("on_checkpoint", folder)
        seconds, grace = self.saver.seconds, self.config.checkpoint.grace_s
        if self.layout.rank == 0 and seconds is not None and seconds * SAFETY > grace:
            log.warning(
                "%s took %.0f s to write: too long for the %.0f s between the scheduler's signal and the kill "
                "(checkpoint.grace_s); have the scheduler send its signal earlier",
                folder,
                seconds,
                grace,
            )

    def _check_replicas_when_due(self) -> None:
        every = self.config.trainer.check_replicas_every
        if every and self.state.step % every == 0:
            self._check_replicas()

    def _check_replicas(self) -> None:
        if self.config.trainer.check_replicas_every:
            check_replicas(self.model, self.layout)

    def _load_initial_weights(self) -> None:
        source = self.config.trainer.init_from
        if source is None:
            return
        found = resolve_checkpoint(Path(source))
        folder = found.folder if isinstance(found, sealed.Verified) else found
        on_first_rank(lambda: refuse_adapters(folder))
        try:
            sealed.load(found, model=self.model, nodes_at_once=self.config.checkpoint.nodes_at_once)
        except sealed.DamagedError as error:
            raise CheckpointError(
                f"{error}; remove {folder} and start what made it again: it continues from the checkpoint before"
            ) from error
        self.state.parent = str(folder.absolute())
        self.state.parent_seal = on_first_rank(lambda: sealed.seal_of(folder))
        on_first_rank(lambda: write_lineage(self.folder.path, folder))

    def _restore(self, found: sealed.Verified) -> None:
        folder = found.folder
        at_once = self.config.checkpoint.nodes_at_once
        raw = sealed.load(found, model=self.engine.weights, optimizer=self.engine, nodes_at_once=at_once)
        restored = TrainState.from_json(raw, folder / "state.json")
        if restored.seed != self.state.seed and not self.folder.recognised:
            raise CheckpointError(f"{folder}: seed differs from this run's; choose another run.stage")
        if restored.config_hash != self.state.config_hash and not self.folder.recognised:
            raise CheckpointError(f"{folder}: config_hash differs from this run's; choose another run.stage")
        if sealed.step_folder(self.folder.checkpoints, restored.step) != folder:
            raise CheckpointError(f"{folder} holds step {restored.step}: it was renamed; give it its name back")
        restored.seed, restored.config_hash = self.state.seed, self.state.config_hash
        restored.adapter = self.state.adapter
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
        self.engine.zero_grad()
        self.engine.forward_backward(packs[:1], [1.0])
        self.engine.zero_grad()

    def _account(self, result: StepResult, packs: list[Pack]) -> None:
        state = self.state
        state.step += 1
        state.packs_consumed = self.stream.packs_consumed
        state.tokens_seen += result.tokens
        state.tokens_supervised += result.supervised
        state.tokens_visual += result.visual
        if result.applied:
            spikes.remember(state.recent_losses, result.loss)
            spikes.remember(state.recent_norms, result.grad_norm)
        else:
            # Known to all ranks alike, so all of them come here and say what they had.
            keys = from_every_rank([key for pack in packs for key in pack.sample_keys])
            self.step_keys = tuple(dict.fromkeys(key for rank_keys in keys for key in rank_keys))
            state.bad_steps += 1
            log.warning("step %d changed nothing: loss %s, gradient norm %s", state.step, result.loss, result.grad_norm)

    def _stop_if_too_many_bad_steps(self) -> None:
        if self.state.bad_steps > self.config.trainer.max_bad_steps:
            raise UserError(
                f"{self.state.bad_steps} steps had a loss or gradient norm that is not finite or a spike "
                f"(trainer.max_bad_steps={self.config.trainer.max_bad_steps}); their samples are in "
                f"{self.folder.path}/events.jsonl"
            )

    def _requeue(self) -> ExitCode:
        """Save what is not saved, wait until it is on the disk, and say that there is more to do."""
        if self.state.step not in (0, self.saved_step):
            self.save()
        self.control.finish_save()
        log.warning("%s: stopped at step %d, run again to continue", self.folder.path, self.state.step)
        return ExitCode.REQUEUE

    def _finish(self) -> ExitCode:
        self.control.finish_save()
        if self.state.step < self.config.trainer.steps:
            best = f"held-out loss was best at step {self.state.best_step}"
            log.info("%s: ending at step %d, the %s", self.folder.path, self.state.step, best)
        if self.config.evaluation.sources:
            log.info("%s: evaluating %d held-out sets", self.folder.path, len(self.config.evaluation.sources))
        with self.engine.whole_model() as model:
            evaluated = evaluate_stage(
                model, self.config, self.layout, self.folder.path, self.state.step, interrupted=self._interrupted
            )
        if evaluated is None:
            return self._requeue()
        hand_over(self, evaluated)
        on_first_rank(self._note_end)
        self._call("on_end")
        log.info("%s: done after %d steps", self.folder.path, self.state.step)
        # Asked to stop too late to matter for this stage, but not for what would come after it.
        return ExitCode.REQUEUE if self.control.stopping() else ExitCode.OK

    def _note_end(self) -> None:
        state = self.state
        best = state.best_loss if math.isfinite(state.best_loss) else None
        Ending(state.step, decisive_options(self.config), state.best_step, best).write(self.folder.path)

    def _interrupted(self) -> bool:
        self.watchdog.beat()
        return self.control.stopping()

    def _add_callbacks(self) -> None:
        options = self.config.logging
        label = f"{self.config.run.name}/{self.config.run.stage}"
        self.callbacks.append(MetricsFile(self.folder.path))
        self.callbacks.append(ProgressLine(label, every_steps=options.every_steps, bar=options.progress))
        if options.tensorboard:
            self.callbacks.append(trackers.tensorboard(self.folder.path))
        if options.wandb:
            self.callbacks.append(trackers.wandb(self.folder.path, name=label, config=redact(to_plain(self.config))))
        if self.config.profile.steps:
            self.callbacks.append(Profile(self.folder.path, self.config.profile))

    def _call(self, hook: str, *args: object) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)
