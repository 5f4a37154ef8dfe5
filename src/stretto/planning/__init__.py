"""Plans: what would run how fast on hardware that is not here.

So far the cluster simulator: stations with servers and queues, in seconds of simulated time."""
