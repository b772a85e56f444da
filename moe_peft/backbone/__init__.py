"""What stands where in a transformers model: sparse layers, routers, encoders, expert tensors; it knows no adapter."""
