"""A network of real daemons on this machine's loopback, for trying things out and for tests."""
