"""How nodes come to have the same blocks, and how chunks are fetched from several peers at once."""
