"""Serves a registered reward over HTTP: the server, and the wire format that it shares with its clients."""
