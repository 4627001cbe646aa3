"""A handful of the faults of `make test-faults`: a process killed while stepping and saving, and SIGTERM to one of two."""

from __future__ import annotations

import fault_runs
import pytest


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fault_runs.finish(workdir, 2)
    return fault_runs.parameters(workdir)


def test_sigterm_to_one_process_stops_both_at_one_step(tmp_path, expected):
    assert fault_runs.run_fault("sigterm", tmp_path, expected).codes == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["idle", "stepping", "saving", "sigstop", "flip", "disk"])
def test_faults(tmp_path, expected, fault):
    if fault_runs.run_fault(fault, tmp_path, expected) is None:
        pytest.skip("this user may not mount a small disk")


def test_killed_anywhere_it_ends_in_the_same_bits(tmp_path, expected):
    assert len(fault_runs.kills(tmp_path, 2, 2, expected, seed=3)) == 2
