"""Processes, signals, devices, threads and shards."""
