"""Answers made here: of our own, of what is known of all servers, of those of several."""
