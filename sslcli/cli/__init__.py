"""What did the user ask? Command line only: load a preset, call the job, say where the result is."""
