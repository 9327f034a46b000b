"""The training loop: a page that reads from top to bottom.

restore or initialise -> compile -> [step, log, plan, evaluate, checkpoint] ... -> best params
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax
from flax import struct
from tqdm import tqdm

from genret_jax.configs import TrainConfig
from genret_jax.data.batches import Arrays
from genret_jax.errors import UserError
from genret_jax.modeling.model import Batch, Params
from genret_jax.training import partitioning, processes
from genret_jax.training.budget import Clock, Plan
from genret_jax.training.checkpoints import Checkpoints
from genret_jax.training.interruption import Interruption
from genret_jax.training.journal import Journal
from genret_jax.training.optimizers import learning_rate, make_optimizer, set_learning_rate
from genret_jax.training.profiling import (
    Measuring,
    Tracer,
    device_memory,
    global_shapes,
    tokens_of,
    training_flops,
)

log = logging.getLogger(__name__)
Evaluate = Callable[[Params], dict[str, float]]
_MEASURE_SECONDS = 5.0


class Trainable(Protocol):
    """A model as the trainer sees it; see `RetrievalModel` and `RankingModel`."""

    def init(self, rng: jax.Array) -> tuple[Params, Any]: ...

    def parameter_axes(self) -> Any: ...

    def loss_fn(
        self, params: Params, batch: Batch, dropout_rng: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...


class Numbered(Protocol):
    """Batches by number; see `Batches` and `ContrastiveBatches`."""

    def __getitem__(self, n: int) -> Arrays: ...

    def shapes(self) -> list[Arrays]: ...


@struct.dataclass
class TrainState:
    """What a step changes. Parameters are float32; `step` is int32."""

    params: Params
    opt_state: Any
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Attributes:
    params: the best on dev (the last ones of a run without dev queries), on the host.
    best_step: the step they are from.
    dev: their dev metrics.
    steps: steps trained.
    """

    params: Params
    best_step: int
    dev: dict[str, float]
    steps: int


