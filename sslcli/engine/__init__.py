"""In what order does time pass? Loop, optimisers, checkpoints, launch."""
