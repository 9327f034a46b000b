"""Pretrained T5s: transformers' logits, folders in and out, names on the hub, and what is refused.

`tests/data/hf` holds what transformers made (see `tests/data/make_hf_golden.py`); where it is
installed, the tests marked LIVE ask it anew. How a run begins with one: test_pretrained_start.py.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from live import LIVE
from safetensors.numpy import load_file, save_file

from genret_jax import UserError
from genret_jax.modeling.layers import T5Config
from genret_jax.modeling.model import RetrievalModel
from genret_jax.modeling.network import T5
from genret_jax.pretrained import tensors
from genret_jax.pretrained.checkpoint import open_checkpoint, write_checkpoint
from genret_jax.pretrained.hub import cache_folder, find_folder
from genret_jax.vocabularies import DocidSpace

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "hf"
FAMILIES = ("t5", "t5_v1_1", "flan_t5", "mt5")


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: T5Config, params, encoder, decoder):
    """Logits and encoder states."""

    def run(network, a, b):
        encoded, states = network.states(a, b)
        return network.logits(states), encoded

    return T5(config).apply({"params": params}, encoder, decoder, method=run)


def _outputs(folder, encoder, decoder):
    checkpoint = open_checkpoint(folder)
    return _forward(checkpoint.config, checkpoint.params(), encoder, decoder)


def _golden(family):
    return np.load(GOLDEN / family / "golden.npz")


@pytest.fixture
def copied(tmp_path):
    """Makes a copy of a family's folder that a test may spoil."""

    def copy(family: str = "t5_v1_1") -> Path:
        return Path(shutil.copytree(GOLDEN / family, tmp_path / family))

    return copy


def _edit(folder: Path, **changes) -> None:
    """Changes config.json; None removes a key."""
    about = json.loads((folder / "config.json").read_text()) | changes
    about = {key: value for key, value in about.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(about))


# --- transformers' logits ----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    golden = _golden(family)
    encoder, decoder = golden["encoder_tokens"], golden["decoder_tokens"]
    logits, encoded = _outputs(GOLDEN / family, encoder, decoder)
    assert golden["logits"].std() > 0.5, "not all about zero"
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-5)
    seen = encoder > 0
    np.testing.assert_allclose(encoded[seen], golden["encoded"][seen], atol=2e-5)


def test_what_a_config_leaves_out_is_what_its_family_has():
    """T5 1.0's own files name neither the MLP, nor ties, nor the decoder's layers."""
    first, second = (open_checkpoint(GOLDEN / name).config for name in ("t5", "t5_v1_1"))
    assert (first.feed_forward, first.tied_embeddings) == ("relu", True)
    assert first.num_decoder_layers == first.num_encoder_layers == 2
    assert (first.relative_max_distance, first.layer_norm_epsilon) == (128, 1e-6)
    assert (second.feed_forward, second.tied_embeddings) == ("gated-gelu", False)
    assert (second.num_encoder_layers, second.num_decoder_layers) == (2, 3)
    assert (second.relative_max_distance, second.layer_norm_epsilon) == (10, 1e-3)
    assert second.relative_buckets == 8 and second.num_heads * second.head_dim != second.embed_dim


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tree_is_the_networks_own(family):
    checkpoint = open_checkpoint(GOLDEN / family)
    model = RetrievalModel(checkpoint.config, DocidSpace(start=90, size=4))
    wanted = jax.eval_shape(lambda rng: model.init(rng)[0], jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), wanted) == jax.tree.map(
        lambda x: (x.shape, x.dtype), checkpoint.params()
    )
    layer = wanted["encoder"]["layers_1"]["mlp"]
    assert set(layer) == ({"wi", "wo"} if family == "t5" else {"wi_0", "wi_1", "wo"}), "T5X's names"


