"""The engine inside other people's frameworks."""
