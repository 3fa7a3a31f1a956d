"""The Blyan daemon."""
