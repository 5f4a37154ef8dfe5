"""One file a method, and what methods share: options, registry, verification, unmasking, the tree planner.

A method is two functions around the forward, ``propose`` and ``commit`` (engine/types.py); the loop is not here."""
