"""Exporting models to ONNX files that say what they are and equal what they were made from: see `model`."""
