"""Blocks, their validation and their order."""
