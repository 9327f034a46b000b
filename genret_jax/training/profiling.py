"""How fast a run is, beyond the time of a step: FLOP utilisation, device memory, traces.

Model FLOPs are those of the matrix products of the loss, forward and backward: 2mnk for each of the
forward pass, and twice that again for its gradients (Chowdhery et al. 2022, "PaLM", appendix B).
What rematerialisation computes again does not count.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

log = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of its kind; makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}
_WARM_UP = 3  # steps of a session before its trace
_TRACED = 5
# Read or written by the network; decoder_input_tokens are the targets again.
_TOKENS = (
    "encoder_input_tokens",
    "decoder_target_tokens",
    "document_tokens",
    "negative_document_tokens",
    "ranked_tokens",
    "ranked_paths",
)


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What the user wants to know.

    Attributes:
      traces: folder for traces of a few steps of every stage; None for none.
      peak_flops: FLOP/s of one device; None where its kind decides. Where that is unknown, no
        utilisation is reported.
    """

    traces: Path | None = None
    peak_flops: float | None = None

    @property
    def peak(self) -> float | None:
        return self.peak_flops or peak_of(jax.devices()[0].device_kind)


def peak_of(kind: str) -> float | None:
    """Peak FLOP/s of a kind of device; the longest name that it begins with counts."""
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def tokens_of(batch: dict[str, Any]) -> Any:
    """Tokens of a batch without padding, under jit the global one: int32[]."""
    return sum((batch[name] > 0).sum() for name in _TOKENS if name in batch)


def training_flops(loss: Callable[..., Any], *arguments: Any) -> float:
    """Model FLOPs of a training step.

    Args:
      loss: its forward pass.
      *arguments: of the loss: arrays or their shapes, of the global batch.
    """
    return 3.0 * product_flops(jax.make_jaxpr(loss)(*arguments).jaxpr)


def product_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of the matrix products in a program, loops of known length counted in full.

    The body of a loop of unknown length counts once, and of branches the most expensive one.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
            continue
        inner = [product_flops(x) for p in equation.params.values() for x in _programs(p)]
        if equation.primitive.name == "cond":
            total += max(inner, default=0.0)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        else:
            # custom_vjp and the like hold the forward program once; rules are functions.
            total += sum(inner)
    return total


def _product(equation: Any) -> float:
    (left, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[d] for d in left)


def _programs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    return [x for v in value for x in _programs(v)] if isinstance(value, tuple | list) else []


def device_memory() -> dict[str, float]:
    """Bytes in use on this process's fullest device, now and at most; empty where unknown."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"device_bytes": "bytes_in_use", "device_bytes_peak": "peak_bytes_in_use"}
    return {
        ours: float(max(stats[theirs] for stats in found))
        for ours, theirs in names.items()
        if found and all(theirs in stats for stats in found)
    }


class Tracer:
    """Traces a few steps of a session once it has warmed up, for xprof; every process its own.

    Args:
      folder: xprof's log folder; None traces nothing.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._steps = 0
        self._running = False

    @property
    def due(self) -> bool:
        """Whether `turn` has something to do."""
        last = self._running and self._steps >= _WARM_UP + _TRACED
        return self._folder is not None and (self._steps == _WARM_UP or last)

    def turn(self, state: Any) -> None:
        """Begins or ends the trace, between two steps, when what was asked for is computed."""
        jax.block_until_ready(state)
        if self._running:
            self.close()
        else:
            assert self._folder is not None
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def step(self, number: int) -> Any:
        """A context in which a step runs; xprof groups what it sees by these."""
        self._steps += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            log.info("trace of %d steps: xprof --logdir %s", self._steps - _WARM_UP, self._folder)
            self._running = False
        elif self._folder is not None and self._steps <= _WARM_UP:
            log.warning("%d steps are too few for a trace", self._steps)
        self._folder = None


def global_shapes(batch: dict[str, np.ndarray], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch of so many examples, from one process's share of it."""
    times = rows // len(batch["encoder_input_tokens"])
    return {
        k: jax.ShapeDtypeStruct((len(v) * times, *v.shape[1:]), v.dtype) for k, v in batch.items()
    }
