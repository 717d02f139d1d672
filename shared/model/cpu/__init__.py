"""The Llama block family on a CPU, forwarded by this project's own kernels."""
