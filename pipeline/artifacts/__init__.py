"""What is on the disk, how it gets there, and reading it back."""
