"""The node's side of the RPC: a server on a unix socket and one file of handlers per area."""
