"""Images to train on: where they lie, what they show, and how they are read."""
