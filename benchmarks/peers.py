"""The searches that are compared. Each does the whole of a query: encoder, decoder, beam.

A peer whose package does not import is left out. `hf` needs transformers and torch; `static` needs
the package static_decoding (github.com/youtube/static-constraint-decoding) on the Python path.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from typing import Any, Protocol

import numpy as np
from problem import TEXT, Problem

# A table of logits stands in for a network where the search alone is measured: both sides look up
# the row of the token written last.
LOOKUP_SCALE = 2.0


@dataclasses.dataclass(frozen=True)
class Found:
    """Identifiers of a batch: int[batch, beam, length] local ids, float[batch, beam] or None."""

    tokens: np.ndarray
    scores: np.ndarray | None


class Peer(Protocol):
    """One search, prepared for one problem and beam.

    Attributes:
      about: bytes of the index, build_s (CPU) of making it, what it normalises over.
    """

    about: dict[str, Any]

    def __init__(self, problem: Problem, beam: int, part: str, device: str = "cpu"): ...

    def run(self, number: int) -> Any:
        """Searches batch `number`, and has the result when it returns."""

    def found(self, number: int) -> Found: ...

    def memory(self) -> int | None:
        """Bytes of the device that weights, index and a run need at most; None: not known."""


class Compiled:
    """A JAX program, compiled when it is first called."""

    def __init__(self, function: Any, *arguments: Any):
        import jax

        self._program, self._arguments = jax.jit(function), arguments
        self._compiled: Any = None

    def __call__(self, *more: Any) -> Any:
        import jax

        if self._compiled is None:
            self._compiled = self._program.lower(*self._arguments, *more).compile()
        return jax.block_until_ready(self._compiled(*self._arguments, *more))

    def memory(self) -> int | None:
        found = self._compiled and self._compiled.memory_analysis()
        if not found:
            return None
        sizes = found.argument_size_in_bytes, found.temp_size_in_bytes, found.output_size_in_bytes
        return int(sum(sizes))


def lookup(problem: Problem) -> np.ndarray:
    """float32[vocab, vocab]: logits after each token."""
    rng = np.random.default_rng(problem.seed + 2)
    table = (rng.normal(size=(problem.vocab, problem.vocab)) * LOOKUP_SCALE).astype(np.float32)
    table[:, 0] = -np.inf
    return table


class Ours:
    """genret_jax. Part "search" has the network, part "step" a table of logits in its place."""

    def __init__(self, problem: Problem, beam: int, part: str, device: str = "cpu"):
        import jax

        from genret_jax.trie import build_trie

        self.problem, self.beam = problem, beam
        table = problem.table
        began = time.process_time()
        trie = build_trie(table)
        built = time.process_time() - began
        on_device = trie.on_device()
        self.about = {
            "build_s": built,
            "bytes": trie.num_bytes,
            "device_bytes": on_device.num_bytes,
            "normaliser": problem.normalised_over,
        }
        if part == "search":
            self._of_number = problem.queries

            def search(trie: Any, params: Any, queries: Any) -> Any:
                return problem.model.search(params, queries, trie, beam=beam)

            self._run = Compiled(search, on_device, problem.device_params())
        else:
            self._of_number = np.int32
            self._run = Compiled(self._step, on_device, jax.device_put(lookup(problem)))

    def _step(self, trie: Any, logits: Any, number: Any) -> Any:
        import jax
        import jax.numpy as jnp

        from genret_jax.decoding import constrained_beam_search

        def step(tokens: Any, position: Any, cache: Any) -> Any:
            return logits[_start(tokens, position, number)], cache

        def tail(inputs: Any, targets: Any, position: Any, cache: Any) -> Any:
            def log_p(pair: Any) -> Any:
                row, target = logits[pair[0]], pair[1]
                chosen = jnp.take_along_axis(row, target[..., None], axis=-1)[..., 0]
                return chosen - jax.nn.logsumexp(row, axis=-1)

            places = jnp.moveaxis(inputs, 2, 0), jnp.moveaxis(targets, 2, 0)
            return jnp.moveaxis(jax.lax.map(log_p, places), 0, 2)

        return constrained_beam_search(
            step,
            (),
            trie,
            batch=self.problem.batch,
            beam=self.beam,
            normaliser=self.problem.normaliser,
            tail_fn=tail,
        )

    def run(self, number: int) -> Any:
        return self._run(self._of_number(number))

    def found(self, number: int) -> Found:
        result = self.run(number)
        return Found(np.asarray(result.tokens), np.asarray(result.scores))

    def memory(self) -> int | None:
        return self._run.memory()


def _start(tokens: Any, position: Any, number: Any) -> Any:
    """The row to look up: of the last token, or at first one of the query's own."""
    import jax.numpy as jnp

    query = (number * 64 + jnp.arange(tokens.shape[0]))[:, None] % 1024 + 2
    return jnp.where(position > 0, tokens, query)


