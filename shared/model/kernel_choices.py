"""Which kernels run on this machine, for people to read."""

from __future__ import annotations


def chosen() -> dict[str, str]:
    """What forwards a model on each kind of device here, what was chosen, and why.

    On CUDA operation by operation, with what a fallback costs.
    """
    try:
        import torch

        from outrider.kernels import registry
    except ImportError as error:
        return {"none": str(error)}
    found = {"cpu": _cpu()}
    if torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability(0)
        dtype = torch.bfloat16 if major >= 8 else torch.float16
        for choice in registry.choices(torch.device("cuda:0"), dtype):
            found[choice.operation] = str(choice).removeprefix(f"{choice.operation}: ")
    return found


def _cpu() -> str:
    from outrider.kernels.cpu import compile as kernels
    from outrider.kernels.cpu.shape import columns_for
    from outrider.kernels.cpu.team import openmp

    reason = kernels.why_not()
    if reason is not None:
        return f"PyTorch's own products, some times slower: {reason}"
    text = kernels.description(columns_for(kernels.vector_lanes()))
    return text if openmp() is not None else f"{text}; one thread: torch brings no OpenMP"
