"""Expert parallel: a mixture's experts are split over ranks, and every token travels to the experts it chose.

Start with `parallelize.py`, then read `dispatch.py` (how tokens travel), `choose.py` (which dispatcher) and `plan.py`
(which modules are experts).
Source: GShard, arXiv 2006.16668.
"""
