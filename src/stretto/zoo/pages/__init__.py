"""One file a family of tasks. A page is ``TASKS``: name -> (purpose, generate(rng) -> (prompt, answer), score)."""
