"""Makes images with the policy: encoded prompts, noise, and the rollout that generates and scores."""
