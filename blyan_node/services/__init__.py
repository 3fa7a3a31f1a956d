"""What runs: one file for each running service, under trio."""
