"""The server of rewards: `nft serve`."""
