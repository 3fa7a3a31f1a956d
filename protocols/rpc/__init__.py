"""The RPC: one table of methods, and JSON-RPC 2.0 on lines without any I/O."""
