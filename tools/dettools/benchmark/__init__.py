"""How fast is it, honestly: load on an endpoint, and the same model in process; statistics, validity, comparison."""
