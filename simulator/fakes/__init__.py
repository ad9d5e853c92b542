"""What a fake Ollama server is made of: its engine and memory, and the answers of each path."""
