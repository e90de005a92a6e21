"""ONNX models in ONNX Runtime: this project's and other tools', looked into, opened, kept ready to start."""
