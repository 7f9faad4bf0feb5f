"""What the programs of bench share; ../README.md says how it is used.

cases      what is measured: shapes, their inputs, and what reference.py makes of them
baselines  one class each: ours, the floor, and what it is compared with
measure    how it is timed
agree      how ranks stay together when one fails
worker     what every rank does
report     the JSON, the table, the ratios (no torch)
plots      latency and roofline (no torch; matplotlib)
progress   the bar (no torch; tqdm where it is installed)
cmake      builds the programs of C++ (no torch)
quantiles.h  the medians of those
"""
