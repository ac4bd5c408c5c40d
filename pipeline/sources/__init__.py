"""Source files and their rows."""
