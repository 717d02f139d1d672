"""The Llama block family on kernels and CUDA graphs."""
