"""What clients ask for, and when: arrivals, lengths, sessions, public traces and our own logs."""