def train(
    model: Trainable,
    batches: Numbered,
    *,
    config: TrainConfig,
    folder: Path,
    evaluate: Evaluate | None = None,
    compile_evaluation: Callable[[Params], object] | None = None,
    clock: Clock | None = None,
    mesh: jax.sharding.Mesh | None = None,
    start: Callable[[Params], Params] | None = None,
    refresh: Callable[[int, Params], None] | None = None,
    refresh_every: int = 0,
    measuring: Measuring | None = None,
) -> TrainResult:
    """Trains to the end of the schedule, or goes on where the run in `folder` stopped.

    Args:
      model: gives `loss_fn(params, batch, dropout_rng) -> (loss, metrics)`.
      batches: batch number n for any n.
      config: see TrainConfig.
      folder: of checkpoints and metrics.
      evaluate: parameters -> dev metrics, with `config.metric` among them; the same in every
        process. The parameters lie on the process's own devices.
      compile_evaluation: called once with the first parameters, so that no evaluation compiles
        while it is timed; by default a whole evaluation is made for that.
      clock: a time budget; by default the run has `config.steps`.
      mesh: all devices by default.
      start: fresh parameters -> those to begin with, on the host; the fresh ones by default. Not
        called where a checkpoint is there.
      refresh: called with the step and the parameters before every step that `refresh_every`
        divides, 0 left out; and with the last such step where a run goes on.
      measuring: what to measure besides the time of steps; see Measuring.

    Raises:
      Interrupted: after SIGTERM or Ctrl-C, once a checkpoint is written.
    """
    clock, measuring = clock or Clock(None), measuring or Measuring()
    mesh = mesh or partitioning.make_mesh(model_parallel=config.model_parallel)
    partitioning.check_rows(mesh, config.batch_size, "TrainConfig.batch_size")
    stepper = Stepper(model, config, mesh, count_flops=measuring.peak is not None)
    state = stepper.init(jax.random.key(config.seed))
    plan = Plan(total=0 if clock.seconds else config.steps)

    with (
        Checkpoints(folder / "checkpoints", every=config.checkpoint_every) as checkpoints,
        Interruption() as interruption,
    ):
        if _agreed(checkpoints.latest_step, folder) is not None:
            state, plan = _restore(checkpoints, state)
            clock.resume(plan.elapsed)
            if clock.seconds is None and plan.total == 0:  # stopped before its budget was planned
                plan.total = max(config.steps, plan.step + 1)
            log.info("going on from step %d of %d", plan.step, plan.total)
        elif start:
            fresh = partitioning.on_host(state.params)
            state = stepper.begin_with(state, processes.everywhere(lambda: start(fresh)))
        journal = Journal(folder, after_step=plan.step)
        if not plan.done:
            stepper.compile(state, batches)
        loop = _Loop(stepper, batches, config, clock, journal, checkpoints, evaluate)
        loop.measure(measuring.peak, Tracer(measuring.traces and measuring.traces / folder.name))
        if evaluate and not plan.done:
            # Compiles, so that the first timed evaluation does not.
            (compile_evaluation or evaluate)(partitioning.on_own_devices(state.params))
        if plan.step == 0:
            loop.evaluate(state, plan)
        if refresh and plan.step >= refresh_every and not plan.done:
            own = partitioning.on_own_devices(state.params)
            refresh(plan.step // refresh_every * refresh_every, own)
        with tqdm(initial=plan.step, unit="step", desc="training", disable=None) as bar:
            loop.begin_timing()  # of steps alone: compiling and the first evaluation are over
            while not plan.done:
                if refresh and plan.step and plan.step % refresh_every == 0:
                    loop.pause(refresh, plan.step, partitioning.on_own_devices(state.params))
                state = loop.once(state, plan, bar)
                if interruption.asked():
                    loop.save(state, plan, force=True)
                    journal.close()
                    interruption.stop(f"training stopped at step {plan.step}")
        loop.tracer.close()
        loop.save(state, plan, force=True)
        journal.close()
        if checkpoints.best_step is None:
            checkpoints.save_best(plan.step, state.params)
        params = partitioning.on_host(checkpoints.restore_best(state.params))
        found = checkpoints.best_step
        best_step = plan.step if found is None else found  # 0 is a step too
        return TrainResult(params, best_step, journal.dev_at(best_step), plan.step)


class Stepper:
    """The jitted step, with parameters and optimiser state sharded over a mesh."""

    def __init__(
        self,
        model: Trainable,
        config: TrainConfig,
        mesh: jax.sharding.Mesh,
        *,
        count_flops: bool = False,
    ):
        self._model, self._config, self.mesh = model, config, mesh
        self._count_flops = count_flops
        self._flops: dict[tuple[int, ...], float] = {}
        self.flops = 0.0  # model FLOPs of the steps so far, where they are counted
        self._optimizer = make_optimizer(
            config.optimizer,
            weight_decay=config.weight_decay,
            anchor=config.anchor,
            clip_norm=config.clip_norm,
        )
        self._compiled: dict[tuple[int, ...], Any] = {}

    def init(self, rng: jax.Array) -> TrainState:
        """Fresh parameters; made whole on every device's own share."""
        shapes = jax.eval_shape(lambda r: self._model.init(r)[0], rng)
        axes = self._model.parameter_axes()
        params_sharding = partitioning.parameter_shardings(self.mesh, shapes, axes)
        opt_sharding = partitioning.optimizer_shardings(
            self.mesh, self._optimizer, shapes, params_sharding
        )
        params = jax.jit(lambda r: self._model.init(r)[0], out_shardings=params_sharding)(rng)
        opt_state = jax.jit(self._optimizer.init, out_shardings=opt_sharding)(params)
        step = partitioning.put(np.int32(0), partitioning.replicated(self.mesh))
        return TrainState(params, opt_state, step)

    def begin_with(self, state: TrainState, params: Params) -> TrainState:
        """The state with other parameters, on the host, in the shardings of its own.

        Those of the first process count: the last bits of others' may differ.
        """
        shardings = jax.tree.map(lambda x: x.sharding, state.params)
        put = partitioning.put(processes.broadcast_arrays(params), shardings)
        shardings = jax.tree.map(lambda x: x.sharding, state.opt_state)
        opt_state = jax.jit(self._optimizer.init, out_shardings=shardings)(put)
        return dataclasses.replace(state, params=put, opt_state=opt_state)

    def compile(self, state: TrainState, batches: Numbered) -> None:
        """Compiles the step for every shape of batch, so that no step is slow later."""
        self._shardings = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(self._step, donate_argnums=0, out_shardings=(self._shardings, None))
        shapes = list(batches.shapes())
        log.info("compiling the training step, for %d shapes of batches", len(shapes))
        for batch in tqdm(shapes, desc="compiling", disable=None, leave=False):
            arrays = partitioning.global_batch(self.mesh, batch)
            key = arrays["encoder_input_tokens"].shape
            self._compiled[key] = step.lower(state, arrays, np.float32(0)).compile()
            if self._count_flops:
                whole = global_shapes(batch, self._config.batch_size)
                self._flops[key] = training_flops(self._model.loss_fn, state.params, whole)

    def __call__(
        self, state: TrainState, batch: dict[str, np.ndarray], rate: float
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        arrays = partitioning.global_batch(self.mesh, batch)
        key = arrays["encoder_input_tokens"].shape
        self.flops += self._flops.get(key, 0.0)
        return self._compiled[key](state, arrays, np.float32(rate))

    def _step(
        self, state: TrainState, batch: dict[str, jax.Array], rate: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(self._config.seed + 1), state.step)
        gradient = jax.value_and_grad(self._model.loss_fn, has_aux=True)
        (_, metrics), grads = gradient(state.params, batch, rng)
        # They lie as the parameters do anyway. Saying so keeps XLA for CPUs from cutting every
        # gradient into windows for its norm, which costs it some 2% of a step.
        grads = jax.lax.with_sharding_constraint(grads, self._shardings.params)
        opt_state = set_learning_rate(state.opt_state, rate)
        updates, opt_state = self._optimizer.update(grads, opt_state, state.params)
        metrics["tokens"] = tokens_of(batch)
        metrics["gradient_norm"] = optax.tree_utils.tree_norm(grads)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), metrics


class _Loop:
    """One turn of the loop, and what it remembers between turns."""

    def __init__(
        self,
        stepper: Stepper,
        batches: Numbered,
        config: TrainConfig,
        clock: Clock,
        journal: Journal,
        checkpoints: Checkpoints,
        evaluate: Evaluate | None,
    ):
        self._stepper, self._batches, self._config = stepper, batches, config
        self._clock, self._journal, self._checkpoints = clock, journal, checkpoints
        self._evaluate = evaluate
        self._pending: list[dict[str, jax.Array]] = []
        self._evaluation_seconds = 0.0
        self.measure(None, Tracer(None))
        self.begin_timing()

    def measure(self, peak: float | None, tracer: Tracer) -> None:
        """Sets what is measured besides time; peak: FLOP/s of a device."""
        self._peak, self.tracer = peak, tracer

    def once(self, state: TrainState, plan: Plan, bar: tqdm) -> TrainState:
        config, before = self._config, plan.progress
        rate = learning_rate(
            config.learning_rate,
            float(plan.progress),
            plan.step,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
        )
        if self.tracer.due:
            self.pause(self.tracer.turn, state)
        with self.tracer.step(plan.step):
            state, metrics = self._stepper(state, self._batches[plan.step], rate)
        plan.advance()
        bar.update()
        self._pending.append(metrics)
        # A run with a time budget has no plan before its first measurement: make that early.
        measured = plan.total == 0 and processes.broadcast(
            time.monotonic() - self._since > _MEASURE_SECONDS
        )
        if plan.step % config.log_every == 0 or plan.done or measured:
            self._log(plan, rate, bar)
        parts = config.evaluations
        # A little is added because progress is a rounded sum: a third of the way counts as one.
        if plan.done or int(before * parts + 1e-4) < int(plan.progress * parts + 1e-4):
            self.evaluate(state, plan)
        self.save(state, plan)
        return state

    def _log(self, plan: Plan, rate: float, bar: tqdm) -> None:
        """Averages what has gathered, writes it, and plans the rest by the time it took."""
        names = self._pending[0]
        means = {k: float(np.mean([float(m[k]) for m in self._pending])) for k in names}
        if not np.isfinite(means["loss"]):
            raise UserError(
                f"the loss is {means['loss']} near step {plan.step}; lower the learning rate "
                f"({self._config.learning_rate}) or use dtype float32, with a new --out"
            )
        seconds = (time.monotonic() - self._since) / len(self._pending)
        parts = self._config.evaluations
        evaluations = max(1, parts - int(plan.progress * parts + 1e-4))
        if not plan.done:
            self._clock.plan(
                plan, step_seconds=seconds, other_seconds=evaluations * self._evaluation_seconds
            )
            if self._clock.seconds:
                plan.total = processes.broadcast(plan.total)  # by the clock of the first process
        bar.total = plan.total or None
        bar.set_postfix(loss=f"{means['loss']:.3f}", refresh=False)
        speed = {
            "learning_rate": rate,
            "step_seconds": seconds,
            "examples_per_second": self._config.batch_size / seconds,
            "tokens_per_second": means.pop("tokens") / seconds,
            **device_memory(),
        }
        if self._peak:
            flops = self._stepper.flops / len(self._pending) / seconds
            speed["flop_utilisation"] = flops / (self._peak * self._stepper.mesh.size)
        self._journal.write("train", plan, {**means, **speed})
        self._pending.clear()
        self.begin_timing()

    def evaluate(self, state: TrainState, plan: Plan) -> None:
        """Dev metrics by real search; the best parameters so far are kept."""
        if self._evaluate is None:
            return
        begin = time.monotonic()
        dev = processes.broadcast(self._evaluate(partitioning.on_own_devices(state.params)))
        self._journal.write("dev", plan, dev)
        if dev[self._config.metric] > plan.best:
            plan.best = np.float32(dev[self._config.metric])
            self._checkpoints.save_best(plan.step, state.params)
            # Both series stand at one step: a run that crashes now does not go on before its best.
            self.save(state, plan, force=True)
        self._evaluation_seconds = time.monotonic() - begin
        log.info(
            "step %d of %s: %s",
            plan.step,
            plan.total or "?",
            ", ".join(f"dev {k} {v:.3f}" for k, v in dev.items()),
        )
        self._since += time.monotonic() - begin

    def begin_timing(self) -> None:
        self._since = time.monotonic()
        self._stepper.flops = 0.0

    def pause(self, work: Callable[..., None], *arguments: Any) -> None:
        """Does some other work, whose time is not the steps'."""
        begin = time.monotonic()
        work(*arguments)
        self._since += time.monotonic() - begin

    def save(self, state: TrainState, plan: Plan, *, force: bool = False) -> None:
        if force or self._checkpoints.should_save(plan.step):
            plan.elapsed = processes.broadcast(np.float32(self._clock.elapsed))
            self._checkpoints.save(plan.step, _saved(state, plan), force=force)


def _saved(state: TrainState, plan: Plan) -> dict[str, Any]:
    sharding = state.step.sharding
    counters = {
        "total": np.int32(plan.total),
        "progress": plan.progress,
        "elapsed": plan.elapsed,
        "best": plan.best,
    }
    return {
        "state": state,
        "plan": {k: partitioning.put(v, sharding) for k, v in counters.items()},
    }


def _agreed(step: int | None, folder: Path) -> int | None:
    """The step that training goes on from, which all processes must see alike."""
    steps = processes.gather(step)
    if len(set(steps)) > 1:
        raise UserError(
            f"{folder}: the processes see checkpoints of different steps {steps}; give an --out "
            "on a file system that all of them share"
        )
    return step


def _restore(checkpoints: Checkpoints, like: TrainState) -> tuple[TrainState, Plan]:
    restored = checkpoints.restore(_saved(like, Plan()))
    counters = {k: v.item() for k, v in restored["plan"].items()}
    state = restored["state"]
    plan = Plan(
        step=int(state.step),
        total=counters["total"],
        progress=np.float32(counters["progress"]),
        elapsed=np.float32(counters["elapsed"]),
        best=np.float32(counters["best"]),
    )
    return state, plan
