"""Whether a model keeps what its description says: measured, and held to what is declared."""
