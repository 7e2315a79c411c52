"""The differentiable operations and their pure-JAX oracle."""
