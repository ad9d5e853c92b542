"""The decisions of ollama-lb: a sans-IO state machine without clock, sockets or global randomness."""

__version__ = "0.1.0"
