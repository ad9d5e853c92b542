"""Whether the core that runs was compiled (setup.py), which changes nothing but its speed.

This module is compiled when the others are. The package itself is not: tools that read sources look for it.
"""


def is_compiled() -> bool:
    """Tell so."""
    return not __file__.endswith(".py")
