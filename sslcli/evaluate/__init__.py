"""What is it worth? One file per evaluator."""
