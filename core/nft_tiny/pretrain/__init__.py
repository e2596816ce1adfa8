"""The scripts that made the embedded world's weights: `python -m nft_tiny.pretrain --help`."""
