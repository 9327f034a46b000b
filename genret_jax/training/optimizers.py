"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genret_jax.errors import UserError
from genret_jax.modeling.stacking import is_in_stack, layer_rank

OPTIMIZERS = ("adamw", "adafactor")
Rate = float | jax.Array | Callable[[jax.Array], jax.Array]
SCHEDULES = ("cosine", "linear", "constant")


def make_optimizer(
    name: str, *, weight_decay: float = 0.0, anchor: float = 0.0, clip_norm: float = 1.0
) -> optax.GradientTransformationExtraArgs:
    """An optax optimiser whose learning rate is a number in its state.

    The trainer sets it before every step (`set_learning_rate`), because a run with a time budget
    learns the length of its schedule only once it runs.

    Args:
      name: "adamw", or "adafactor" with updates relative to each parameter's size (Shazeer and
        Stern 2018), which is what T5 was trained with.
      weight_decay: AdamW's; matrices only.
      anchor: the same, but toward the parameters of the start instead of toward 0: for a start
        that knows something which few examples would wash out ("L2-SP", Li et al. 2018).
      clip_norm: of the gradient, over all parameters; 0 for none.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer {name!r} is not known; choose one of {', '.join(OPTIMIZERS)}")

    def make(learning_rate: float) -> optax.GradientTransformation:
        optimizer = optimizer_at(
            name, learning_rate, weight_decay=weight_decay, clip_norm=clip_norm
        )
        if not anchor:
            return optimizer
        return optax.chain(optimizer, pull_to_start(learning_rate * anchor))  # it is no gradient

    return optax.inject_hyperparams(make)(learning_rate=0.0)


def optimizer_at(
    name: str, learning_rate: Rate, *, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """`make_optimizer` with a fixed learning rate or a schedule, and no anchor."""
    if name == "adamw":
        optimizer = optax.adamw(
            learning_rate,
            b2=0.98,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(_is_matrix, params),
        )
    else:
        optimizer = _adafactor(learning_rate)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def _is_matrix(path: Any, param: jax.Array) -> bool:
    """Whether a parameter is a matrix of one layer: norm scales of stacked layers are not."""
    return layer_rank(path, param) > 1


def _adafactor(learning_rate: Rate) -> optax.GradientTransformation:
    """`optax.adafactor`, whose sizes are those of one layer where layers are stacked.

    The state is that of optax, too. Moments are factored over the two longest axes, which a stack
    of fewer than 128 layers, from where on optax factors, is not among.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8),
        _layer_by_layer(optax.clip_by_block_rms(1.0)),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        _layer_by_layer(optax.scale_by_param_block_rms()),
        optax.scale(-1),
    )


def _layer_by_layer(stateless: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation of each parameter by itself, to which a stack is several parameters."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        def one(update: jax.Array, param: jax.Array) -> jax.Array:
            return stateless.update(update, state, param)[0]

        def whole(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
            return (jax.vmap(one) if is_in_stack(path) else one)(update, param)

        return jax.tree_util.tree_map_with_path(whole, updates, params), state

    return optax.GradientTransformation(stateless.init, update)


class Start(NamedTuple):
    """The parameters that training began with."""

    params: optax.Params


def pull_to_start(rate: float | jax.Array) -> optax.GradientTransformation:
    """Adds rate * (start - parameters) to the updates, after the learning rate; matrices only.

    Args:
      rate: share of the way back that a step goes.
    """

    def init(params: optax.Params) -> Start:
        return Start(jax.tree.map(jnp.copy, params))

    def update(
        updates: optax.Updates, state: Start, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Start]:
        def pulled(path: Any, update: jax.Array, param: jax.Array, start: jax.Array) -> jax.Array:
            return update + rate * (start - param) if _is_matrix(path, param) else update

        return jax.tree_util.tree_map_with_path(pulled, updates, params, state.params), state

    return optax.GradientTransformation(init, update)


def set_learning_rate(state: optax.OptState, rate: jax.Array) -> optax.OptState:
    """The optimiser's state with another learning rate."""
    return state._replace(hyperparams={**state.hyperparams, "learning_rate": rate})


def learning_rate(
    peak: float,
    progress: Any,
    step: Any,
    *,
    schedule: str,
    warmup_steps: int,
    xp: Any = np,
) -> Any:
    """peak * warm-up * decay, where warm-up counts steps and decay follows progress.

    Args:
      peak: the highest rate.
      progress: share of the training behind us, in [0, 1].
      step: steps behind us.
      schedule: "cosine" (to 0), "linear" (to 0) or "constant".
      warmup_steps: steps in which the rate rises linearly.
      xp: numpy, or jax.numpy where progress and step are traced.

    Example:
      >>> round(float(learning_rate(1.0, 0.5, 1000, schedule="cosine", warmup_steps=10)), 3)
      0.5
    """
    warm = xp.minimum(1.0, (step + 1) / max(1, warmup_steps))
    if schedule == "cosine":
        decay = 0.5 * (1 + xp.cos(np.pi * xp.minimum(1.0, progress)))
    elif schedule == "linear":
        decay = xp.maximum(0.0, 1 - progress)
    elif schedule == "constant":
        decay = 1.0
    else:
        raise UserError(f"schedule {schedule!r} is not known; choose one of {', '.join(SCHEDULES)}")
    return peak * warm * decay
