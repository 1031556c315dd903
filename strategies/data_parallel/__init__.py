"""Data parallel: every rank sees different rows. FSDP2 and HSDP shard parameters, DDP replicates them.

Start with `fsdp2.py` (`fully_shard` on every block). `fp8_gather.py` gathers trained weights in fp8.
"""
