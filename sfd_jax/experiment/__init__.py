"""From a config to networks, clocks, tasks, sources, targets and runs; the settings that several commands share.

Commands, benchmarks, notebooks and tests build things here and nowhere else.
"""
