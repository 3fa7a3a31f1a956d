"""The node's numbers: read from its services when asked, shown to Prometheus and over the RPC."""
