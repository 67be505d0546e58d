"""ONNX files read as graphs: what is in them, the shapes of every node, and who can run them."""
