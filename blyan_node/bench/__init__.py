"""The project's own measurements, each beside its peer or its limit in the same run."""