def test_embeddings_may_be_tied_without_scaling_and_scaled_without_being_tied(copied):
    """Transformers 5 lets the tensors decide the first and the configuration the second."""
    golden, folder = _golden("t5_v1_1"), copied()
    inputs = golden["encoder_tokens"], golden["decoder_tokens"]
    _edit(folder, tie_word_embeddings=True, scale_decoder_outputs=True)
    scaled, _ = _outputs(folder, *inputs)
    np.testing.assert_allclose(scaled, golden["logits"] * 16**-0.5, atol=2e-5)
    held = load_file(folder / "model.safetensors")
    output = held.pop("lm_head.weight")
    for stored in ("shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        # One tensor, under whichever name: half of a pair that is tied is often not stored.
        rest = {k: v for k, v in held.items() if k != "shared.weight"}
        save_file({**rest, stored: output}, folder / "model.safetensors")
        _edit(folder, tie_word_embeddings=True, scale_decoder_outputs=False)
        assert not open_checkpoint(folder).config.tied_embeddings
        plain, _ = _outputs(folder, *inputs)
        _edit(folder, tie_word_embeddings=True, scale_decoder_outputs=None)
        assert open_checkpoint(folder).config.tied_embeddings
        tied, _ = _outputs(folder, *inputs)
        np.testing.assert_allclose(tied, plain * 16**-0.5, atol=2e-5)
    save_file({**rest, "lm_head.weight": output, "shared.weight": output.copy()}, folder / "x")
    (folder / "x").replace(folder / "model.safetensors")
    assert open_checkpoint(folder).config.tied_embeddings, "equal tensors are tied"


# --- out and in again --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_again(family, tmp_path):
    first = open_checkpoint(GOLDEN / family)
    write_checkpoint(first.params(), first.config, tmp_path, text_model=b"pieces")
    again = open_checkpoint(tmp_path)
    assert again.config == first.config
    assert again.text_model == tmp_path / "spiece.model"
    jax.tree.map(np.testing.assert_array_equal, again.params(), first.params())
    stored = {n for f in (GOLDEN / family).glob("*.safetensors") for n in load_file(f)}
    assert set(load_file(tmp_path / "model.safetensors")) == stored, "transformers' own names"


def test_a_learned_temperature_stays_behind(tmp_path):
    first = open_checkpoint(GOLDEN / "t5")
    params = {**first.params(), "log_temperature": np.float32(0.5)}
    write_checkpoint(params, first.config, tmp_path, text_model=b"")
    assert "log_temperature" not in traverse_util.flatten_dict(open_checkpoint(tmp_path).params())


def test_the_digest_is_that_of_all_files(copied):
    folder = copied("flan_t5")
    seen = {open_checkpoint(folder).digest, open_checkpoint(GOLDEN / "flan_t5").digest}
    assert len(seen) == 1, "wherever they are"
    _edit(folder, dropout_rate=0.2)
    seen.add(open_checkpoint(folder).digest)
    (folder / "spiece.model").write_bytes(b"1")
    seen.add(open_checkpoint(folder).digest)
    part = folder / "model-00002-of-00003.safetensors"
    save_file({k: v + 1 for k, v in load_file(part).items()}, part)
    seen.add(open_checkpoint(folder).digest)
    assert len(seen) == 4


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, r"config.json: model_type is 'umt5', but only t5 and mt5"),
        ({"model_type": None}, "model_type is None"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj is 'gelu', but must be one of relu"),
        ({"d_model": None}, r"no whole description of a T5 \(KeyError\('d_model'\)\)"),
        ({"num_heads": "many"}, "no whole description"),
        ({"d_ff": 25}, r"wi_0.weight is \[24, 16\], but config.json says \[25, 16\]"),
        ({"vocab_size": 97}, r"shared.weight is \[96, 16\], but config.json says \[97, 16\]"),
        ({"num_layers": 3}, "9 of the tensors .* are missing, the first encoder.block.2.layer.0"),
        ({"feed_forward_proj": "relu"}, "DenseReluDense.wi.weight"),
    ],
)
def test_other_models_are_refused_in_one_line(copied, changes, message):
    folder = copied()
    _edit(folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_folders_are_refused_in_one_line(copied, tmp_path, monkeypatch):
    def refused(folder, message):
        with pytest.raises(UserError, match=message) as caught:
            open_checkpoint(folder)
        assert "\n" not in str(caught.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json; a pretrained T5 is a folder of config.json, model")
    folder = copied()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    refused(folder, "model.safetensors: no whole safetensors file")
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors; put model.safetensors there")
    (folder / "pytorch_model.bin").write_bytes(b"")
    monkeypatch.setattr(tensors, "can_read_torch", lambda: False)
    refused(
        folder, "but a pytorch_model.bin, which needs torch to be read; `pip install torch`, or"
    )
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: not readable")
    (folder / "config.json").write_text("[]")
    refused(folder, "not a JSON object")
    parts = copied("flan_t5")
    index = parts / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["shared.weight"] = "model-00002-of-00003.safetensors"
    index.write_text(json.dumps(listed))
    refused(parts, "model-00002-of-00003.safetensors: holds no shared.weight, but")
    (parts / "model-00003-of-00003.safetensors").unlink()
    refused(parts, "model-00003-of-00003.safetensors: is missing")
    index.write_text('{"weight_map": 3}')
    refused(parts, "no index of weights")


def test_tensors_that_are_not_used_are_said(copied, caplog):
    folder = copied()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    held = load_file(folder / "model.safetensors")
    save_file({**held, unused: np.ones((8, 3))}, folder / "model.safetensors")
    with caplog.at_level("WARNING", logger="genret_jax"):
        open_checkpoint(folder)
        assert not caplog.records, "old files have it, and it never did anything"
        save_file({**held, "head.weight": np.ones(3)}, folder / "model.safetensors")
        open_checkpoint(folder)
    assert "1 tensors are not used, the first head.weight" in caplog.text


# --- names -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache, and no huggingface_hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "home" / "hub"


def test_a_name_is_looked_up_in_the_cache(hub):
    place = hub / "models--google--tiny-t5"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc123\n")
    with pytest.raises(UserError, match="google/tiny-t5: not in "):
        open_checkpoint("google/tiny-t5")  # a reference alone is no model
    shutil.copytree(GOLDEN / "t5", place / "snapshots" / "abc123")
    found = open_checkpoint("google/tiny-t5")
    assert found.folder == place / "snapshots" / "abc123"
    assert found.config == open_checkpoint(GOLDEN / "t5").config
    shutil.copytree(place, hub / "models--tiny")
    assert find_folder("tiny") == hub / "models--tiny" / "snapshots" / "abc123"


def test_the_cache_is_where_the_hubs_own_variables_say(hub, monkeypatch, tmp_path):
    assert cache_folder() == hub
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(tmp_path / "older"))
    assert cache_folder() == tmp_path / "older"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "newer"))
    assert cache_folder() == tmp_path / "newer"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "huggingface" / "hub"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "huggingface" / "hub"


