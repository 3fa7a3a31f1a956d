"""What torch raises on a device, for those who tell the operator of it."""

import torch

OutOfMemory = torch.OutOfMemoryError  # by whatever does not fit there any more


def said(error: Exception) -> str:
    """The first line of what torch says; what follows is for its developers."""
    return str(error).partition("\n")[0][:200]
