"""Every attack: a callable of a model and an observation that returns a reconstruction."""
