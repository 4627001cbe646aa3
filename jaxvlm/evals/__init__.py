"""Evaluation: tasks, scorers, the resumable runner, intervals and the report.

`score(task, protocol, predictions, references)` scores answers that any program wrote; `tasks.TASKS` holds what there is.
"""

from jaxvlm.evals.scoring import score

__all__ = ["score"]
