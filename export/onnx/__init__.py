"""ONNX graphs for CPU and NPU, and onnxruntime-genai's folders."""
