"""One transformer, its checkpoints, its declared variations; tokenizer; vision tower."""
