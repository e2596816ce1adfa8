"""Trains from Python: `nft_core.train` and `nft_core.resume`."""
