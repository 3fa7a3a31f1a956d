"""Arithmetic whose every sum has a written order (docs/sums.md), compiled when first needed."""
