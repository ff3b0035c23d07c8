"""Small parts that recur in methods."""
