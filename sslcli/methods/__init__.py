"""What is the idea? One file per self-supervised method; methods never import each other."""
