"""Which images, in which order?"""
