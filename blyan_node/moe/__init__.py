"""The engine: reads checkpoints, computes models. The only importer of torch."""
