"""The network against T5 written out in loops, against itself step by step, and T5X's names."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from genret_jax.modeling.layers import T5Config, relative_buckets
from genret_jax.modeling.network import T5, empty_cache

CONFIG = T5Config(
    vocab_size=48,
    embed_dim=16,
    num_heads=3,
    head_dim=4,  # 3 * 4 is not 16: the joined axis has a size of its own
    mlp_dim=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relative_buckets=8,
    relative_max_distance=10,
)
TIED = dataclasses.replace(CONFIG, tied_embeddings=True)
FIRST = dataclasses.replace(TIED, feed_forward="relu")  # T5 1.0
BATCH, LENGTH, DOCID, BEAM = 2, 12, 4, 3


def init(config: T5Config):
    """Variables with every parameter, the output matrix included."""
    tokens = jnp.ones((1, 2), jnp.int32)
    network = T5(config)

    def everything(module, a, b):
        return module.logits(module(a, b))

    return network.init(jax.random.key(0), tokens, tokens, method=everything)


@functools.cache
def params_of(config: T5Config = CONFIG):
    """Random parameters of the right shapes, which spares the compilation of the initialisers."""
    shapes = jax.eval_shape(lambda: init(config)["params"])
    rng = np.random.default_rng(3)

    def make(path, leaf):
        if path[-1].key == "scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        scale = 1.0 if "embed" in path[-1].key else leaf.shape[0] ** -0.5
        return rng.normal(scale=scale, size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(make, shapes)


@functools.partial(jax.jit, static_argnames=("config", "method"))
def apply(params, *args, config=CONFIG, method=None):
    return T5(config).apply({"params": params}, *args, method=method)


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Encoder tokens, the second row with padding, and decoder tokens for every beam."""
    rng = np.random.default_rng(1)
    encoder = rng.integers(1, 48, (BATCH, LENGTH)).astype(np.int32)
    encoder[1, 7:] = 0
    decoder = rng.integers(1, 48, (BATCH, BEAM, DOCID)).astype(np.int32)
    decoder[:, :, 0] = 0
    return encoder, decoder


# --- relative positions ------------------------------------------------------------------------


def slow_bucket(relative: int, bidirectional: bool, buckets: int, most: int) -> int:
    """In whole numbers: behind / exact >= (most / exact)^(k / far) starts the k-th far bucket."""
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if relative > 0 else 0
        behind = abs(relative)
    else:
        behind = max(0, -relative)
    exact = buckets // 2
    if behind < exact:
        return first + behind
    far = buckets - exact
    k = 0
    while k + 1 < far and behind**far * exact ** (k + 1) >= most ** (k + 1) * exact**far:
        k += 1
    return first + exact + k


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 10), (16, 64), (64, 500)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_against_whole_numbers(buckets, most, bidirectional):
    positions = np.arange(-700, 701)
    ours = relative_buckets(
        positions, bidirectional=bidirectional, num_buckets=buckets, max_distance=most
    )
    assert ours.dtype == jnp.int32
    expected = [slow_bucket(int(p), bidirectional, buckets, most) for p in positions]
    assert ours.tolist() == expected
    assert set(expected) <= set(range(buckets))


def test_relative_buckets_by_hand():
    """32 buckets up to 128. Both ways the far ones begin at 8 * 2^(k/2), else at 16 * 2^(3k/16)."""
    both = functools.partial(relative_buckets, num_buckets=32, max_distance=128, bidirectional=True)
    behind = [0, -1, -7, -8, -11, -12, -15, -16, -22, -23, -32, -64, -90, -91, -127, -128, -(10**6)]
    expected = [0, 1, 7, 8, 8, 9, 9, 10, 10, 11, 12, 14, 14, 15, 15, 15, 15]
    assert both(np.array(behind)).tolist() == expected
    ahead = [-p for p in behind[1:]]
    assert both(np.array(ahead)).tolist() == [16 + e for e in expected[1:]]
    one = functools.partial(relative_buckets, num_buckets=32, max_distance=128, bidirectional=False)
    assert one(np.array([5, 1, 0, -1, -15, -16, -18, -19, -127, -128, -999])).tolist() == [
        *(0, 0, 0, 1, 15, 16, 16, 17, 31, 31, 31),
    ]


