"""The native runner's optimiser and learning rate, as T5X takes them: for gin files.

T5X's own Adafactor (`@adafactor.Adafactor()`) is as good a choice; this one gives both runners the
same updates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from t5x import optimizers

from genret_jax.configs import TrainConfig
from genret_jax.errors import UserError
from genret_jax.recipe import configured
from genret_jax.training.optimizers import learning_rate, optimizer_at


def docid_schedule() -> Callable[[jax.Array], jax.Array]:
    """Stage 1: step -> learning rate."""
    return _schedule(configured().train)


def ranking_schedule() -> Callable[[jax.Array], jax.Array]:
    """Stage 2 likewise."""
    recipe = configured()
    return _schedule(recipe.contrastive.train_config(recipe.train))


def optimizer_def(schedule: Callable[[jax.Array], jax.Array]) -> Any:
    """TrainConfig's optimiser with a schedule.

    Raises:
      UserError: the recipe asks for what T5X cannot shard.
    """
    config = configured().train
    if config.anchor:
        raise UserError(
            f"TrainConfig.anchor is {config.anchor}, but T5X has no sharding rule for the "
            "parameters of the start; give 0, or train with `genret fit`"
        )
    return optimizers.OptaxWrapper(
        optimizer_at(
            config.optimizer,
            schedule,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
        )
    )


def _schedule(config: TrainConfig) -> Callable[[jax.Array], jax.Array]:
    def rate(step: jax.Array) -> jax.Array:
        return learning_rate(
            config.learning_rate,
            step / config.steps,
            step,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            xp=jnp,
        )

    return rate
