from tests.contract import NaCl, StorageContract


class TestNaClCookieStorage(NaCl, StorageContract):
    pass