def test_a_name_that_cannot_be_downloaded_says_which_files_go_where(hub, monkeypatch):
    def message(name):
        with pytest.raises(UserError) as caught:
            open_checkpoint(name)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    found = message("google/flan-t5-small")
    assert found.startswith(f"google/flan-t5-small: not in {hub}, and huggingface_hub")
    assert "config.json, model.safetensors and spiece.model" in found and "--init FOLDER" in found
    offline = types.SimpleNamespace(snapshot_download=_no_network)
    monkeypatch.setitem(sys.modules, "huggingface_hub", offline)
    assert "it cannot be downloaded (no route to the hub)" in message("google/flan-t5-small")
    assert "no such folder; give one with config.json" in message("./models/flan")


def test_weights_that_only_torch_reads_are_downloaded_where_it_is_installed(hub, monkeypatch):
    asked, installed = [], False

    def download(name, *, cache_dir, allow_patterns):
        asked.append(list(allow_patterns))
        folder = cache_dir / "downloaded"
        folder.mkdir(parents=True, exist_ok=True)
        file = "pytorch_model.bin" if allow_patterns == ["pytorch_model*"] else "config.json"
        shutil.copyfile(GOLDEN / "t5" / "config.json", folder / file)
        return str(folder)

    module = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setattr("genret_jax.pretrained.hub.can_read_torch", lambda: installed)
    with pytest.raises(UserError, match="the hub has no model.safetensors of it .other weights"):
        find_folder("google/t5-v1_1-small")
    assert len(asked) == 1, "what cannot be read is not downloaded"
    installed = True
    assert find_folder("google/t5-v1_1-small") == hub / "downloaded"
    assert asked[2:] == [["pytorch_model*"]]


