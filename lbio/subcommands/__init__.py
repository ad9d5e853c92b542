"""Commands of `ollama-lb` that have a file of their own, and what they share; `lbio.cli` lists them."""
