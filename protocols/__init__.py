"""What Blyan nodes say to each other: types, limits and state machines, without any I/O."""
