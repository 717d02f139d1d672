"""Which implementation of each kernel operation runs on this machine, for people to read."""

from __future__ import annotations


def chosen() -> dict[str, str]:
    """Operation → what was chosen on the best device here, why, and what a fallback costs."""
    try:
        import torch

        from outrider.kernels import registry
    except ImportError as error:
        return {"none": str(error)}
    device, dtype = torch.device("cpu"), torch.float32
    if torch.cuda.is_available():
        device = torch.device("cuda:0")
        major, _ = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if major >= 8 else torch.float16
    found = {choice.operation: str(choice) for choice in registry.choices(device, dtype)}
    return {name: text.removeprefix(f"{name}: ") for name, text in found.items()}
