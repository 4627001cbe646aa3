"""The ground tests stand on: eight simulated CPU devices, polite workers, no network, a cache of their own.

Everything that jax, torch or jaxvlm reads from the environment is set here, at import: before any test
module, and so before jax, is imported.
"""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import socket
import tempfile

# Eight devices cost a test that uses one 0.3 s of start and nothing a step (measured).
# The flag of XLA rather than JAX_NUM_CPU_DEVICES: a test's child process that sets either one overrides it.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXVLM_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":
    # The tests compile hundreds of small programs and run each for milliseconds; compiling is what takes the time.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
else:
    os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"

# One worker per core must not run one thread per core in each library, or they wait for each other. XLA's own pool
# has as many threads as there are simulated devices and cannot be made smaller.
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Google's clients read these when they are imported, and otherwise look for an account of this machine, for minutes.
os.environ |= {"NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

# Nothing is fetched: hub clients and pip are told so, and sockets are guarded below.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PIP_NO_INDEX": "1",
    "WANDB_MODE": "disabled",
}

_cache = tempfile.mkdtemp(prefix="jaxvlm-test-cache-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JAXVLM_CACHE"] = _cache

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# No deadlines: the first example of a property often compiles. In CI the examples are the same every time.
settings.register_profile("jaxvlm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("jaxvlm-ci", settings.get_profile("jaxvlm"), derandomize=True, print_blob=True)
settings.load_profile("jaxvlm-ci" if os.environ.get("CI") else "jaxvlm")


class NetworkError(OSError):
    """A test tried to leave the machine."""


def _is_local(address: object) -> bool:
    if not isinstance(address, tuple):
        return True  # a Unix socket
    if address[0] in ("", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuses connections to anything but this machine, and says which test asked."""

    def guarded(name):
        original = getattr(socket.socket, name)

        def call(self, address, *rest):
            if not _is_local(address):
                raise NetworkError(f"A test tried to connect to {address[0]}; tests use no network.")
            return original(self, address, *rest)

        return call

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(name))
