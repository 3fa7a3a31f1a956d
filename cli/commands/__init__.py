"""One file of commands per area."""
