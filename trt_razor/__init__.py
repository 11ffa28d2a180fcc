"""RazorAttention for TensorRT: long contexts with the full KV cache only where it is needed.

Floors, lowest first: policy, headmap, models / planner, reference / heads, graph, kernels /
backends, engine / generate / serving / cli. A module never imports from a higher floor.
"""

__version__ = "0.1.0"
