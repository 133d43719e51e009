"""What a session costs per request: ``python -m benchmarks``."""
