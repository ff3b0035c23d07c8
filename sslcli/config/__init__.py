"""What may be said: typed, frozen presets and the YAML they are written in. Nothing here imports torch."""
