"""The built-in objectives, one a file, as a plug-in like a stranger's. Nobody imports it."""
