"""What the recipes share: the straight line from a checkpoint to a merged model, on the command line."""
