"""Published recipes as presets. Nobody imports this package: the host finds it by its entry point."""
