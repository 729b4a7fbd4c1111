"""Where to compute."""

from __future__ import annotations

import torch

from accounting import UserError


def choose_device(wish: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means on this machine; UserError if there is none."""
    if wish == "cuda" and not torch.cuda.is_available():
        raise UserError("The device cuda is not available on this machine; use cpu or auto.")
    return torch.device("cuda" if wish != "cpu" and torch.cuda.is_available() else "cpu")
