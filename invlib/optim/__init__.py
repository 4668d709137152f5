"""What a search is made of: objectives, priors, coordinates, optimisers, schedules."""
