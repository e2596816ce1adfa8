"""Starts, joins and ends the processes of a run, and handles devices, threads and shared weights in each."""
