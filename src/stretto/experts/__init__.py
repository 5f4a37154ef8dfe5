"""Mixture of experts at run time: which experts a forward reads, and for whom.

Rules here look at what routers gave; the routed layers themselves are ``models.moe``."""
