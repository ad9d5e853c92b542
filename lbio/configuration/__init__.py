"""Files, flags and tables into settings, and settings into words."""
