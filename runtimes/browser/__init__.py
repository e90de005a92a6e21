"""A page that opens GGUF files and ONNX folders in the browser, its server, and what drives a browser."""
