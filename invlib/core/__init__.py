"""What flows from client to attack to measurement, and how a network is asked."""
