"""What is run on a machine with one GPU."""
