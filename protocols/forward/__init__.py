"""How the rows of one layer reach the experts that they chose, and come back in order."""
