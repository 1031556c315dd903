"""Context parallel: every sequence is split over ranks, and only attention communicates.

Start with `split.py` (which tokens a rank gets), then read `attention.py` (ring or Ulysses behind one attention
function).

Sources: ring attention, arXiv 2310.01889; DeepSpeed-Ulysses, arXiv 2309.14509.
"""
