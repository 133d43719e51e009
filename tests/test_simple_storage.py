"""SimpleCookieStorage: the contract, and what is its own."""

from tests.contract import Simple, StorageContract


class TestSimpleCookieStorage(Simple, StorageContract):
    empty_is_deleted = False
