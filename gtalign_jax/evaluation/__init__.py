"""Judging a model: held-out evaluation, intervals, the published code's numbers, the report."""
