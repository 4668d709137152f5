"""How the client's gradient is computed while an attack differentiates it."""
