"""Records that a process keeps for as long as it is told of their changes."""

from aiohttp_session._core import KeptRecords
from aiohttp_session._records_py import Link, Token

__all__ = ["KeptRecords", "Link", "Token"]
