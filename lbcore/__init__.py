"""The decisions of ollama-lb: a sans-IO state machine without clock, sockets or global randomness."""

__version__ = "0.1.0"


def is_compiled() -> bool:
    """Tell whether the core that runs was compiled (setup.py), which changes nothing but its speed."""
    return not __file__.endswith(".py")
