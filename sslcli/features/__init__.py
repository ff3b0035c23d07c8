"""What did it learn, as weights and as a table of features?"""
