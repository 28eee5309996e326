"""Reading of prompts, pictures and videos."""