class Unconstrained:
    """T5X's kind of search with the same network: the best of beam x vocabulary, and no trie.

    It shares all that makes ours fast but for the trie: logits of the docid block, keys and values
    of the query not copied for each beam, those of hypotheses never moved, the first step with one
    hypothesis.
    """

    def __init__(self, problem: Problem, beam: int, part: str, device: str = "cpu"):
        self.problem, self.beam = problem, beam
        self.about = {"build_s": 0.0, "bytes": 0, "normaliser": "docid tokens and EOS"}
        if part != "search":
            raise ValueError("unconstrained: part search only")
        if problem.normaliser == "children":
            raise ValueError("unconstrained: has no children to normalise over")
        self._run = Compiled(self._search, problem.device_params())

    def _search(self, params: Any, encoder_tokens: Any) -> Any:
        import jax
        import jax.numpy as jnp

        from genret_jax.modeling.network import T5, empty_cache

        model, length, beam = self.problem.model, self.problem.length, self.beam
        batch, variables = encoder_tokens.shape[0], {"params": params}
        cross = model.network.apply(variables, encoder_tokens, method=T5.start)

        def grow(state: Any) -> Any:
            tokens, scores, position, cache = state
            last = jnp.where(position > 0, tokens[:, :, jnp.maximum(position - 1, 0)], 0)
            states, cache = model.network.apply(
                variables, model.docids.to_model(last), position, cache, cross, method=T5.step
            )
            log_p = jax.nn.log_softmax(model.docid_logits(params, states))
            total = (scores[..., None] + log_p).reshape(batch, -1)
            scores, chosen = jax.lax.top_k(total, beam)
            parent, token = chosen // log_p.shape[-1], chosen % log_p.shape[-1]
            tokens = jnp.take_along_axis(tokens, parent[..., None], axis=1)
            cache = cache.of_parents(parent)
            return tokens.at[:, :, position].set(token), scores, position + 1, cache

        state = (
            jnp.zeros((batch, 1, length), jnp.int32),
            jnp.zeros((batch, 1)),
            jnp.zeros((), jnp.int32),
            empty_cache(model.config, batch, 1, length, slots=beam),
        )
        state = jax.lax.while_loop(lambda s: s[2] < length, grow, grow(state))
        return state[:2]

    def run(self, number: int) -> Any:
        return self._run(self.problem.queries(number))

    def found(self, number: int) -> Found:
        tokens, scores = self.run(number)
        return Found(np.asarray(tokens), np.asarray(scores))

    def memory(self) -> int | None:
        return self._run.memory()


