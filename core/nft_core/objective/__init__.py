"""The mathematics that all objectives share: advantages, noise, KL, schedules and times. Tensors in and out."""
