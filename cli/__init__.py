"""The `blyan-node` command: a thin client of the node's RPC."""
