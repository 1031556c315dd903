"""Megatron-FSDP: NVIDIA's fully sharded data parallel in flat buffers (package megatron-fsdp).

Start with `megatron_fsdp.py`. Every call into the package is in `_megatron_fsdp.py`.
"""
