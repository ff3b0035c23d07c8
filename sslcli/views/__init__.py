"""How is an image looked at? Description, host part, device part."""
