"""The faults of `make test-faults`, one by one (slow), and two of them in one run (always)."""

from __future__ import annotations

import random
import signal

import fault_runs
import pytest


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fault_runs.finish(workdir, 2)
    return fault_runs.parameters(workdir)


def test_killed_and_preempted_it_ends_in_the_same_bits(tmp_path, expected):
    workdir = tmp_path / "run"
    job = fault_runs.Job(workdir, 2)
    assert fault_runs.kill_somewhere(job, "save", random.Random(0)), job.text()
    codes, _ = job.end()
    assert -signal.SIGKILL in codes and set(codes) <= {75, -signal.SIGKILL, -signal.SIGABRT}, job.text()
    assert fault_runs.fault_sigterm(workdir).codes == [0, 0]
    fault_runs.finish(workdir, 2)
    fault_runs.assert_same(workdir, expected)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*fault_runs.FAULTS, "disk"])
def test_faults(tmp_path, expected, fault):
    if fault_runs.run_fault(fault, tmp_path, expected) is None:
        pytest.skip("this user may not mount a small disk")
