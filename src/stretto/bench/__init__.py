"""Timing, tasks, peers, reports

 every figure is a ratio to a baseline in the same run."""
