"""Whether a third party may believe what a run says of itself: `verify_run`, and the command `dpml verify`.

`parts`, `pairs`, `composition` and `renyi` are an accountant that shares nothing with `accounting`: another
reader of events, another discretisation, whole numbers instead of floats. It is slow, and short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpml.verify.check import Check
    from dpml.verify.run import Verification, verify_run

__all__ = ["Check", "Verification", "verify_run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dpml.verify import run

        return getattr(run, name)
    raise AttributeError(f"module 'dpml.verify' has no attribute {name!r}")
