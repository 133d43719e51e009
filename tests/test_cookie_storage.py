"""EncryptedCookieStorage: the contract, and what is its own."""

from tests.contract import Encrypted, EncryptedSiv, StorageContract


class TestEncryptedCookieStorage(Encrypted, StorageContract):
    pass


class TestEncryptedCookieStorageWithGcmSiv(EncryptedSiv, StorageContract):
    pass
