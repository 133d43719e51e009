from tests.contract import Encrypted, EncryptedSiv, StorageContract


class TestEncryptedCookieStorage(Encrypted, StorageContract):
    pass


class TestEncryptedCookieStorageWithGcmSiv(EncryptedSiv, StorageContract):
    pass
