"""The loop of an optimisation attack: restarts, successive halving, what runs a step."""
