"""`cabochon report` and `cabochon view`: run directories as a page. Reads the files a run leaves, and nothing else."""
