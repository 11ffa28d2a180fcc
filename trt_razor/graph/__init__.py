"""Graphs: decoder-only models as ONNX with the operator ``trt_razor::RazorAttention``."""
