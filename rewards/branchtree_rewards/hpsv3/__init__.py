"""HPSv3: how people would like a picture of a prompt."""
