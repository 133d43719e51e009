from tests.contract import Memory, ServerContract


class TestMemoryStorage(Memory, ServerContract):
    pass
