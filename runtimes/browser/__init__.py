"""A page that opens an exported ONNX folder in the browser, and the small server that hands it out."""
