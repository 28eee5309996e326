"""GenEval: whether pictures hold the objects that their prompts name, in number, colour and position."""
