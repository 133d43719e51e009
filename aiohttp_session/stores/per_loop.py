"""An object for each event loop."""

from aiohttp_session._core import PerLoop

__all__ = ["PerLoop"]
