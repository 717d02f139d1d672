"""The Llama block family in PyTorch."""
