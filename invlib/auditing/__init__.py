"""The audit: what an update gives away, why an attack failed, and what would help."""
