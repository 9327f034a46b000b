"""Makes tests/data/hf: a tiny T5 of each family, as transformers saves it, and its logits.

    python tests/data/make_hf_golden.py

It needs torch and transformers 5, which this project does not depend on. The tests that read what
it wrote need neither; `test_pretrained.py` calls `make` again where both are installed.

Each folder holds config.json, the weights, and golden.npz: encoder_tokens int64[2, 12] with
padding, decoder_tokens int64[2, 5], logits float32[2, 5, vocab] and encoded float32[2, 12, embed].
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

HOME = Path(__file__).parent / "hf"
SIZES = {
    "vocab_size": 96,
    "d_model": 16,
    "d_kv": 4,
    "num_heads": 3,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
}
# As google's own files have it: T5 1.0 says nothing of what its family added later, and 1.1 and mT5
# say that nothing is tied. Transformers 5 itself writes "tied" and what it does with the states.
FAMILIES = {
    "t5": {"feed_forward_proj": "relu"},
    "t5_v1_1": {
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "num_decoder_layers": 3,
        "relative_attention_max_distance": 10,
        "layer_norm_epsilon": 1e-3,
    },
    "flan_t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
NOT_IN_T5 = (
    "feed_forward_proj",
    "num_decoder_layers",
    "relative_attention_max_distance",
    "tie_word_embeddings",
    "scale_decoder_outputs",
    "is_gated_act",
    "dense_act_fn",
)


def inputs(vocab: int = SIZES["vocab_size"]) -> tuple[np.ndarray, np.ndarray]:
    """Encoder tokens, the second row padded, and decoder tokens that begin with padding."""
    rng = np.random.default_rng(1)
    encoder, decoder = rng.integers(2, vocab, (2, 12)), rng.integers(2, vocab, (2, 5))
    encoder[1, 7:] = 0
    decoder[:, 0] = 0
    return encoder, decoder


def make(family: str, folder: Path, *, seed: int = 0, **changes):
    """Saves a randomly initialised model of a family in `folder`; returns it as it is read again.

    Every parameter is random and of a size that matters, norms and position tables included.
    """
    import torch
    import transformers

    settings = {**SIZES, **FAMILIES[family], **changes}
    kind = "MT5" if family == "mt5" else "T5"
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    model = model_class(getattr(transformers, f"{kind}Config")(**settings)).eval()
    if "tie_word_embeddings" in settings:
        shape = model.shared.weight.shape
        model.lm_head.weight = torch.nn.Parameter(torch.empty(*shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layer_norm" in name:
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                one = "shared" in name or "bias" in name
                scale = 1.0 if one else value.shape[-1] ** -0.5
                value.normal_(0.0, scale, generator=generator)
    if family == "mt5":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if family == "flan_t5" else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    _write_config_as_google_does(family, folder)
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def _write_config_as_google_does(family: str, folder: Path) -> None:
    path = folder / "config.json"
    about = json.loads(path.read_text())
    if family == "t5":
        about = {key: value for key, value in about.items() if key not in NOT_IN_T5}
    elif family != "flan_t5":
        about.pop("scale_decoder_outputs", None)
        about["tie_word_embeddings"] = False
    path.write_text(json.dumps(about, indent=2) + "\n")


def outputs(model, encoder: np.ndarray, decoder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32[batch, length, vocab] and encoder states of a transformers model."""
    import torch

    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(encoder),
            attention_mask=torch.from_numpy((encoder > 0).astype(np.int64)),
            decoder_input_ids=torch.from_numpy(decoder),
        )
    return found.logits.numpy(), found.encoder_last_hidden_state.numpy()


def main() -> None:
    encoder, decoder = inputs()
    for seed, family in enumerate(FAMILIES):
        folder = HOME / family
        shutil.rmtree(folder, ignore_errors=True)
        model = make(family, folder, seed=seed)
        logits, encoded = outputs(model, encoder, decoder)
        np.savez_compressed(
            folder / "golden.npz",
            encoder_tokens=encoder,
            decoder_tokens=decoder,
            logits=logits,
            encoded=encoded,
        )
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 1000:.0f} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
