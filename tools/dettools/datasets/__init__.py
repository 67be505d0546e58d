"""Data sets: made here, and (later) read from other formats."""