# --- T5X's parameter tree ----------------------------------------------------------------------


def t5x_tree(config: T5Config) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Name -> shape and logical axes, as T5X's examples/t5/network.py makes them.

    Its MLP calls the first matrices wi_0, wi_1 where there are several activations, else wi.
    """
    norm = ((16,), ("embed",))
    into, out = ((16, 12), ("embed", "joined_kv")), ((12, 16), ("joined_kv", "embed"))
    tree = {
        "token_embedder/embedding": ((48, 16), ("vocab", "embed")),
        "encoder/relpos_bias/rel_embedding": ((3, 8), ("heads", "relpos_buckets")),
        "decoder/relpos_bias/rel_embedding": ((3, 8), ("heads", "relpos_buckets")),
        "encoder/encoder_norm/scale": norm,
        "decoder/decoder_norm/scale": norm,
    }
    if not config.tied_embeddings:
        tree["decoder/logits_dense/kernel"] = ((16, 48), ("embed", "vocab"))
    attentions = {
        "encoder": {"pre_attention_layer_norm": "attention"},
        "decoder": {
            "pre_self_attention_layer_norm": "self_attention",
            "pre_cross_attention_layer_norm": "encoder_decoder_attention",
        },
    }
    for side, blocks in attentions.items():
        for layer in (f"{side}/layers_0", f"{side}/layers_1"):
            for layer_norm, attention in blocks.items():
                tree[f"{layer}/{layer_norm}/scale"] = norm
                for name in ("query", "key", "value"):
                    tree[f"{layer}/{attention}/{name}/kernel"] = into
                tree[f"{layer}/{attention}/out/kernel"] = out
            tree[f"{layer}/pre_mlp_layer_norm/scale"] = norm
            for name in ("wi",) if config.feed_forward == "relu" else ("wi_0", "wi_1"):
                tree[f"{layer}/mlp/{name}/kernel"] = ((16, 24), ("embed", "mlp"))
            tree[f"{layer}/mlp/wo/kernel"] = ((24, 16), ("mlp", "embed"))
    return tree


@pytest.mark.parametrize(
    "config",
    [CONFIG, TIED, FIRST, dataclasses.replace(CONFIG, remat=True)],
    ids=["untied", "tied", "1.0", "remat"],
)
def test_names_shapes_and_axes_are_t5xs(config):
    variables = jax.eval_shape(lambda: init(config))
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    axes = traverse_util.flatten_dict(variables["params_axes"], sep="/")
    assert all(value.dtype == jnp.float32 for value in flat.values())
    assert {name: value.shape for name, value in flat.items()} == {
        name: shape for name, (shape, _) in t5x_tree(config).items()
    }
    assert {name: tuple(value.names) for name, value in axes.items()} == {
        f"{name}_axes": names for name, (_, names) in t5x_tree(config).items()
    }


def test_initial_sizes_are_t5s():
    """No 1/sqrt(kv) in attention: the query's kernel is that much smaller."""
    config = dataclasses.replace(
        CONFIG,
        vocab_size=512,
        embed_dim=128,
        num_heads=8,
        head_dim=16,
        num_encoder_layers=1,
        num_decoder_layers=0,
    )
    params = jax.jit(lambda: init(config)["params"])()
    attention = params["encoder"]["layers_0"]["attention"]
    expected = {"query": (128 * 16) ** -0.5, "key": 128**-0.5, "value": 128**-0.5, "out": 128**-0.5}
    for name, deviation in expected.items():
        assert float(attention[name]["kernel"].std()) == pytest.approx(deviation, rel=0.05)
    assert float(params["token_embedder"]["embedding"].std()) == pytest.approx(1.0, rel=0.05)
    assert (params["decoder"]["decoder_norm"]["scale"] == 1).all()


# --- T5, written out ---------------------------------------------------------------------------


