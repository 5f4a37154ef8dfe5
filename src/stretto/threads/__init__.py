"""Several threads for one task, on sessions with fork and join: parallel slots, parallel reasoning, orchestration."""
