"""Constraining a beam to n-grams that occur: the trie of this toolkit against a suffix array.

    python -m benchmarks.ngram_index squad11_dev
    python -m benchmarks.ngram_index large/made-100000 --batch 8 --repeats 3

Both searches are jitted, over the n-grams of the documents' text pieces, as method `ngram` has
them. The network is a table of logits by the token written last, so that what is timed is the
constraint. The suffix array finds the children of a hypothesis, a range of it, by halving for all
tokens of the vocabulary at once. The scores of both must agree before anything is timed. They take
turns; medians.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from genret_jax.corpus import read_corpus
from genret_jax.data.examples import Ragged
from genret_jax.decoding import constrained_beam_search
from genret_jax.ngram.index import NgramIndex
from genret_jax.recipe import load_recipe
from genret_jax.vocabularies import EOS, PAD, UNK, Vocabulary, train_text_model

LENGTH = 10


def by_trie(table: Array, trie: Any, first: Array, *, beam: int) -> Array:
    """float32[batch, beam]: scores of the search of `genret_jax.decoding`."""

    def step(last: Array, position: Array, cache: Array) -> tuple[Array, Array]:
        at_root = jnp.broadcast_to(cache[:, :1], last.shape)
        return table[jnp.where(position == 0, at_root, last)], cache

    batch = len(first)
    cache = jnp.broadcast_to(first[:, None], (batch, 1))
    return constrained_beam_search(step, cache, trie, batch=batch, beam=beam).scores


def by_suffix_array(
    table: Array, stream: Array, after: Array, suffixes: Array, first: Array, *, beam: int
) -> Array:
    """The same over positions in the order of what begins there.

    Args:
      table: float32[tokens, tokens], logits by the token before.
      stream, after: int[tokens of the texts], and where the text of each ends.
      suffixes: int32[positions].
      first: int32[batch], what stands for the token before the first.
      beam: hypotheses.
    """
    batch, tokens = len(first), table.shape[0]
    every = jnp.arange(tokens + 1)
    halvings = math.ceil(math.log2(suffixes.shape[0] + 1)) + 1

    def at(place: Array, depth: Array) -> Array:
        """The token `depth` behind a place of the array; EOS at the end of its text."""
        position = suffixes[jnp.minimum(place, len(suffixes) - 1)]
        found = stream[jnp.minimum(position + depth, len(stream) - 1)].astype(jnp.int32)
        end = after[position]
        return jnp.where(
            position + depth < end, found, jnp.where(position + depth == end, EOS, PAD)
        )

    def bounds(lo: Array, hi: Array, depth: Array) -> Array:
        """int32[batch, beam, tokens + 1]: where in each range the tokens from `t` on begin."""
        low = jnp.broadcast_to(lo[..., None], (*lo.shape, tokens + 1))
        high = jnp.broadcast_to(hi[..., None], low.shape)

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = (low + high) // 2
            less = (low < high) & (at(middle, depth) < every)
            return jnp.where(less, middle + 1, low), jnp.where(less | (low >= high), high, middle)

        return jax.lax.fori_loop(0, halvings, halve, (low, high))[0]

    def grow(depth: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        last, scores, lo, hi, ended = state
        log_p = jax.nn.log_softmax(table[last])
        starts = bounds(lo, hi, depth)
        there = starts[..., 1:] > starts[..., :-1]
        grown = jnp.where(there & ~ended[..., None], scores[..., None] + log_p, -jnp.inf)
        stays = jnp.where(ended, scores, -jnp.inf)
        every_score = jnp.concatenate([grown.reshape(batch, -1), stays], axis=1)
        scores, chosen = jax.lax.top_k(every_score, beam)
        kept = chosen >= beam * tokens
        parent = jnp.where(kept, chosen - beam * tokens, chosen // tokens)
        token = jnp.where(kept, EOS, chosen % tokens)

        def of(x: Array) -> Array:
            return jnp.take_along_axis(x, parent, axis=1)

        begin = jnp.take_along_axis(starts.reshape(batch, -1), parent * (tokens + 1) + token, 1)
        end = jnp.take_along_axis(starts.reshape(batch, -1), parent * (tokens + 1) + token + 1, 1)
        lo, hi = jnp.where(kept, of(lo), begin), jnp.where(kept, of(hi), end)
        return token, scores, lo, hi, token == EOS

    zero = jnp.zeros((batch, beam), jnp.int32)
    only = jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf)
    state = (
        jnp.broadcast_to(first[:, None], (batch, beam)).astype(jnp.int32),
        jnp.broadcast_to(only, (batch, beam)),
        zero,
        zero + len(suffixes),
        zero > 0,
    )
    return jax.lax.fori_loop(0, LENGTH, grow, state)[1]


def ends(texts: Ragged) -> np.ndarray:
    """int32[tokens]: where n-grams from a token on end: with its text, or before an unknown."""
    found = np.repeat(texts.offsets[1:], texts.lengths)
    unknown = np.where(texts.values == UNK, np.arange(len(found)), len(found))
    return np.minimum(found, np.minimum.accumulate(unknown[::-1])[::-1]).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beam", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    corpus = read_corpus(arguments.corpus)
    texts = [document.whole for document in corpus.documents]
    model = train_text_model(texts, size=load_recipe("ngram").vocabulary.size)
    vocabulary = Vocabulary(model, docid_size=2)
    pieces = Ragged.of_chunks([vocabulary.encode(text)] for text in texts)
    size = vocabulary.text_size
    index = NgramIndex.of(pieces, np.arange(len(texts)), length=LENGTH, vocab_size=size)
    report = index.report()
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(0, 2, (size, size)), jnp.float32).at[:, PAD].set(-jnp.inf)
    first = jnp.asarray(rng.integers(3, size, arguments.batch), jnp.int32)
    stream = pieces.values.astype(index.trie.rows.dtype)
    array = tuple(map(jnp.asarray, (stream, ends(pieces), index.trie.row_documents)))
    trie = index.trie.on_device()
    searches = {
        "trie": functools.partial(
            jax.jit(functools.partial(by_trie, beam=arguments.beam)), table, trie, first
        ),
        "suffix array": functools.partial(
            jax.jit(functools.partial(by_suffix_array, beam=arguments.beam)), table, *array, first
        ),
    }
    found = {name: np.asarray(search()) for name, search in searches.items()}
    np.testing.assert_allclose(found["trie"], found["suffix array"], atol=1e-3)
    times: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(arguments.repeats):
        for name, search in searches.items():
            began = time.perf_counter()
            jax.block_until_ready(search())
            times[name].append(1000 * (time.perf_counter() - began))
    sizes = {
        "trie": sum(leaf.nbytes for leaf in jax.tree.leaves(trie)),
        "suffix array": sum(part.nbytes for part in array),
    }
    print(f"{report['tokens']:,} pieces, {arguments.batch} queries, beam {arguments.beam}:\n")
    print("| | ms a search | MB on the device |\n|---|---:|---:|")
    for name in searches:
        print(f"| {name} | {statistics.median(times[name]):.0f} | {sizes[name] / 1e6:.1f} |")


if __name__ == "__main__":
    main()
