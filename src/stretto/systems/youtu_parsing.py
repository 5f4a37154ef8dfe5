"""Youtu-Parsing: what its paper claims."""

from stretto.systems.types import Claim, System

SYSTEM = System(
    slug="youtu-parsing",
    title="Youtu-Parsing",
    room="multimodal",
    purpose=(
        "Turns a page into structured text in a few forwards per region: one visual encoding, many "
        "verified tokens a step."
    ),
    paper=(
        "Youtu-Parsing: Perception, Structuring and Recognition via High-Parallelism Decoding, Jan "
        "2026 (arXiv 2601.20430)"
    ),
    claims=(
        Claim(
            name="token parallelism",
            paper="5-11x over plain decoding, best on tables",
            bar="4-8 tokens a forward on text, more on tables; output equals greedy decoding",
        ),
        Claim(
            name="query parallelism",
            paper="another 2x with 5 boxes a query, equal quality",
            bar="forked queries equal single ones; seconds a page 3-6x lower in all",
        ),
        Claim(
            name="one encoding",
            paper="the page is encoded once",
            bar="image encoded and prefilled once per page, counted",
        ),
    ),
)
