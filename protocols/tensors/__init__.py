"""How tensors become chunks, and how chunks are proved to belong to a block."""
