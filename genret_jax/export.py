"""A retriever's T5 as a Hugging Face folder, for programs that know nothing of genret_jax.

FOLDER/
  config.json, model.safetensors   T5ForConditionalGeneration
  spiece.model                     the text pieces
  tokenizer_config.json            for transformers' T5Tokenizer
  generation_config.json           whether `generate` is to renormalise over what the trie allows
  docids.jsonl                     a line a docid: document, its token ids, its text

Text goes in as pieces and EOS; the model writes docid tokens, which are no pieces: `docids.jsonl`
says which sequences exist. `genret fit --init FOLDER` begins with such a folder, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from genret_jax.errors import UserError
from genret_jax.files import replace_on_success
from genret_jax.modeling.layers import T5Config
from genret_jax.pretrained.checkpoint import write_checkpoint
from genret_jax.retriever import Retriever

DOCIDS = "docids.jsonl"


def export_retriever(retriever: Retriever, folder: str | Path) -> dict[str, Any]:
    """Writes the folder, whole or not at all.

    Args:
      retriever: an open one. Its document vectors and its learned temperature are no part of a T5
        and stay behind: the exported model ranks by generation.
      folder: a new one, or an empty one.

    Returns:
      What was written: the folder, files and their bytes, rows of the vocabulary, and where docid
      tokens begin.

    Raises:
      UserError: the folder is there and not empty, or the network is no T5.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; choose another --out, or delete it")
    vocabulary, config = retriever.index.vocabulary, T5Config(**retriever.about["network"])
    if config.adaptor_rank:
        raise UserError(
            f"{retriever.folder}: its decoder has a prefix adaptor (NetworkConfig.adaptor_rank is "
            f"{config.adaptor_rank}), which no T5 has; only methods without one can be exported"
        )
    with replace_on_success(folder) as temporary:
        temporary.mkdir()
        write_checkpoint(retriever.params, config, temporary, text_model=vocabulary.model)
        tokenizer = {
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": min(100, vocabulary.docids.start - vocabulary.text_size),
            "model_max_length": int(retriever.about["input_length"]),
            "pad_token": "<pad>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        (temporary / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
        generation = {
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "renormalize_logits": retriever.ranker.model.normaliser == "children",
        }
        (temporary / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        _write_docids(retriever, temporary / DOCIDS)
    return {
        "folder": str(folder),
        "vocab_size": config.vocab_size,
        "docid_start": vocabulary.docids.start,
        "docid_tokens": vocabulary.docids.size - 2,
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }


def _write_docids(retriever: Retriever, path: Path) -> None:
    """One JSON object a row of the table; a document of several docids has several lines."""
    table, documents = retriever.index.table, retriever.index.documents
    model_ids = retriever.index.vocabulary.docids.to_model(table.tokens)
    with open(path, "w", encoding="utf-8") as file:
        for row, position in enumerate(table.documents.tolist()):
            tokens = model_ids[row, : table.lengths[row]].tolist()
            line = {"document": documents[position].id, "tokens": tokens, "docid": table.text(row)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
