from tests.contract import OnMemcached, OnRedis, ServerContract


class TestRedisStorage(OnRedis, ServerContract):
    pass


class TestMemcachedStorage(OnMemcached, ServerContract):
    pass
