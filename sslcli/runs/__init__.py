"""What happened so far? Run folders, results, plots."""
