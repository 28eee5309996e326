"""The text that a prompt asks for, and how near to it is what was read."""

import re

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def quoted_text(prompt: str) -> str | None:
    """Return the first text in double quotation marks, straight or curly; None if there is none but spaces."""
    found = QUOTED.search(prompt)
    text = found[1] or found[2] if found else None
    return text if text and plain(text) else None


def plain(text: str) -> str:
    """Return text in lower case without any space, as it is compared."""
    return "".join(text.split()).lower()


def edit_distance(first: str, second: str) -> int:
    """Return the least number of characters to insert, remove or replace that turns one text into the other."""
    distances = list(range(len(second) + 1))  # from what was read of the first text to each beginning of the second
    for row, left in enumerate(first, 1):
        diagonal, distances[0] = distances[0], row
        for column, right in enumerate(second, 1):
            replaced = diagonal + (left != right)
            diagonal = distances[column]
            distances[column] = min(replaced, diagonal + 1, distances[column - 1] + 1)
    return distances[-1]


def likeness(target: str, read: str) -> float:
    """Return 1 - edit distance / length of the target, at least 0, of texts in their `plain` form."""
    return max(0.0, 1 - edit_distance(target, read) / len(target))
