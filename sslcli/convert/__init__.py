"""In whose dialect? Rules between weight layouts."""
