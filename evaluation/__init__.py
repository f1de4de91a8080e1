"""How safe is it? Measures a running server as a stranger would, over HTTP only."""