def _no_network(*args, **options):
    raise ConnectionError("no route to the hub\nand many more lines")


def test_a_name_is_downloaded_into_the_cache(hub, monkeypatch):
    asked = {}

    def download(name, *, cache_dir, allow_patterns):
        asked.update(name=name, cache=cache_dir, patterns=set(allow_patterns))
        return str(shutil.copytree(GOLDEN / "mt5", cache_dir / "downloaded"))

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download)
    )
    assert open_checkpoint("google/mt5-small").folder == hub / "downloaded"
    assert asked["name"] == "google/mt5-small" and asked["cache"] == hub
    assert {"config.json", "spiece.model", "model*.safetensors"} < asked["patterns"]


# --- transformers itself -----------------------------------------------------------------------


@functools.cache
def _maker():
    path = DATA / "make_hf_golden.py"
    spec = importlib.util.spec_from_file_location("make_hf_golden", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@LIVE
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        ("t5", {"num_heads": 2, "relative_attention_num_buckets": 16}),
        ("t5_v1_1", {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-2}),
        ("flan_t5", {"tie_word_embeddings": True}),
        ("mt5", {"num_decoder_layers": 1, "relative_attention_num_buckets": 32}),
    ],
)
def test_live_logits_both_ways(family, changes, tmp_path):
    """A model of transformers read here, written from here, and read by transformers again."""
    make = _maker()
    theirs = make.make(family, tmp_path / "theirs", seed=11, **changes)
    inputs = make.inputs()
    expected, encoded = make.outputs(theirs, *inputs)
    checkpoint = open_checkpoint(tmp_path / "theirs")
    logits, states = _forward(checkpoint.config, checkpoint.params(), *inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(states[inputs[0] > 0], encoded[inputs[0] > 0], atol=1e-4)
    (tmp_path / "ours").mkdir()
    write_checkpoint(checkpoint.params(), checkpoint.config, tmp_path / "ours", text_model=b"")
    from transformers import AutoModelForSeq2SeqLM

    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(make.outputs(again, *inputs)[0], expected, atol=1e-4)


@LIVE
@pytest.mark.parametrize("family", FAMILIES)
def test_live_the_golden_files_are_what_transformers_says(family):
    from transformers import AutoModelForSeq2SeqLM

    golden = _golden(family)
    model = AutoModelForSeq2SeqLM.from_pretrained(GOLDEN / family, dtype="float32").eval()
    found, _ = _maker().outputs(model, golden["encoder_tokens"], golden["decoder_tokens"])
    np.testing.assert_allclose(found, golden["logits"], atol=1e-5)


@LIVE
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_live_weights_of_torch_are_read(parts, zipped, copied):
    """As T5 1.1's and mT5's own uploads have them; before PyTorch 1.6 they were no archives."""
    import torch

    folder = copied("mt5")
    held = {k: torch.from_numpy(v.astype("float32")) for k, v in _tensors_of(folder).items()}
    held["encoder.embed_tokens.weight"] = held["shared.weight"]  # stored once, named twice
    names = sorted(held)
    halves = [names[::2], names[1::2]] if parts else [names]
    for n, half in enumerate(halves):
        path = folder / (f"pytorch_model-{n}.bin" if parts else "pytorch_model.bin")
        content = {name: held[name].to(torch.bfloat16) for name in half}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if parts:
        places = {name: f"pytorch_model-{n}.bin" for n, half in enumerate(halves) for name in half}
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    expected = open_checkpoint(folder).params()  # of the safetensors, which come first
    (folder / "model.safetensors").unlink()
    jax.tree.map(np.testing.assert_array_equal, open_checkpoint(folder).params(), expected)
    (folder / ("pytorch_model-1.bin" if parts else "pytorch_model.bin")).write_bytes(b"cut off")
    with pytest.raises(UserError, match="no whole weights of PyTorch") as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def _tensors_of(folder):
    found = tensors.open_tensors(folder)
    return {name: found.read(name) for name in found.names}
