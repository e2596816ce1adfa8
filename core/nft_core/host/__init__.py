"""Plug-ins: found, loaded, and made from their names and options."""
