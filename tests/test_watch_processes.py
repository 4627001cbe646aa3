"""The loss on held-out records in a job of two real processes, each of which reads half of the rows."""

from __future__ import annotations

import fault_runs
import pytest
from held_out_helpers import loss_by_hand

from jaxvlm import job
from jaxvlm.train.metrics import read_events

CHANGES = [
    "--config.stages[0].steps=2",
    "--config.stages[1].steps=4",
    "--config.stages[1].data.sources[0].held_out=24",
    "--config.stages[1].watch.every_steps=3",
    "--config.eval.task=",
]


def test_two_processes_measure_the_loss_of_all_records(tmp_path):
    both = fault_runs.Job(tmp_path / "run", 2, *CHANGES)
    codes, _ = both.end(300)
    assert codes == [0, 0], both.text()
    found = read_events(tmp_path / "run" / "metrics.jsonl", "held_out")
    assert [event["step"] for event in found] == [3, 4]
    (source,) = job.resolve_assets(job.run_config(tmp_path / "run")).stages[1].data.sources
    loss, tokens = loss_by_hand(tmp_path / "run", source)
    assert found[-1]["tokens"] == {"toy": tokens, "all": tokens}
    assert found[-1]["loss"]["toy"] == pytest.approx(loss, rel=1e-4)
