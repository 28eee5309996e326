"""Prompts, pictures and videos as they come from files."""
