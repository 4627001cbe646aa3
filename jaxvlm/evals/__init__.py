"""Evaluation: tasks, scorers, the resumable runner, intervals and the report."""
