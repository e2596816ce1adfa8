"""The mathematics of DiffusionNFT: advantages, loss, schedules and times. Tensors in, tensors out."""
