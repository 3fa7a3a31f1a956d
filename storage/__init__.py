"""What a node keeps: blocks, chunks, heads and packs, on one disk, through any crash."""
