"""Stages for onnxruntime-genai: the NPU's graphs as its `decoder-pipeline` runs them."""
