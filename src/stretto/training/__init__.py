"""One trainer; objectives; recipes; makers of data."""
