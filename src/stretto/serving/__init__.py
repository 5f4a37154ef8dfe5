"""HTTP, OpenAI-compatible, in front of an engine that runs in a process of its own; the page; online adaptation.

The front (asyncio, free of torch) turns requests into messages; ``worker.py`` is the engine process, whose one thread
owns all state; ``protocol.py`` is what they say to each other."""
