"""What a run has shown: figures, expectations, stories and pictures."""
