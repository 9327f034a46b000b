"""Where a pretrained model is: a folder, the cache of the Hugging Face hub, or the hub itself.

The cache is read as huggingface_hub lays it out (models--ORG--NAME/refs/main names the folder in
snapshots/), so that what any program has downloaded is found, and nothing is imported for it.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from genret_jax.errors import UserError
from genret_jax.pretrained.tensors import INDEX, WEIGHTS, can_read_torch, has_weights

log = logging.getLogger(__name__)
CONFIG, TEXT_MODEL = "config.json", "spiece.model"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def find_folder(name: str) -> Path:
    """The folder of a pretrained model.

    Args:
      name: a folder, or a name on the hub such as "google/flan-t5-small": looked up in the local
        cache, then downloaded, where huggingface_hub is installed and may ask.

    Raises:
      UserError: it is nowhere; with the files that are needed and where they belong.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name}: no such folder; give one with {CONFIG}, {WEIGHTS} and {TEXT_MODEL}, or a "
            "name such as google/flan-t5-small"
        )
    return _cached(name) or _downloaded(name)


def cache_folder() -> Path:
    """The hub's cache on this machine, by the variables that huggingface_hub reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.path.expandvars(os.environ[variable])).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def _cached(name: str) -> Path | None:
    """The snapshot of the main branch, where it holds a configuration and weights of any kind."""
    place = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        revision = (place / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = place / "snapshots" / Path(revision).name
    return snapshot if (snapshot / CONFIG).is_file() and has_weights(snapshot) else None


def _downloaded(name: str) -> Path:
    place = cache_folder()
    reason = "huggingface_hub, which would download it, is not installed"
    try:
        from huggingface_hub import snapshot_download

        log.info("%s: downloading to %s", name, place)
        wanted = [CONFIG, TEXT_MODEL, "model*.safetensors", INDEX]
        folder = Path(snapshot_download(name, cache_dir=place, allow_patterns=wanted))
        if not has_weights(folder, ()) and can_read_torch():
            snapshot_download(name, cache_dir=place, allow_patterns=["pytorch_model*"])
        if has_weights(folder):
            return folder
        reason = f"the hub has no {WEIGHTS} of it (other weights need torch to be read)"
    except ImportError:
        pass
    except Exception as error:  # the hub's many: offline, no such name, no access, a full disk
        lines = str(error).strip().splitlines()
        reason = f"it cannot be downloaded ({lines[0] if lines else type(error).__name__})"
    raise UserError(
        f"{name}: not in {place}, and {reason}; put its {CONFIG}, {WEIGHTS} and {TEXT_MODEL} into "
        "a folder and give --init FOLDER"
    ) from None
