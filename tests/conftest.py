"""Eight simulated CPU devices for every test, and what hypothesis needs on a busy machine."""

from __future__ import annotations

import functools
import os
import tempfile

# Eight devices, and programs that are soon compiled: most of them run a few times.
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_cpu_use_fusion_emitters": "false",  # half the work of the compiler
}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given)]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests compile the same small programs again and again; each is compiled once a session.
_CACHE = tempfile.TemporaryDirectory(prefix="genret-xla-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# After the flags, like everything that may import jax.
import hypothesis  # noqa: E402
import pytest  # noqa: E402

# A compilation inside an example is slow and no fault of the example.
hypothesis.settings.register_profile(
    "genret",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("genret")


@pytest.fixture(scope="module")
def one_device():
    """Meshes of one device for a whole file: programs for one are compiled much sooner.

    Those for eight are for tests/test_training.py and tests/test_parallelism.py, and for the first
    commands of the README, which run from end to end.
    """
    import jax

    from genret_jax.training import partitioning

    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(partitioning.make_mesh, devices=jax.devices()[:1])
        patch.setattr(partitioning, "make_mesh", one)
        yield


@pytest.fixture
def quiet(monkeypatch):
    """The command line would leave a log handler for the stderr of one test to the next."""
    from genret_jax import cli

    monkeypatch.setattr(cli, "log_to_stderr", lambda: None)


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """The folder of the tiny collection, to read."""
    from tiny import tiny_corpus

    from genret_jax.corpus import write_corpus

    folder = tmp_path_factory.mktemp("data") / "tiny"
    write_corpus(tiny_corpus(), folder)
    return folder
