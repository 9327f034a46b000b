"""Eight simulated CPU devices for every test, and what hypothesis needs on a busy machine."""

from __future__ import annotations

import os

_DEVICES = "--xla_force_host_platform_device_count"

if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402  (after the flags, like everything that may import jax)

# A compilation inside an example is slow and no fault of the example.
hypothesis.settings.register_profile(
    "genret",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("genret")
