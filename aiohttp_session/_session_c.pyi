from typing import Any

from ._session_py import Session as Session

def fingerprint(mapping: dict[str, Any]) -> bytes | None: ...
