"""Serving one registered reward over HTTP: the wire format that both sides share, and the server."""
