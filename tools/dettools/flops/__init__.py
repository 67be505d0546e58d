"""What a forward pass costs: multiply-accumulates counted operator by operator, and what was not counted."""
