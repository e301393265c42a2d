"""Ways to run a merged model without PyTorch, and how fast they are."""
