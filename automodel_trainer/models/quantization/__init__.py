"""Weights in few bits: NF4 for QLoRA, fp8 for frozen and for trained weights.

Start with `quantize.py` (which weights are held in few bits), then `quantized_tensor.py` (the tensor that holds one).
"""
