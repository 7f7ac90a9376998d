"""Dynamic Diffusion Transformers whose saved compute is saved on the clock.

`from dydit import DyDiTPipeline` runs a bundle; everything else is behind the command `dydit` and in the subpackages.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `typing`, which this module would be the first to import
if TYPE_CHECKING:
    from typing import Any

    from dydit.runtime.pipeline import DyDiTPipeline

__version__ = "0.1.0"
__all__ = ["DyDiTPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing the package stays light: the pipeline brings NumPy, pydantic and Pillow with it.
    if name == "DyDiTPipeline":
        from dydit.runtime.pipeline import DyDiTPipeline

        return DyDiTPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
