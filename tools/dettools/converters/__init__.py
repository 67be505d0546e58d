"""Weights from one architecture or version to another, each with a table, a proof and a certificate."""