def rms_norm(p, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(p, x, source, bias=None, causal=False):
    """x [queries, embed], source [keys, embed]; one head and one query after the other."""
    q, k, v = (y @ p[n]["kernel"] for n, y in (("query", x), ("key", source), ("value", source)))
    out = np.zeros((len(x), q.shape[1]))
    for h in range(CONFIG.num_heads):
        part = slice(h * CONFIG.head_dim, (h + 1) * CONFIG.head_dim)
        for i in range(len(x)):
            seen = i + 1 if causal else len(source)
            logits = k[:seen, part] @ q[i, part]
            if bias is not None:
                logits = logits + np.array([bias(h, j - i) for j in range(seen)])
            weights = np.exp(logits - logits.max())
            out[i, part] = weights / weights.sum() @ v[:seen, part]
    return out @ p["out"]["kernel"]


def mlp(p, x):
    hidden = gelu(x @ p["wi_0"]["kernel"]) * (x @ p["wi_1"]["kernel"])
    return hidden @ p["wo"]["kernel"]


def bias_of(p, bidirectional):
    table = p["relpos_bias"]["rel_embedding"]
    c = CONFIG

    def bias(head, relative):
        b = slow_bucket(relative, bidirectional, c.relative_buckets, c.relative_max_distance)
        return table[head, b]

    return bias


def encode_in_loops(params, tokens):
    """One query without its padding: int [length] -> [length, embed]."""
    x, p = params["token_embedder"]["embedding"][tokens], params["encoder"]
    bias = bias_of(p, bidirectional=True)
    for n in range(CONFIG.num_encoder_layers):
        layer = p[f"layers_{n}"]
        y = rms_norm(layer["pre_attention_layer_norm"], x)
        x = x + attention(layer["attention"], y, y, bias)
        x = x + mlp(layer["mlp"], rms_norm(layer["pre_mlp_layer_norm"], x))
    return rms_norm(p["encoder_norm"], x)


def decode_in_loops(params, encoded, tokens):
    x, p = params["token_embedder"]["embedding"][tokens], params["decoder"]
    bias = bias_of(p, bidirectional=False)
    for n in range(CONFIG.num_decoder_layers):
        layer = p[f"layers_{n}"]
        y = rms_norm(layer["pre_self_attention_layer_norm"], x)
        x = x + attention(layer["self_attention"], y, y, bias, causal=True)
        y = rms_norm(layer["pre_cross_attention_layer_norm"], x)
        x = x + attention(layer["encoder_decoder_attention"], y, encoded)
        x = x + mlp(layer["mlp"], rms_norm(layer["pre_mlp_layer_norm"], x))
    return rms_norm(p["decoder_norm"], x)


@pytest.fixture(scope="module")
def expected():
    """Encoder states without padding, and decoder states [batch, beam, docid length, embed]."""
    encoder, decoder = inputs()
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of())
    encoded = [encode_in_loops(params, row[row > 0]) for row in encoder]
    states = [
        [decode_in_loops(params, e, beam) for beam in row]
        for e, row in zip(encoded, decoder, strict=True)
    ]
    return encoded, np.array(states)


def test_the_encoder_against_loops(expected):
    """The loops never see padding, so this also says that padding changes nothing."""
    encoder, _ = inputs()
    ours = apply(params_of(), encoder, method=T5.encode)
    for row, tokens, states in zip(ours, encoder, expected[0], strict=True):
        np.testing.assert_allclose(row[tokens > 0], states, atol=2e-5)


def test_the_decoder_against_loops(expected):
    encoder, decoder = inputs()
    for beam in range(BEAM):
        ours = apply(params_of(), encoder, decoder[:, beam])
        np.testing.assert_allclose(ours, expected[1][:, beam], atol=2e-5)


def test_step_by_step_with_beams_against_loops(expected):
    """Every beam of a query shares its cross cache and has a self cache of its own."""
    encoder, decoder = inputs()
    cross = apply(params_of(), encoder, method=T5.start)
    assert {a.shape for a in jax.tree.leaves(cross.cross_kv)} == {(BATCH, LENGTH, 3, 4)}
    cache = empty_cache(CONFIG, BATCH, BEAM, DOCID + 2)  # longer than what is decoded
    for position in range(DOCID):
        states, cache = apply(
            params_of(), decoder[:, :, position], jnp.int32(position), cache, cross, method=T5.step
        )
        np.testing.assert_allclose(states, expected[1][:, :, position], atol=2e-5)
    written = np.asarray(cache.self_kv[1][0])
    assert written[:, :, :DOCID].all() and not written[:, :, DOCID:].any()


