"""What flows from client to attack to measurement, and functions that run a network without changing it."""
