"""Finds and loads plug-ins, and makes what they offer from names and options."""
