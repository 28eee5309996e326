"""Reading, checking and writing files, whatever they contain."""
