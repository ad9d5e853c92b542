"""What is written down: the log, the record of events and its replay, totals."""