class HuggingFace:
    """transformers' `generate(prefix_allowed_tokens_fn=...)` with a trie of Python dictionaries.

    The same weights. It computes all logits, as it always does; a bias of minus infinity on the
    text pieces makes it normalise over docid tokens and EOS, as ours does.
    """

    def __init__(self, problem: Problem, beam: int, part: str, device: str = "cpu"):
        import torch
        from transformers import T5Config, T5ForConditionalGeneration

        if part != "search":
            raise ValueError("hf: part search only")
        if problem.kind == "variable":
            raise ValueError("hf: a finished hypothesis leaves its beam; identifiers of one length")
        self.problem, self.beam = problem, beam
        c = problem.config
        config = T5Config(
            vocab_size=c.vocab_size,
            d_model=c.embed_dim,
            d_kv=c.head_dim,
            d_ff=c.mlp_dim,
            num_layers=c.num_encoder_layers,
            num_decoder_layers=c.num_decoder_layers,
            num_heads=c.num_heads,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
        self.model = T5ForConditionalGeneration(config).eval()
        head = torch.nn.Linear(c.embed_dim, c.vocab_size, bias=True)
        self.model.lm_head = head
        state = torch_state(problem.params, c.num_encoder_layers, c.num_decoder_layers)
        bias = np.full(c.vocab_size, -np.inf, np.float32)
        bias[1] = bias[TEXT : TEXT + problem.vocab - 2] = 0
        state["lm_head.bias"] = bias
        missing, unexpected = self.model.load_state_dict(
            {name: torch.from_numpy(np.array(value)) for name, value in state.items()}, strict=False
        )
        if unexpected or any("embed_tokens" not in name for name in missing):
            raise ValueError(f"hf: weights do not fit: {missing}, {unexpected}")
        self.model.encoder.embed_tokens.weight = self.model.shared.weight
        self.model.decoder.embed_tokens.weight = self.model.shared.weight
        self.device = torch.device("cuda" if device == "gpu" else "cpu")
        if device == "gpu":
            torch.cuda.empty_cache()  # what the problem before has left
            torch.cuda.reset_peak_memory_stats()
        self.model.to(self.device, getattr(torch, problem.dtype))
        began = time.process_time()
        self.trie: dict[int, Any] = {}
        for row in problem.docids.to_model(problem.tokens).tolist():
            node = self.trie
            for token in row:
                node = node.setdefault(token, {})
        built = time.process_time() - began
        self.about = {
            "build_s": built,
            "bytes": _size(self.trie),
            "normaliser": problem.normalised_over,
        }

    def _allowed(self, batch: int, tokens: Any) -> list[int]:
        node = self.trie
        for token in tokens.tolist()[1:]:
            node = node.get(token, {})
        return list(node) or [1]

    def run(self, number: int, scores: bool = False) -> Any:
        import torch

        with torch.inference_mode():
            found = self.model.generate(
                torch.from_numpy(self.problem.queries(number)).long().to(self.device),
                num_beams=self.beam,
                num_return_sequences=self.beam,
                max_new_tokens=self.problem.length,
                length_penalty=0.0,
                do_sample=False,
                prefix_allowed_tokens_fn=self._allowed,
                renormalize_logits=self.problem.normaliser == "children",
                return_dict_in_generate=True,
                output_scores=scores,
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    def found(self, number: int) -> Found:
        result = self.run(number, scores=True)
        shape = (self.problem.batch, self.beam, -1)
        tokens = result.sequences.cpu().numpy()[:, 1:].reshape(shape)
        # A beam of one is greedy, and has no scores.
        scores = getattr(result, "sequences_scores", None)
        if scores is None and self.problem.normaliser == "vocabulary":
            scores = self._log_p(number, result.sequences)
        return Found(
            self.problem.docids.to_local(tokens),
            None if scores is None else scores.float().cpu().numpy().reshape(shape[:2]),
        )

    def _log_p(self, number: int, sequences: Any) -> Any:
        """float[batch]: of what was written, teacher-forced."""
        import torch

        queries = torch.from_numpy(self.problem.queries(number)).long().to(self.device)
        with torch.inference_mode():
            logits = self.model(input_ids=queries, decoder_input_ids=sequences[:, :-1]).logits
        log_p = torch.log_softmax(logits.float(), -1)
        return torch.gather(log_p, -1, sequences[:, 1:, None])[..., 0].sum(-1)

    def memory(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None


def torch_state(params: Any, encoder_layers: int, decoder_layers: int) -> dict[str, np.ndarray]:
    """Our parameters under the names and shapes of transformers' T5."""
    state = {
        "shared.weight": params["token_embedder"]["embedding"],
        "lm_head.weight": params["decoder"]["logits_dense"]["kernel"].T,
    }

    def attention(ours: Any, theirs: str) -> None:
        for name in ("query", "key", "value", "out"):
            state[f"{theirs}.{name[0]}.weight"] = ours[name]["kernel"].T

    for side, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        bias = params[side]["relpos_bias"]["rel_embedding"].T
        state[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
        state[f"{side}.final_layer_norm.weight"] = params[side][f"{side}_norm"]["scale"]
        for number in range(layers):
            ours, theirs = params[side][f"layers_{number}"], f"{side}.block.{number}.layer"
            parts = [("attention", "pre_attention_layer_norm", "SelfAttention")]
            if side == "decoder":
                parts = [
                    ("self_attention", "pre_self_attention_layer_norm", "SelfAttention"),
                    (
                        "encoder_decoder_attention",
                        "pre_cross_attention_layer_norm",
                        "EncDecAttention",
                    ),
                ]
            for place, (name, norm, their_name) in enumerate(parts):
                attention(ours[name], f"{theirs}.{place}.{their_name}")
                state[f"{theirs}.{place}.layer_norm.weight"] = ours[norm]["scale"]
            last = f"{theirs}.{len(parts)}"
            state[f"{last}.layer_norm.weight"] = ours["pre_mlp_layer_norm"]["scale"]
            for name in ("wi_0", "wi_1", "wo"):
                state[f"{last}.DenseReluDense.{name}.weight"] = ours["mlp"][name]["kernel"].T
    return state


def _size(node: dict[int, Any]) -> int:
    """Bytes of the dictionaries of a trie; the numbers in them are not counted."""
    total, todo = 0, [node]
    while todo:
        one = todo.pop()
        total += sys.getsizeof(one)
        todo.extend(one.values())
    return total


class Static:
    """STATIC's search with its own step; part "step" only, since its harness has no network."""

    def __init__(self, problem: Problem, beam: int, part: str, device: str = "cpu"):
        import jax
        from static_decoding.csr_utils import build_static_index
        from static_decoding.decoding_jax import sparse_transition_jax

        if part != "step":
            raise ValueError("static: part step only")
        if problem.kind == "variable":
            raise ValueError("static: identifiers of one length only")
        if problem.normaliser == "children":
            raise ValueError("static: normalises over the vocabulary")
        self.problem, self.beam = problem, beam
        tokens = problem.tokens
        began = time.process_time()
        packed, offsets, widths, start, mask, states = build_static_index(tokens, problem.vocab)
        built = time.process_time() - began
        arrays = [jax.device_put(a) for a in (packed, offsets, start, mask, states)]
        self.about = {
            "build_s": built,
            "bytes": sum(a.nbytes for a in arrays),
            "normaliser": "docid tokens and EOS",
        }
        batch = problem.batch

        def search(logits: Any, packed, offsets, start, mask, states, number: Any) -> Any:
            def model(inputs: Any, key: Any) -> Any:
                first = inputs.shape[0] == batch and key is number
                tokens = _start(inputs, 0 if first else 1, number)
                return logits[tokens], key + 1

            return sparse_transition_jax.__wrapped__(
                model=model,
                key=number,
                batch_size=batch,
                beam_size=beam,
                tokens_per_beam=min(beam, problem.vocab),
                start_token=0,
                max_sample_len=tokens.shape[1],
                vocab_size=problem.vocab,
                max_branch_factors=tuple(int(w) for w in widths),
                packed_csr=packed,
                csr_indptr=offsets,
                start_mask=start,
                dense_mask=mask,
                dense_states=states,
            )

        self._run = Compiled(search, jax.device_put(lookup(problem)), *arrays)

    def run(self, number: int) -> Any:
        return self._run(np.int32(number))

    def found(self, number: int) -> Found:
        return Found(np.asarray(self.run(number)), None)

    def memory(self) -> int | None:
        return self._run.memory()


PEERS: dict[str, Any] = {
    "ours": Ours,
    "unconstrained": Unconstrained,
    "hf": HuggingFace,
    "static": Static,
}
_NEEDS = {"hf": ("torch", "transformers"), "static": ("static_decoding",)}


def missing(peer: str) -> list[str]:
    """Packages that a peer needs and that are not there."""
    return [name for name in _NEEDS.get(peer, ()) if importlib.util.find_spec(name) is None]
