"""What the library asks of models, rewards and callbacks, and how it finds them."""
