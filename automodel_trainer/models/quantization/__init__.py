"""Weights in few bits: NF4 for QLoRA, fp8 for frozen and for trained weights.

Start with `quantize.py` (which weights of a model), then `quantized_tensor.py` (the tensor of one weight).
"""
