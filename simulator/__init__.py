"""Fake Ollama servers and, later, the discrete-event twin of lbio; drives the same lbcore."""
