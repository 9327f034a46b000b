"""Weights of fewer bytes: what rounding may change, and what stays as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genret_jax.precision import QuantisedMatrix, reduced, restored


def _params():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 80)).astype(np.float32)
    kernel[:, 3] *= 100.0  # one output that is larger than the others
    kernel[:, 4] = 0.0
    embedding = rng.normal(size=(80, 64)).astype(np.float32)
    embedding[3] *= 100.0
    return {
        "layer": {"kernel": jnp.asarray(kernel)},
        "layers": {"kernel": jnp.asarray(np.stack([kernel, kernel[::-1] * 3]))},
        "embedder": {"embedding": jnp.asarray(embedding)},
        "norm": {"scale": jnp.ones(64)},
        "bias": {"rel_embedding": jnp.asarray(rng.normal(size=(6, 32)).astype(np.float32))},
    }


def test_int8_rounds_every_output_by_its_own_scale():
    params = _params()
    small = reduced(params, "int8")
    found = restored(small)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for name, axis in (("layer", -2), ("layers", -2), ("embedder", -1)):
        (was,), (now,) = jax.tree.leaves(params[name]), jax.tree.leaves(found[name])
        bound = np.abs(was).max(axis=axis, keepdims=True) / 254 * 1.0001
        assert (np.abs(now - was) <= bound).all() and (now != was).any()
        (matrix,) = jax.tree.leaves(small[name], is_leaf=lambda x: isinstance(x, QuantisedMatrix))
        assert matrix.values.dtype == jnp.int8 and int(jnp.abs(matrix.values).max()) == 127
    assert (found["layer"]["kernel"][:, 4] == 0).all()
    for name in ("norm", "bias"):
        assert jax.tree.leaves(small[name])[0] is jax.tree.leaves(params[name])[0]


def test_bytes_of_each_precision():
    big = {"a": {"kernel": jnp.ones((1024, 512))}}
    sizes = {
        name: sum(x.nbytes for x in jax.tree.leaves(reduced(big, name)))
        for name in ("float32", "bfloat16", "int8")
    }
    assert sizes == {"float32": 2**21, "bfloat16": 2**20, "int8": 2**19 + 512 * 4}


def test_bfloat16_and_float32():
    params = _params()
    small = reduced(params, "bfloat16")
    assert small["layer"]["kernel"].dtype == jnp.bfloat16
    assert small["norm"]["scale"].dtype == small["bias"]["rel_embedding"].dtype == jnp.float32
    assert restored(small)["layer"]["kernel"] is small["layer"]["kernel"]
    assert reduced(params, "float32")["layer"]["kernel"] is params["layer"]["kernel"]
    with pytest.raises(ValueError, match="must be one of .* found 'int4'"):
        reduced(params, "int4")
