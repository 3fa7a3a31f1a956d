"""What the tests need to build nodes, networks and checkpoints."""