def test_an_ancestry_reads_what_copies_would_hold():
    """Hypotheses part and end at random; both caches against each hypothesis decoded by itself."""
    encoder, decoder = inputs()
    cross = apply(params_of(), encoder, method=T5.start)
    rng, tokens = np.random.default_rng(2), np.unique(decoder[decoder > 0])
    caches = [empty_cache(CONFIG, BATCH, 1, 6, slots=slots) for slots in (None, BEAM)]
    written = np.zeros((BATCH, 1, 0), np.int32)
    for position in range(4):
        new = rng.choice(tokens, written.shape[:2]).astype(np.int32)
        written = np.concatenate([written, new[..., None]], axis=-1)
        found = [
            apply(params_of(), new, jnp.int32(position), cache, cross, method=T5.step)
            for cache in caches
        ]
        np.testing.assert_allclose(found[0][0], found[1][0], atol=2e-5)
        parent = rng.integers(0, written.shape[1], (BATCH, BEAM))
        caches = [cache.of_parents(parent) for _, cache in found]
        written = np.take_along_axis(written, parent[..., None], axis=1)
    assert (caches[1].ancestry[:, :, :4] != np.arange(BEAM)[:, None]).any()
    rest = rng.choice(tokens, (BATCH, BEAM, 2)).astype(np.int32)
    whole = np.concatenate([written, rest], axis=-1)
    tails = [
        np.asarray(apply(params_of(), rest, jnp.int32(4), cache, cross, method=T5.tail))
        for cache in caches
    ]
    for beam in range(BEAM):
        alone = apply(params_of(), encoder, whole[:, beam])
        for tail in tails:
            np.testing.assert_allclose(tail[:, beam], alone[:, 4:], atol=2e-5)


def test_what_a_cache_holds_beyond_its_position_is_not_read(expected):
    encoder, decoder = inputs()
    cross = apply(params_of(), encoder, method=T5.start)
    cache = jax.tree.map(lambda x: x + 7.0, empty_cache(CONFIG, BATCH, BEAM, DOCID + 2))
    states, _ = apply(params_of(), decoder[:, :, 0], jnp.int32(0), cache, cross, method=T5.step)
    np.testing.assert_allclose(states, expected[1][:, :, 0], atol=2e-5)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_logits(config):
    params = params_of(config)
    states = np.random.default_rng(5).normal(size=(2, 3, 16)).astype(np.float32)
    if config.tied_embeddings:
        expected = states @ params["token_embedder"]["embedding"].T / math.sqrt(16)
    else:
        expected = states @ params["decoder"]["logits_dense"]["kernel"]
    ours = apply(params, states, config=config, method=T5.logits)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_query_of_padding_only_is_finite():
    """A batch is filled up with empty rows."""
    encoder, decoder = inputs()
    encoder[1] = 0
    assert np.isfinite(apply(params_of(), encoder, decoder[:, 0])).all()


# --- bfloat16 ----------------------------------------------------------------------------------


def test_bfloat16_runs_and_is_near(expected):
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    encoder, decoder = inputs()
    states = apply(params_of(), encoder, decoder[:, 0], config=half)
    assert states.dtype == jnp.bfloat16
    error = np.abs(np.asarray(states, np.float32) - expected[1][:, 0])
    assert 1e-4 < error.max() < 0.15 and error.mean() < 0.03  # states are of size 1
    assert {x.dtype for x in jax.tree.leaves(empty_cache(half, 1, 1, 1))} == {states.dtype}


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_logits_have_the_resolution_of_float32(tied):
    """T5X multiplies by the output matrix in float32; rounded logits would make ties in a beam."""
    half = dataclasses.replace(CONFIG, dtype="bfloat16", tied_embeddings=tied)
    states = np.random.default_rng(5).normal(size=(20, 16)).astype(jnp.bfloat16)
    logits = apply(params_of(TIED if tied else CONFIG), states, config=half, method=T5.logits)
    assert logits.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert float((rounded == logits).mean()) < 0.1
