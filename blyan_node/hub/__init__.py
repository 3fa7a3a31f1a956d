"""Downloads from a model hub, in a process of their own that can be ended at any moment."""
