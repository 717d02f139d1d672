"""The same in device memory."""
