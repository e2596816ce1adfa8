"""The training loop (Algorithm 1), the weights it trains, and its evaluation."""
