"""The policies that are compared: those that ship, those of the literature, the original, and the oracle."""
