"""Events from files, and windows of past and future from events.

An *event* is a dict: `id` (str), `time` (T,) datetime64, `values` (T, H, W) in stored units with missing values as the
source codes them, and `geo`, a dict that says where it lies.
"""
