"""Types, K/V cache, packing, scheduler, sampling, grammar, and the loop that names no method."""
