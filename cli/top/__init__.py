"""`top`: what one node and its swarm do, in a terminal, from calls of the RPC alone."""
